package peers

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a session may take to come up, or a daemon to start or to end. On an idle machine it is about a second.
const patience = 60 * time.Second

// lab is a hub and its peers, each a network namespace:
//
//	hub  to-NAME  10.99.N.1/24  fd99:N::1/64  ───  10.99.N.2/24  fd99:N::2/64  eth0  NAME
type lab struct {
	t     *testing.T
	peers []string
	// secrets are the passwords so far: none of them may ever be printed.
	secrets   []string
	processes []*process
}

// newLab makes the namespaces, which end with the test.
func newLab(t *testing.T, peers ...string) *lab {
	t.Helper()
	l := &lab{t: t, peers: peers}
	l.namespace("hub")
	for i, peer := range peers {
		n := i + 1
		l.namespace(peer)
		l.ip(fmt.Sprintf("link add to-%s netns hub type veth peer name eth0 netns %s", peer, peer))
		for _, end := range []struct {
			ns, dev string
			host    int
		}{{"hub", "to-" + peer, 1}, {peer, "eth0", 2}} {
			l.ip(fmt.Sprintf("-n %s addr add 10.99.%d.%d/24 dev %s", end.ns, n, end.host, end.dev))
			l.ip(fmt.Sprintf("-n %s addr add fd99:%d::%d/64 dev %s nodad", end.ns, n, end.host, end.dev))
			l.ip(fmt.Sprintf("-n %s link set %s up", end.ns, end.dev))
		}
	}
	return l
}

func (l *lab) namespace(name string) {
	l.t.Helper()
	l.ip("netns add " + name)
	l.t.Cleanup(func() { l.ip("netns del " + name) })
	l.ip("-n " + name + " link set lo up")
}

// ip runs one command of iproute2.
func (l *lab) ip(args string) {
	l.t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		l.t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

// local and remote are the hub's and the peer's addresses on the wire between them, IPv4 for family 4.
func (l *lab) local(peer string, family int) netip.Addr  { return l.addr(peer, family, 1) }
func (l *lab) remote(peer string, family int) netip.Addr { return l.addr(peer, family, 2) }

func (l *lab) addr(peer string, family, host int) netip.Addr {
	for i, p := range l.peers {
		if p != peer {
			continue
		}
		if family == 4 {
			return netip.MustParseAddr(fmt.Sprintf("10.99.%d.%d", i+1, host))
		}
		return netip.MustParseAddr(fmt.Sprintf("fd99:%d::%d", i+1, host))
	}
	l.t.Fatalf("no peer %s", peer)
	panic("unreachable")
}

// prefix is the net of the wire to a peer.
func (l *lab) prefix(peer string, family int) netip.Prefix {
	bits := 24
	if family == 6 {
		bits = 64
	}
	return netip.PrefixFrom(l.local(peer, family), bits).Masked()
}

// password returns a new one.
func (l *lab) password() string {
	p := rand.Text()
	l.secrets = append(l.secrets, p)
	return p
}

// quiet returns a text for a log, without the passwords.
func (l *lab) quiet(text string) string {
	for _, p := range l.secrets {
		text = strings.ReplaceAll(text, p, "[password]")
	}
	return text
}

// in returns a command that runs in a namespace.
func (l *lab) in(ns string, args ...string) *exec.Cmd {
	return exec.CommandContext(l.t.Context(), "ip", append([]string{"netns", "exec", ns}, args...)...)
}

// start starts a program in a namespace and stops it with SIGTERM when the test ends; that it ends otherwise fails the test. Its output is
// in the file `log` in dir, and in the test's log if that failed.
func (l *lab) start(ns, dir string, args ...string) *process {
	l.t.Helper()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		l.t.Fatal(err)
	}
	defer log.Close()
	// `ip netns exec` becomes the program: the process is the program's own. It is not of the test's context, which ends before the
	// cleanups do.
	cmd := exec.Command("ip", append([]string{"netns", "exec", ns}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+dir)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	p := &process{lab: l, name: filepath.Base(args[0]), cmd: cmd, log: log.Name(), gone: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.gone)
	}()
	l.processes = append(l.processes, p)
	l.t.Cleanup(p.stop)
	return p
}

// process is a program that was started.
type process struct {
	lab     *lab
	name    string
	cmd     *exec.Cmd
	log     string
	gone    chan struct{} // closed when it has ended
	err     error         // how, once it has
	stopped bool
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// ended reports whether the program ended by itself.
func (p *process) ended() bool {
	select {
	case <-p.gone:
		return !p.stopped
	default:
		return false
	}
}

// stop ends the program, if it has not been stopped already.
func (p *process) stop() {
	if p.stopped {
		return
	}
	if p.ended() {
		p.lab.t.Errorf("%s ended by itself: %v", p.name, p.err)
	} else {
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			p.lab.t.Errorf("%s: %v", p.name, err)
		}
		select {
		case <-p.gone:
		case <-time.After(patience):
			p.lab.t.Errorf("%s did not end within %v of SIGTERM", p.name, patience)
			_ = p.cmd.Process.Kill() // it may have ended in between
			<-p.gone
		}
	}
	p.stopped = true
	if p.lab.t.Failed() {
		text, err := os.ReadFile(p.log)
		p.lab.t.Logf("%s said (%v):\n%s", p.name, err, p.lab.quiet(string(text)))
	}
}

// output runs a program to its end and returns its standard output. It is no failure of the test if the program fails.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Args[0]), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}

// eventually asks until it is told nil. What it is told otherwise is why it waits, and fails the test when the patience ends, or a program
// that should run has ended.
func (l *lab) eventually(what string, ask func() error) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return
		}
		for _, p := range l.processes {
			if p.ended() {
				l.t.Fatalf("%s: %s ended: %v", what, p.name, p.err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			l.t.Fatalf("%s: not within %v: %s", what, patience, l.quiet(err.Error()))
		}
	}
}

// do calls f on a thread in a namespace: the sockets that it opens stay there.
func (l *lab) do(ns string, f func() error) error {
	done := make(chan error)
	go func() {
		// A thread that is still locked ends with its goroutine, and with it the way back.
		runtime.LockOSThread()
		done <- func() error {
			file, err := os.Open("/run/netns/" + ns)
			if err != nil {
				return err
			}
			defer file.Close()
			if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
				return errors.Join(fmt.Errorf("enter %s", ns), err)
			}
			return f()
		}()
	}()
	return <-done
}
