package xfrmwatch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// kinds names the events, those of the same kind in a row once.
func kinds(events []Event) []string {
	var names []string
	for _, ev := range events {
		names = append(names, strings.TrimPrefix(fmt.Sprintf("%T", ev), "xfrmwatch."))
	}
	return slices.Compact(names)
}

func TestWatcherFollowsPolicies(t *testing.T) {
	newNetns(t)
	r := newRequester(t)
	before := tunnelPolicy(1, IPv4)
	r.addPolicy(before)
	m := newMirror(t, Options{})
	m.fresh()
	if diff := cmp.Diff([]string{"ResyncBegin", "PolicySet", "DefaultSet", "ResyncEnd"}, kinds(m.take())); diff != "" {
		t.Errorf("dump (-want +got):\n%s", diff)
	}
	find := func(ifID uint32) (found *Policy) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for p := range m.db.Policies() {
			if p.IfID == ifID {
				found = p
			}
		}
		return found
	}
	dumped := find(0)
	before.Index = dumped.Index
	if !dumped.Equal(before) {
		t.Errorf("dumped policy (-want +got):\n%s", cmp.Diff(before, dumped, cmpOpts))
	}
	for _, f := range []Family{IPv4, IPv6} {
		p := tunnelPolicy(77, f)
		p.Mark, p.IfID = Mark{4, 0xff}, 9
		p.Selector.Proto, p.Selector.Dport = 6, PortMatch{443, 0xffff}
		r.addPolicy(p)
		count := func(n int) func(*DB) bool { return func(db *DB) bool { return db.PolicyCount() == n } }
		m.wait("an added policy", count(2))
		got := find(9)
		p.Index = got.Index
		if !got.Equal(p) {
			t.Errorf("added policy (-want +got):\n%s", cmp.Diff(p, got, cmpOpts))
		}
		changed := *p
		changed.Priority, changed.Templates, changed.Action = 50, nil, Block
		r.updatePolicy(&changed)
		m.wait("an updated policy", func(db *DB) bool { q, _ := db.Policy(p.Index); return q.Equal(&changed) })
		r.deletePolicy(p, f == IPv4)
		m.wait("a deleted policy", count(1))
		if diff := cmp.Diff([]string{"PolicySet", "PolicyGone"}, kinds(m.take())); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	}
	r.do(msgFlushPolicy, nil)
	m.wait("a flush", func(db *DB) bool { return db.PolicyCount() == 0 })
	if diff := cmp.Diff([]string{"ResyncBegin", "DefaultSet", "ResyncEnd"}, kinds(m.take())); diff != "" {
		t.Errorf("flush (-want +got):\n%s", diff)
	}
	if err := r.try(0x27 /* SETDEFAULT */, []byte{1, 2, 1, 0}); err == nil {
		m.wait("the default", func(db *DB) bool { return db.Default() == Default{In: Block, Out: Block} })
	}
}

func TestResyncIsCoalescedAndChangesNothing(t *testing.T) {
	newNetns(t)
	r := newRequester(t)
	for i := range 100 {
		r.addPolicy(tunnelPolicy(i, IPv6))
	}
	m := newMirror(t, Options{})
	m.fresh()
	m.mu.Lock()
	version, order := m.db.Version(), slices.Collect(m.db.Policies())
	m.mu.Unlock()
	m.take()
	for range 1000 {
		m.w.Resync()
	}
	m.wait("a resync", func(*DB) bool { return slices.Contains(m.seen, Event(ResyncEnd{})) })
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.db.Version() != version || !slices.Equal(order, slices.Collect(m.db.Policies())) {
		t.Error("a resync without a change changed the DB")
	}
	if n := m.w.Stats().Dumps; n > 50 {
		t.Errorf("%d dumps for 1000 requests in a row", n)
	}
}

// A slow reader with a tiny buffer loses events, says so, and ends in the exact state.
func TestOverrunEndsInTheExactState(t *testing.T) {
	newNetns(t)
	r := newRequester(t)
	m := newMirror(t, Options{ReadBuffer: 4096})
	m.fresh()
	m.take()
	m.gate.Lock()
	want := map[string]bool{}
	for i := range 3000 {
		p := tunnelPolicy(i, IPv4)
		r.addPolicy(p)
		if i%3 == 0 {
			r.deletePolicy(p, false)
		} else {
			want[p.Selector.Dst.String()] = true
		}
	}
	m.gate.Unlock()
	m.wait("the exact state", func(db *DB) bool { return !db.Stale() && db.PolicyCount() == len(want) })
	m.mu.Lock()
	for p := range m.db.Policies() {
		if !want[p.Selector.Dst.String()] {
			t.Errorf("unexpected %s", p.Selector.Dst)
		}
	}
	m.mu.Unlock()
	if n := m.w.Stats().Overruns; n == 0 {
		t.Error("no overrun was counted")
	}
	if names := kinds(m.take()); !slices.Contains(names, "Lost") {
		t.Errorf("no Lost in %v", names)
	}
}

// Policies come and go while a dump runs: the result is what the kernel has.
func TestDumpUnderChange(t *testing.T) {
	newNetns(t)
	r := newRequester(t)
	for i := range 2000 {
		r.addPolicy(tunnelPolicy(i, IPv4))
	}
	m := newMirror(t, Options{})
	for i := range 2000 {
		p := tunnelPolicy(i, IPv4)
		switch i % 3 {
		case 0:
			r.deletePolicy(p, false)
		case 1:
			p.Priority = 7
			r.updatePolicy(p)
		}
		if i%100 == 0 {
			m.w.Resync()
		}
	}
	last := tunnelPolicy(1<<20, IPv4)
	r.addPolicy(last)
	m.wait("the last policy", func(db *DB) bool {
		for p := range db.Policies() {
			if p.Selector == last.Selector {
				return !db.Stale()
			}
		}
		return false
	})
	other := newMirror(t, Options{})
	other.fresh()
	m.w.Resync()
	m.mu.Lock()
	defer m.mu.Unlock()
	got, want := slices.Collect(m.db.Policies()), slices.Collect(other.db.Policies())
	if !slices.EqualFunc(got, want, (*Policy).Equal) {
		t.Errorf("%d policies, a fresh dump has %d (or their order differs)", len(got), len(want))
	}
}

func TestStoppingLeaksNothing(t *testing.T) {
	newNetns(t)
	before := runtime.NumGoroutine()
	fds := func() int { d, _ := os.ReadDir("/proc/self/fd"); return len(d) }
	open := fds()
	for range 20 {
		w, err := Dial(Options{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() {
			done <- w.Run(ctx, func(evs []Event) {
				if slices.Contains(evs, Event(ResyncEnd{})) {
					cancel()
				}
			})
		}()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("Run: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("Run did not return")
		}
		w.Resync() // after the end: nothing happens
	}
	w, err := Dial(Options{})
	if err != nil {
		t.Fatal(err)
	}
	started, done := make(chan struct{}, 8), make(chan error)
	go func() { done <- w.Run(context.Background(), func([]Event) { started <- struct{}{} }) }()
	<-started
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-done:
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("Run of a closed watcher: %v, want %v", err, os.ErrClosed)
		}
	case <-time.After(5 * time.Second):
		t.Error("Run did not return after Close")
	}
	for range 100 {
		if runtime.NumGoroutine() <= before {
			break
		}
		runtime.Gosched()
	}
	if n := runtime.NumGoroutine(); n > before {
		t.Errorf("%d goroutines, %d before", n, before)
	}
	if n := fds(); n > open {
		t.Errorf("%d open files, %d before", n, open)
	}
}

func TestWithoutCapabilityTheErrorNamesIt(t *testing.T) {
	if os.Getenv("XFRMWATCH_UNPRIVILEGED") != "" {
		_, err := Dial(Options{})
		fmt.Printf("%v: %v\n", errors.Is(err, unix.EPERM), err)
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to become somebody else")
	}
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer exe.Close()
	cmd := exec.Command("/proc/self/fd/3", "-test.run", "^"+t.Name()+"$")
	cmd.ExtraFiles = []*os.File{exe}
	cmd.Env = append(os.Environ(), "XFRMWATCH_UNPRIVILEGED=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.HasPrefix(string(out), "true: ") || !strings.Contains(string(out), "CAP_NET_ADMIN is missing") {
		t.Errorf("got %s", out)
	}
}

// TestCapturedMessages decodes what this kernel sends, and stores it as fuzz seeds on demand.
func TestCapturedMessages(t *testing.T) {
	newNetns(t)
	r := newRequester(t)
	w, err := Dial(Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	p := tunnelPolicy(1, IPv4)
	p.Mark, p.IfID = Mark{1, 1}, 2
	block := tunnelPolicy(2, IPv6)
	block.Templates, block.Action = nil, Block
	r.addPolicy(p)
	r.updatePolicy(p)
	r.addPolicy(block)
	r.deletePolicy(p, false)
	r.do(msgFlushPolicy, nil)
	_ = r.try(0x27, []byte{2, 2, 2, 0})
	n := 0
	for {
		b, err := w.events.receive(false)
		if errors.Is(err, errEmpty) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := messages(b, func(m message) bool {
			capture(t, m.typ, fmt.Sprintf("event%d", n), m.data)
			n++
			if _, _, err := Decode(m.typ, m.data); err != nil {
				t.Error(err)
			}
			return true
		}); err != nil {
			t.Error(err)
		}
	}
	if n < 5 {
		t.Errorf("%d messages, want 5 or 6", n)
	}
}

func TestUndecodableMessageIsALoss(t *testing.T) {
	good := append([]byte{0, 0, 0, 0, msgNewPolicy, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, wirePolicy(tunnelPolicy(1, IPv4))...)
	put32(good, uint32(len(good)))
	short := slices.Clone(good[:100])
	put32(short, uint32(len(short)))
	alien := []byte{16, 0, 0, 0, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	torn := append(slices.Clone(good), 1, 2, 3)
	for name, datagram := range map[string][]byte{"short": short, "alien": alien, "torn": torn} {
		t.Run(name, func(t *testing.T) {
			var w Watcher
			w.take(good)
			if w.again || len(w.batch) != 1 {
				t.Fatalf("a good message: %v", w.batch)
			}
			w.take(datagram)
			lost, ok := w.batch[len(w.batch)-1].(Lost)
			if !ok || lost.Err == nil || !w.again || w.Stats().Undecodable != 1 {
				t.Errorf("got %v, again %v, %+v", w.batch, w.again, w.Stats())
			}
		})
	}
}
