package guard

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// FD is the number of the file by which the guard's process hears of the agent.
const FD = 3

// A Guard is the agent's side of it. It is safe for concurrent use.
type Guard struct {
	log     *slog.Logger
	command func() *exec.Cmd

	mu      sync.Mutex
	conn    *os.File // nil while there is no process
	process *os.Process
	watches map[uint64]given
	last    uint64
	begun   bool
	bye     bool
	rest    *rest         // there is to be no process for now, nil for not
	over    chan struct{} // closed when nobody starts a process any more
	leave   chan struct{} // closed by End and Leave
}

// given is what a process is given for a namespace, and what the next one is, should it end.
type given struct {
	Watch
	table, lock *os.File
}

// rest is a time without a process.
type rest struct {
	began, over chan struct{} // closed
}

// The time after which a guard that has ended is started again, and the longest.
const (
	firstRetry = time.Second
	lastRetry  = time.Minute
)

// New makes a guard, whose process is started with the first Watch: a command that calls Serve with FD. While it can't be started, or has ended, that
// is told in the log and tried again: without it all else goes on.
func New(log *slog.Logger, command func() *exec.Cmd) *Guard {
	return &Guard{log: log, command: command, watches: map[uint64]given{}, over: make(chan struct{}), leave: make(chan struct{})}
}

// keep sees to it that there is a process.
func (g *Guard) keep(cmd *exec.Cmd, err error) {
	defer close(g.over)
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		if err == nil {
			began := time.Now()
			err = cmd.Wait()
			g.mu.Lock()
			_ = g.conn.Close()
			g.conn = nil
			g.mu.Unlock()
			if time.Since(began) > lastRetry {
				wait = firstRetry
			}
		}
		if g.ends() {
			return
		}
		if r := g.rests(); r != nil {
			close(r.began)
			select {
			case <-g.leave:
				return
			case <-r.over:
			}
			cmd, err = g.start()
			continue
		}
		g.log.Warn("the agent's guard has ended: if the agent is killed meanwhile, its rules stay until somebody takes them away", "err", err, "again_in", wait)
		select {
		case <-g.leave:
			return
		case <-time.After(wait):
		}
		cmd, err = g.start()
	}
}

// ends reports whether there is to be no process any more.
func (g *Guard) ends() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.bye
}

func (g *Guard) rests() *rest {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.rest
}

// Without does something that ends the agent for its guard, though another program goes on with what it holds: to execute that in this process. There
// is no guard's process meanwhile. If it returns, there is one again.
func (g *Guard) Without(do func() error) error {
	g.mu.Lock()
	if g.conn == nil || g.bye || g.rest != nil {
		g.mu.Unlock()
		return do()
	}
	r := &rest{make(chan struct{}), make(chan struct{})}
	g.rest = r
	g.tell(message{Bye: true})
	g.mu.Unlock()
	select {
	case <-r.began:
	case <-time.After(endWithin):
		g.kill()
		<-r.began
	}
	err := do()
	g.mu.Lock()
	g.rest = nil
	g.mu.Unlock()
	close(r.over)
	return err
}

// start starts a process, and tells it all.
func (g *Guard) start() (*exec.Cmd, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.startLocked()
}

func (g *Guard) startLocked() (*exec.Cmd, error) {
	if g.bye {
		return nil, errors.New("guard: it is not needed any more")
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, its := os.NewFile(uintptr(fds[0]), "guard"), os.NewFile(uintptr(fds[1]), "agent")
	cmd := g.command()
	cmd.ExtraFiles = []*os.File{its}
	if err := errors.Join(cmd.Start(), its.Close()); err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	g.conn, g.process = ours, cmd.Process
	for id, w := range g.watches {
		g.tell(message{ID: id, Watch: &w.Watch}, w.table, w.lock)
	}
	return cmd, nil
}

// tell tells the process something. Where that fails, it has ended, and the next one is told. The lock is held.
func (g *Guard) tell(m message, files ...*os.File) {
	if g.conn == nil {
		return
	}
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	b, err := json.Marshal(m)
	if err == nil {
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...)
		}
		err = unix.Sendmsg(int(g.conn.Fd()), b, rights, nil, unix.MSG_NOSIGNAL)
	}
	if err != nil {
		g.log.Warn("the agent's guard can't be told", "err", err)
	}
}

// Watch has the agent's rules in a namespace go with the agent, until drop is called. table is a copy of a routing socket there
// (routes.Table.File), and lock one of the journal's (journal.Journal.LockFile); both are taken over.
func (g *Guard) Watch(w Watch, table, lock *os.File) (drop func() error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.last++
	id := g.last
	g.watches[id] = given{w, table, lock}
	if g.begun {
		g.tell(message{ID: id, Watch: &w}, table, lock)
	} else {
		g.begun = true
		cmd, err := g.startLocked()
		go g.keep(cmd, err)
	}
	return sync.OnceValue(func() error {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.watches, id)
		g.tell(message{ID: id, Drop: true})
		return errors.Join(table.Close(), lock.Close())
	})
}

// endWithin bounds for how long the end of a guard is waited for. One that is stopped (SIGSTOP) is killed then.
const endWithin = 5 * time.Second

// End tells the guard that all was given back, or is meant to stay, and waits for its end.
func (g *Guard) End() error {
	g.mu.Lock()
	if g.bye || !g.begun {
		g.bye = true
		g.mu.Unlock()
		return nil
	}
	g.bye = true
	g.tell(message{Bye: true})
	g.mu.Unlock()
	close(g.leave)
	select {
	case <-g.over:
	case <-time.After(endWithin):
		g.kill()
		<-g.over
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for _, w := range g.watches {
		errs = append(errs, w.table.Close(), w.lock.Close())
	}
	clear(g.watches)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("guard: %w", err)
	}
	return nil
}

func (g *Guard) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn != nil {
		_ = g.process.Kill() // it may have ended
	}
}
