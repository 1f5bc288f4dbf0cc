package kill

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process is an agent, or a tsoctl, that tells of the failpoints that it reaches.
type process struct {
	cmd  *exec.Cmd
	hits chan string   // closed when it has ended
	gone chan struct{} // closed when all is known of its end

	mu    sync.Mutex
	log   bytes.Buffer
	ready chan struct{} // closed when the agent has done its first round
	said  bool
	shot  bool // by us, at no point
	// goOn is told when something has happened that a stopped process may know.
	goOn    chan struct{}
	stopped chan struct{} // closed when orders have stopped it once, or it has ended
	seen    []string      // the points
}

// Write is for what the process says.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log.Write(b)
	if !p.said && bytes.Contains(p.log.Bytes(), []byte("msg=ready")) {
		p.said = true
		close(p.ready)
	}
	return len(b), nil
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// points are those that it has reached so far.
func (p *process) points() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.seen...)
}

// spawn starts a command of ours in a world, to do what orders say at failpoints (package failpoint).
func spawn(w *world, orders string, args ...string) (*process, error) {
	r, tell, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p := &process{
		cmd: exec.Command(args[0], args[1:]...), hits: make(chan string, 1), gone: make(chan struct{}), ready: make(chan struct{}), goOn: make(chan struct{}), stopped: make(chan struct{}),
	}
	p.cmd.Env = append(os.Environ(), "TSOAGENT_FAILPOINT="+orders, "TSOAGENT_FAILPOINT_FD=3")
	p.cmd.ExtraFiles = []*os.File{tell}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	err = w.Start(p.cmd)
	tell.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	if strings.Contains(orders, "=stop") {
		go p.conts()
	}
	go func() {
		defer r.Close()
		for s := bufio.NewScanner(r); s.Scan(); {
			p.mu.Lock()
			p.seen = append(p.seen, s.Text())
			p.mu.Unlock()
			select {
			case p.hits <- s.Text():
			default: // there is one that tells of something
			}
		}
		_ = p.cmd.Wait() // end says how it ended
		close(p.gone)
	}()
	return p, nil
}

// conts lets the process go on that orders have stopped: when something has happened, or when nothing does.
func (p *process) conts() {
	first := sync.OnceFunc(func() { close(p.stopped) })
	defer first()
	for {
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, &info, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil); err != nil || info.Code != cldStopped {
			return
		}
		first()
		select {
		case p.goOn <- struct{}{}:
		case <-time.After(100 * time.Millisecond):
		}
		_ = p.cmd.Process.Signal(unix.SIGCONT)
	}
}

// cldStopped is CLD_STOPPED (linux: asm-generic/siginfo.h).
const cldStopped = 5

// quiet waits until the process has reached no failpoint for some time, or has ended. It paces events, and nothing depends on it.
func (p *process) quiet(pause time.Duration) {
	for {
		select {
		case <-p.hits:
		case <-p.gone:
			return
		case <-time.After(pause):
			return
		}
	}
}

func (p *process) alive() bool {
	select {
	case <-p.gone:
		return false
	default:
		return true
	}
}

// begun waits until an agent is ready, or has ended.
func (p *process) begun(t testing.TB) {
	t.Helper()
	select {
	case <-p.ready:
	case <-p.gone:
	case <-time.After(patience):
		t.Fatalf("the agent does not become ready:\n%s", p.text())
	}
}

// ended waits for the end. killed says that it was by SIGKILL; any other end is to be a good one.
func (p *process) ended(t testing.TB) (killed bool) {
	t.Helper()
	select {
	case <-p.gone:
	case <-time.After(patience):
		_ = p.cmd.Process.Signal(unix.SIGQUIT)
		<-p.gone
		t.Fatalf("%s does not end:\n%s", filepath.Base(p.cmd.Path), p.text())
	}
	switch s := p.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal(); {
	case s == unix.SIGKILL:
		return true
	case !p.cmd.ProcessState.Success():
		t.Errorf("%s: %v\n%s", filepath.Base(p.cmd.Path), p.cmd.ProcessState, p.text())
	}
	return false
}

// last is the point at which it was, empty for none.
func (p *process) last() string {
	seen := p.points()
	if len(seen) == 0 {
		return ""
	}
	return seen[len(seen)-1]
}

func (p *process) String() string {
	return fmt.Sprintf("$ %s # %s\n%s(at %s)\n", strings.Join(p.cmd.Args, " "), p.cmd.Env[len(p.cmd.Env)-2], p.text(), p.last())
}
