package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// session is what the commands of one script share. The script runs in one goroutine; only what the background traffic
// uses is guarded.
type session struct {
	start    time.Time
	steps    io.Writer
	figures  io.Writer // what rate, flows and datagrams have measured, a JSON object a line
	envNames []string  // the variables that may be set, asked of testscript when a program is started

	mu          sync.Mutex
	connections map[string]*connection
	servers     map[string]*server
}

// A command is one script command in a form that `eventually` can repeat: it returns its output and its failure instead of
// ending the script.
type command func(ctx context.Context, ts *testscript.TestScript, args []string) (stdout string, err error)

// errUsage marks a mistake in the script. It ends the script even behind `!` or inside `eventually`.
var errUsage = errors.New("usage")

func usage(text string) error { return fmt.Errorf("%w: %s", errUsage, text) }

// defaultPatience bounds a command that has no deadline of its own.
const defaultPatience = 30 * time.Second

// patience is how many times longer than in the test kernel things may take here: the scripts' deadlines are for that one, and a
// stock kernel is emulated.
func patience() time.Duration {
	n, err := strconv.Atoi(os.Getenv("TSOAGENT_PATIENCE"))
	if err != nil || n < 1 {
		return 1
	}
	return time.Duration(n)
}

// parsePatience parses a deadline of a script.
func parsePatience(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	return d * patience(), err
}

// repeatable returns the commands that eventually may repeat, by name.
func (s *session) repeatable() map[string]command {
	return map[string]command{
		"feature": s.feature,
		"ipmtu":   s.ipMTU,
		"natt":    s.natt,
		"tcp":     s.tcp,
		"udp-df":  s.udpDF,
		"wire":    s.wire,
	}
}

// commands returns all of our commands as testscript wants them.
func (s *session) commands() map[string]func(*testscript.TestScript, bool, []string) {
	cmds := map[string]func(*testscript.TestScript, bool, []string){
		"eventually": s.eventually,
		"killagent":  s.killAgent,
		"signal":     s.signal,
		"snapshot":   s.snapshot,
		"step":       s.step,
		"sysctl":     s.sysctl,
	}
	plain := s.repeatable()
	maps.Copy(plain, s.measurements())
	for name, run := range plain {
		cmds[name] = func(ts *testscript.TestScript, neg bool, args []string) {
			ctx, cancel := context.WithTimeout(context.Background(), defaultPatience*patience())
			defer cancel()
			stdout, err := run(ctx, ts, args)
			fmt.Fprint(ts.Stdout(), stdout)
			switch {
			case errors.Is(err, errUsage):
				ts.Fatalf("%s: %v", name, err)
			case err != nil && !neg:
				ts.Fatalf("%s: %v", name, err)
			case err != nil:
				fmt.Fprintln(ts.Stderr(), err)
			case neg:
				ts.Fatalf("%s: unexpected success", name)
			}
		}
	}
	return cmds
}

// step prints a line of the timeline: time since the script began, and the words.
func (s *session) step(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: step text…")
	}
	line := fmt.Sprintf("[%8.3fs] %s", time.Since(s.start).Seconds(), os.Expand(strings.Join(args, " "), ts.Getenv))
	ts.Logf("%s", line)
	fmt.Fprintln(s.steps, line)
}

// sysctl sets a network sysctl in a namespace.
func (s *session) sysctl(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: sysctl namespace key value")
	}
	path := "/proc/sys/" + strings.ReplaceAll(args[1], ".", "/")
	ts.Check(inNamespace(args[0], func() error {
		return os.WriteFile(path, []byte(args[2]), 0o644)
	}))
}

// signal sends a signal to a background command.
func (s *session) signal(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: signal name HUP|TERM|INT|KILL|STOP|CONT|USR1|USR2")
	}
	number := unix.SignalNum("SIG" + strings.TrimPrefix(args[1], "SIG"))
	if number == 0 {
		ts.Fatalf("signal: unknown signal %s", args[1])
	}
	ts.Check(background(ts, args[0]).Process.Signal(number))
}

// killAgent kills a background command and waits until the kernel has let go of it.
func (s *session) killAgent(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: killagent name")
	}
	process := background(ts, args[0]).Process
	ts.Check(process.Kill())
	for deadline := time.Now().Add(defaultPatience * patience()); time.Now().Before(deadline); time.Sleep(pollInterval) {
		if errors.Is(process.Signal(unix.Signal(0)), os.ErrProcessDone) {
			return
		}
	}
	ts.Fatalf("killagent: %s is still there after %v", args[0], defaultPatience)
}

// background finds a background command by its name.
func background(ts *testscript.TestScript, name string) *exec.Cmd {
	cmds := ts.BackgroundCmds()
	for i := len(cmds) - 1; i >= 0; i-- {
		for _, arg := range cmds[i].Args {
			if arg == backgroundVariable+"="+name {
				return cmds[i]
			}
		}
	}
	ts.Fatalf("no background command %q", name)
	return nil
}

// program runs a program with the script's directory and environment.
func (s *session) program(ctx context.Context, ts *testscript.TestScript, args []string) (stdout, stderr string, err error) {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return "", "", usage(err.Error())
	}
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args[1:]...)
	cmd.Dir = ts.MkAbs(".")
	for _, name := range s.envNames {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	cmd.Stdout, cmd.Stderr = &out, &errOut
	// A grandchild that keeps the pipes open must not keep us.
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// close ends the traffic.
func (s *session) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.connections {
		_ = c.stop() // the script is over
	}
	for _, srv := range s.servers {
		srv.listener.Close()
	}
}
