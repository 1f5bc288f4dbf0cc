package sockopt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Options says how a Watcher polls. The zero value means the defaults.
type Options struct {
	// Period is the time between two polls, 0 for 10 s.
	Period time.Duration
}

// DefaultPeriod is how often keys are looked at unless told.
const DefaultPeriod = 10 * time.Second

// HookedPeriod is how often they are looked at where a hook tells of keys that are set: a socket
// that is closed takes its keys along, of which no hook tells.
const HookedPeriod = time.Minute

// A Watcher follows the TCP-MD5 keys of one network namespace: the one of the thread that called
// Dial. All but Run are safe for concurrent use; Run is called once.
//
//	timer ────> look: dump the listeners and connections ──> keys changed? ──> sink
//	Look ─────>
//	Resync ───>
//
// The kernel tells nobody of keys, so it is asked now and then. It can't be asked for the sockets
// with keys alone (its filters don't know them), and it shows keys only where INET_DIAG_INFO is
// asked for, too, for which it locks each socket. On Linux 6.18 a look takes 2.5 to 4 ms (a walk
// through the 262,144 buckets of the kernel's table, whose size follows the machine's memory, for
// each family) and 2.4 µs for each connection: 0.24 s at 100,000, a thorough one 0.38 s
// (BenchmarkKernelLook). So after a look the next poll waits restFactor times the CPU time that it
// took, if that is longer than the period: polling takes 2 % of one CPU at most, however many
// connections there are, and 0.04 % on a host with few.
type Watcher struct {
	diag   *diag
	period time.Duration

	hooked atomic.Bool
	again  chan bool // whether everything is to be read, not only looked at
	stats  struct {
		dumps, told, overruns, undecodable, interrupted atomic.Uint64
		total, last                                     atomic.Int64 // ns
		sockets, hidden                                 atomic.Int64
	}
}

// Stats counts what a Watcher saw since Dial.
type Stats struct {
	Dumps       uint64 // looks that were complete
	Told        uint64 // those that found another set
	Overruns    uint64 // receive buffer overflows (ENOBUFS)
	Undecodable uint64 // sockets that made no sense
	Interrupted uint64 // dumps that the kernel called inconsistent (NLM_F_DUMP_INTR)
	// Total and Last are the CPU time of all looks and of the last, the kernel's included.
	Total, Last time.Duration
	// Sockets is how many sockets the last look saw; Hidden those whose keys the kernel can't show.
	Sockets, Hidden int
}

// Stats returns the counters.
func (w *Watcher) Stats() Stats {
	return Stats{
		Dumps: w.stats.dumps.Load(), Told: w.stats.told.Load(), Overruns: w.stats.overruns.Load(),
		Undecodable: w.stats.undecodable.Load(), Interrupted: w.stats.interrupted.Load(),
		Total: time.Duration(w.stats.total.Load()), Last: time.Duration(w.stats.last.Load()),
		Sockets: int(w.stats.sockets.Load()), Hidden: int(w.stats.hidden.Load()),
	}
}

// Dial opens the socket in the network namespace of the calling thread. The error wraps EPERM where
// CAP_NET_ADMIN is missing, without which the kernel shows no keys; ENOPROTOOPT where the kernel has
// no TCP-MD5, so that there are none; EPROTONOSUPPORT where it can't show its sockets. Close the
// Watcher also if Run is never called.
func Dial(opts Options) (*Watcher, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	d, err := dialDiag()
	if err != nil {
		return nil, fmt.Errorf("sockopt: dial sock_diag: %w", err)
	}
	w := &Watcher{diag: d, period: opts.Period, again: make(chan bool, 1)}
	if w.period <= 0 {
		w.period = DefaultPeriod
	}
	// The first answer on a socket comes in a buffer of one page, and a listener that doesn't fit ends
	// the dump in silence (netlink_dump, net/netlink/af_netlink.c). Reading this one makes it 32 KiB.
	_, err = w.dumpIDs(afInet, listening, func(id [idLen]byte) {})
	if err == nil {
		err = w.dump(afInet, listening, newCollector(), nil)
	}
	if err != nil {
		return nil, errors.Join(explain(err), w.Close())
	}
	return w, nil
}

// supported asks a socket whether it knows keys, without giving it one.
func supported() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("sockopt: open a socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, ""); errors.Is(err, unix.ENOPROTOOPT) {
		return fmt.Errorf("sockopt: this kernel has no TCP-MD5 signatures (CONFIG_TCP_MD5SIG): %w", err)
	}
	return nil
}

// explain says what an error of the kernel means here.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("sockopt: this kernel can't show its TCP sockets (modules tcp_diag, inet_diag): %w", unix.EPROTONOSUPPORT)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("sockopt: read the TCP-MD5 keys: %w", err)
	}
	return fmt.Errorf("sockopt: dump the TCP sockets: %w", err)
}

// Close closes the socket. Cancel the context of Run first.
func (w *Watcher) Close() error {
	clear(w.diag.buf)
	return w.diag.close()
}

// Look has the keys looked at now: it is for whoever knows that one was set or deleted. It never
// blocks; what is asked for before the look begins is one look. A look that comes soon after
// another waits a little.
func (w *Watcher) Look() { w.trigger(false) }

// Resync asks for a look that leaves nothing out, whatever it takes.
func (w *Watcher) Resync() { w.trigger(true) }

func (w *Watcher) trigger(thorough bool) {
	for {
		select {
		case w.again <- thorough:
			return
		default:
		}
		if !thorough {
			return // one is waiting that finds as much
		}
		select {
		case <-w.again:
		default:
		}
	}
}

// Hooked says whether somebody calls Look when keys are set. Then polls are only for what nobody
// tells.
func (w *Watcher) Hooked(on bool) { w.hooked.Store(on) }

const (
	minRetry = 100 * time.Millisecond
	maxRetry = 30 * time.Second
	// restFactor is how many times as long as a look took the next poll waits at least, lookFactor
	// the same for Look, and minRest the least for that.
	restFactor = 50
	lookFactor = 10
	minRest    = 50 * time.Millisecond
)

// Run looks at the keys and then polls, until ctx is cancelled, which is the error that it returns
// then, or until the socket can't be read any more. It closes the Watcher. sink is called from this
// goroutine only, and only if the keys differ from those told last, or after a loss; the first look
// is always told.
func (w *Watcher) Run(ctx context.Context, sink func([]Event)) error {
	defer w.Close()
	stop := context.AfterFunc(ctx, w.diag.interrupt)
	defer stop()
	var told KeysSet
	first, lost, thorough := true, false, true
	wait := minRetry
	for {
		now, took, err := w.timed(told.Keys, thorough || first || lost)
		ended := time.Now()
		w.stats.total.Add(int64(took))
		w.stats.last.Store(int64(took))
		poll, soonest := max(w.every(), restFactor*took), max(minRest, lookFactor*took)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, unix.EBADF), errors.Is(err, os.ErrClosed):
			return err
		case err != nil:
			if errors.Is(err, unix.ENOBUFS) {
				w.stats.overruns.Add(1)
			}
			if !lost {
				lost = true
				sink([]Event{Lost{explain(err)}})
			}
			poll = wait
			wait = min(2*wait, maxRetry)
		default:
			w.stats.dumps.Add(1)
			if first || lost || now.Hidden != told.Hidden || !slices.Equal(told.Keys, now.Keys) {
				w.stats.told.Add(1)
				sink([]Event{KeysSet{slices.Clone(now.Keys), now.Hidden}})
			}
			told, first, lost, wait = now, false, false, minRetry
		}
		if thorough, err = w.rest(ctx, ended, soonest, poll); err != nil {
			return err
		}
	}
}

// timed looks, and says how much of a CPU that took: what the kernel does for it, it does in this
// thread.
func (w *Watcher) timed(known []Key, thorough bool) (KeysSet, time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := cpuTime()
	now, err := w.look(known, thorough)
	return now, cpuTime() - began, err
}

func cpuTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

func (w *Watcher) every() time.Duration {
	if w.hooked.Load() {
		return max(w.period, HookedPeriod)
	}
	return w.period
}

// rest waits until the next look: for poll, or until one is asked for, but for soonest in any case.
func (w *Watcher) rest(ctx context.Context, from time.Time, soonest, poll time.Duration) (thorough bool, err error) {
	timer := time.NewTimer(time.Until(from.Add(poll)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-timer.C:
		return false, nil
	case thorough = <-w.again:
	}
	timer.Reset(time.Until(from.Add(min(soonest, poll))))
	select {
	case <-ctx.Done():
		return thorough, context.Cause(ctx)
	case <-timer.C:
	}
	select {
	case more := <-w.again: // is one with this
		thorough = thorough || more
	default:
	}
	return thorough, nil
}
