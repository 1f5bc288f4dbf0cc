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
	// More are the keys of other kinds than MD5, which sock_diag doesn't show, nil for none. It is called in each
	// look, in no particular namespace. While it fails, what it told last stays. cut counts the sockets of which not
	// all keys are told: while there is one, what was known stays.
	More func() (keys []Key, cut int, err error)
	// Trust returns whose keys count, root's in any case; nil for root's alone. It is called at the start of each look,
	// and what it returns for each socket with keys.
	Trust func() func(uid uint32) bool
}

// DefaultPeriod is how often keys are looked at unless told.
const DefaultPeriod = 10 * time.Second

// HookedPeriod is how often they are looked at where a hook tells of keys that come and go.
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
// asked for, too, for which it locks each socket. On Linux 6.18 a look takes 1.7 ms of CPU (a walk
// through the 262,144 buckets of the kernel's table, whose size follows the machine's memory, for
// each family) and 1.4 µs for each connection: 0.14 s at 100,000, a thorough one 0.26 s
// (BenchmarkKernelLook). So after a look the next poll waits restFactor times the CPU time that it
// took, if that is longer than the period: polling takes 2 % of one CPU at most, however many
// connections there are, and 0.02 % on a host with few.
type Watcher struct {
	diag   *diag
	period time.Duration
	trust  func() func(uid uint32) bool
	more   func() ([]Key, int, error)
	extra  []Key // what more told last
	cut    int   // and of how many sockets not all
	// extraOver says of whose keys there were too many.
	extraOver [2]bool

	hooked atomic.Bool
	again  chan urgency // has one when a look is asked for, the most urgent
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
	w := &Watcher{diag: d, period: opts.Period, more: opts.More, trust: opts.Trust, again: make(chan urgency, 1)}
	if w.trust == nil {
		w.trust = func() func(uint32) bool { return nil }
	}
	if w.period <= 0 {
		w.period = DefaultPeriod
	}
	// The first answer on a socket comes in a buffer of one page, and a listener that doesn't fit ends
	// the dump in silence (netlink_dump, net/netlink/af_netlink.c). Reading this one makes it 32 KiB.
	_, err = w.dumpIDs(afInet, listening, func(id [idLen]byte) {})
	if err == nil {
		err = w.dump(afInet, listening, newCollector(nil, nil), nil)
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

// urgency is how much a look is wanted.
type urgency uint8

const (
	soon     urgency = 1 // as soon as a poll may be
	now      urgency = 2
	thorough urgency = 3 // now, and nothing is left out
)

// Look has the keys looked at now: it is for whoever knows that one was set or deleted. It never
// blocks; what is asked for before the look begins is one look. A look that comes soon after
// another waits a little. There is a second one a second later, as keys are set before their sockets are
// to be seen.
func (w *Watcher) Look() { w.trigger(now) }

// LookSoon is Look for what happens as often as connections come and go: it takes no more of a CPU than
// polling may.
func (w *Watcher) LookSoon() { w.trigger(soon) }

// Resync asks for a look that leaves nothing out, whatever it takes.
func (w *Watcher) Resync() { w.trigger(thorough) }

func (w *Watcher) trigger(u urgency) {
	for {
		select {
		case w.again <- u:
			return
		default:
		}
		select {
		case waiting := <-w.again:
			u = max(u, waiting) // one look is as good for both
		default:
		}
	}
}

// Hooked says whether somebody calls Look whenever keys come or go. Then polls are only for what was
// missed.
func (w *Watcher) Hooked(on bool) { w.hooked.Store(on) }

const (
	minRetry = 100 * time.Millisecond
	maxRetry = 30 * time.Second
	// restFactor is how many times as long as a look took the next poll waits at least, lookFactor
	// the same for Look, and minRest the least for that.
	restFactor = 50
	lookFactor = 10
	minRest    = 50 * time.Millisecond
	// secondLook is how long after Look there is another one: most keys are set ahead of listen(2) or connect(2),
	// and until then the kernel doesn't show the socket.
	secondLook = time.Second
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
	first, lost, asked := true, false, thorough
	wait := minRetry
	for {
		keys, took, err := w.timed(told.Keys, asked == thorough || first || lost)
		ended := time.Now()
		w.stats.total.Add(int64(took))
		w.stats.last.Store(int64(took))
		rest := rest{poll: max(w.every(), restFactor*took), soon: max(minRest, restFactor*took), now: max(minRest, lookFactor*took)}
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
			rest.poll = wait
			wait = min(2*wait, maxRetry)
		default:
			w.stats.dumps.Add(1)
			if first || lost || !told.same(keys) {
				w.stats.told.Add(1)
				tell := keys
				tell.Keys = slices.Clone(keys.Keys)
				sink([]Event{tell})
			}
			told, first, lost, wait = keys, false, false, minRetry
			if asked == now {
				rest.poll = min(rest.poll, max(secondLook, rest.soon))
			}
		}
		if asked, err = w.wait(ctx, ended, rest); err != nil {
			return err
		}
	}
}

// same reports whether both say the same.
func (s KeysSet) same(o KeysSet) bool {
	return s.Hidden == o.Hidden && s.Cut == o.Cut && s.Over == o.Over && s.OverOthers == o.OverOthers && slices.Equal(s.Keys, o.Keys)
}

// timed looks, and says how much of a CPU that took: what the kernel does for it, it does in this
// thread.
func (w *Watcher) timed(known []Key, thorough bool) (KeysSet, time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := cpuTime()
	shown := slices.DeleteFunc(slices.Clone(known), func(k Key) bool { return k.Kind != MD5 })
	keys, err := w.look(shown, thorough)
	if err == nil && w.more != nil {
		keys = w.withMore(keys)
	}
	return keys, cpuTime() - began, err
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

// withMore adds the keys that sock_diag doesn't show.
func (w *Watcher) withMore(set KeysSet) KeysSet {
	if extra, cut, err := w.more(); err == nil {
		c := newCollector(w.trust(), w.extra)
		c.take(extra)
		extra = c.set()
		if cut > 0 {
			extra = c.keep(extra, w.extra)
		}
		w.extra, w.cut, w.extraOver = extra, cut, c.over
	}
	set.Cut = w.cut
	set.Over, set.OverOthers = set.Over || w.extraOver[trusted], set.OverOthers || w.extraOver[other]
	if len(w.extra) > 0 {
		set.Keys = slices.Concat(set.Keys, w.extra)
		slices.SortFunc(set.Keys, Key.Compare)
		set.Keys = slices.Compact(set.Keys)
	}
	return set
}

// rest is how long after a look the next one comes at the earliest, or, for poll, without being asked for.
type rest struct{ poll, soon, now time.Duration }

// of is how long a look waits that is asked for.
func (r rest) of(u urgency) time.Duration {
	if u == soon {
		return min(r.soon, r.poll)
	}
	return min(r.now, r.poll)
}

// wait waits until the next look is due, and returns how it was asked for, 0 for not at all.
func (w *Watcher) wait(ctx context.Context, from time.Time, r rest) (asked urgency, err error) {
	timer := time.NewTimer(time.Until(from.Add(r.poll)))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return asked, context.Cause(ctx)
		case <-timer.C:
			select {
			case u := <-w.again: // is one with this
				asked = max(asked, u)
			default:
			}
			return asked, nil
		case u := <-w.again:
			asked = max(asked, u)
			timer.Reset(time.Until(from.Add(r.of(asked))))
		}
	}
}
