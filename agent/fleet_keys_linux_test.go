package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
	"tsoagent/sockopt"
	"tsoagent/sockopt/sockbpf"
)

// signedIn opens a listener in a namespace with a key for a peer. The function that is returned closes it.
func signedIn(t *testing.T, name, at, peer string) func() {
	t.Helper()
	ns, err := netns.Open(netns.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var l net.Listener
	err = ns.Do(func() (err error) {
		cfg := net.ListenConfig{}
		cfg.SetMultipathTCP(false) // Go's default, and refuses keys
		l, err = cfg.Listen(t.Context(), "tcp", at)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	signFor(t, raw, netip.MustParseAddr(peer))
	return func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

// keysIn are the peers of the keys that a namespace's report has.
func (s *sailing) keysIn(name string) []string {
	s.t.Helper()
	r := s.report(name)
	if r == nil {
		return nil
	}
	var out []string
	for _, c := range r.Coverages {
		if c.Key != "" {
			out = append(out, c.Dst)
		}
	}
	return out
}

// report is the newest report of a namespace, nil for none.
func (s *sailing) report(name string) *Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.members {
		if slices.Contains(m.names, name) && m.agent != nil {
			return m.agent.Report()
		}
	}
	return nil
}

// TestKeysAreSeenAtOnce sets and deletes keys in two namespaces, where they are polled once an hour: only the kernel's
// key functions can tell.
func TestKeysAreSeenAtOnce(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	h, err := sockbpf.OpenHook()
	if err != nil {
		t.Skipf("the kernel's key functions can't be traced: %v", err)
	}
	_ = h.Close()
	named(t, "one", "two")
	cfg := fleetConfig(t, "one", "two")
	cfg.TCPKeysEvery = Duration(time.Hour)
	s := sail(t, cfg)
	for _, ns := range []string{"one", "two"} {
		netnstest.Within(t, "the hook in "+ns, func() bool {
			r := s.report(ns)
			return r != nil && slices.ContainsFunc(r.Sources, func(src SourceReport) bool { return src.Source == "sockopt" && src.Dumps > 0 })
		})
	}
	netnstest.Within(t, "the hook", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.hooked.on() })
	has := func(ns string, want ...string) {
		t.Helper()
		netnstest.Within(t, ns+" has the keys "+strings.Join(want, ", "), func() bool { return slices.Equal(s.keysIn(ns), want) })
	}
	close4 := signedIn(t, "one", "192.0.2.1:179", "192.0.2.9")
	has("one", "192.0.2.9/32")
	has("two")
	close6 := signedIn(t, "two", "[::1]:179", "fd00::9")
	has("two", "fd00::9/128")
	has("one", "192.0.2.9/32")
	close4()
	has("one")
	close6()
	has("two")
}

// noHook can't be opened.
func noHook() (keyHook, error) { return nil, errors.New("no tracing here") }

// brokenHook ends at once.
type brokenHook struct{}

func (brokenHook) Close() error              { return nil }
func (brokenHook) Functions() []string       { return []string{"tcp_md5_do_add"} }
func (brokenHook) Watches(sockopt.Kind) bool { return false }
func (brokenHook) Run(context.Context, func(sockbpf.KeyEvent)) error {
	return errors.New("the ring is gone")
}

// TestKeysArePolledWithoutAHook still sees keys where functions can't be traced, or not any more, and says why.
func TestKeysArePolledWithoutAHook(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	for _, tt := range []struct {
		ns, why string
		open    func() (keyHook, error)
	}{
		{"none", "no tracing here", noHook},
		{"broken", "the ring is gone", func() (keyHook, error) { return brokenHook{}, nil }},
	} {
		named(t, tt.ns)
		cfg := fleetConfig(t, tt.ns)
		cfg.TCPKeysEvery = Duration(100 * time.Millisecond)
		s := sailBy(t, cfg, func(f *Fleet) { f.openHook = tt.open })
		signedIn(t, tt.ns, "192.0.2.1:179", "192.0.2.9")
		netnstest.Within(t, "the key, by a poll", func() bool { return slices.Equal(s.keysIn(tt.ns), []string{"192.0.2.9/32"}) })
		netnstest.Within(t, "the reason", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return !s.hooked.on() && s.hooked.why == tt.why
		})
		netnstest.Within(t, "looks that find nothing new in the counters, without a report", func() bool {
			list := s.Observations()
			return len(list) == 1 && looks(list[0].Report) > looks(s.report(tt.ns))+2
		})
		s.stop()
	}
}

// looks are how often the keys were looked at.
func looks(r *Report) uint64 {
	i := slices.IndexFunc(r.Sources, func(s SourceReport) bool { return s.Source == "sockopt" })
	if i < 0 {
		return 0
	}
	return r.Sources[i].Dumps
}

// aoHook sees a TCP-AO key once told to.
type aoHook struct {
	events chan sockbpf.KeyEvent
}

func (aoHook) Close() error              { return nil }
func (aoHook) Functions() []string       { return []string{"tcp_parse_ao"} }
func (aoHook) Watches(sockopt.Kind) bool { return true }
func (h aoHook) Run(ctx context.Context, fn func(sockbpf.KeyEvent)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-h.events:
			fn(ev)
		}
	}
}

// aoList is what sockets hold.
type aoList struct {
	mu   sync.Mutex
	keys []sockopt.Key
	cut  int
}

func (*aoList) Close() error { return nil }

func (l *aoList) Keys() ([]sockopt.Key, int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.keys), l.cut, nil
}

// TestAOKeysAreListed shows TCP-AO keys, which sock_diag doesn't, beside TCP-MD5's once the hook says that one was set. No kernel at hand has
// TCP-AO and lets its functions be traced.
func TestAOKeysAreListed(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	named(t, "one")
	cfg := fleetConfig(t, "one")
	cfg.TCPKeysEvery = Duration(time.Hour)
	hook, list := aoHook{events: make(chan sockbpf.KeyEvent)}, &aoList{}
	s := sailBy(t, cfg, func(f *Fleet) {
		f.openHook = func() (keyHook, error) { return hook, nil }
		f.openAO = func() (keyLister, error) { return list, nil }
	})
	signedIn(t, "one", "192.0.2.1:179", "192.0.2.9")
	s.state("one", NetnsFollowed)
	list.mu.Lock()
	list.keys = []sockopt.Key{{Kind: sockopt.AO, Peer: netip.MustParsePrefix("192.0.2.10/32"), Port: 180, Listener: true}}
	list.mu.Unlock()
	id, err := netns.Stat(netns.Path("one"))
	if err != nil {
		t.Fatal(err)
	}
	// The agent may not be there yet when the first comes.
	netnstest.Within(t, "both keys", func() bool {
		hook.events <- sockbpf.KeyEvent{Op: sockbpf.Added, Kind: sockopt.AO, Netns: uint32(id.Ino)}
		return slices.Equal(s.keysIn("one"), []string{"192.0.2.9/32", "192.0.2.10/32"})
	})
	for _, c := range s.report("one").Coverages {
		if want := map[string]string{"192.0.2.9/32": "tcp-md5", "192.0.2.10/32": "tcp-ao"}[c.Dst]; c.Key != want {
			t.Errorf("%s is a %q key, want %q", c.Dst, c.Key, want)
		}
	}
	list.mu.Lock()
	list.keys = nil
	list.mu.Unlock()
	hook.events <- sockbpf.KeyEvent{Op: sockbpf.Deleted, Kind: sockopt.AO, Netns: uint32(id.Ino)}
	netnstest.Within(t, "the MD5 key alone", func() bool { return slices.Equal(s.keysIn("one"), []string{"192.0.2.9/32"}) })
}

// failingHook sees TCP-AO keys until it is told to fail.
type failingHook struct {
	aoHook
	fail chan struct{}
}

func (h failingHook) Run(ctx context.Context, _ func(sockbpf.KeyEvent)) error {
	select {
	case <-ctx.Done():
		return nil
	case <-h.fail:
		return errors.New("the ring is gone")
	}
}

// TestAOKeysStayWithoutTheHook goes on to list TCP-AO keys when nothing tells of them any more: keys that are not
// looked for are not gone.
func TestAOKeysStayWithoutTheHook(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	named(t, "one")
	cfg := fleetConfig(t, "one")
	cfg.TCPKeysEvery = Duration(100 * time.Millisecond)
	ao := func(n byte) sockopt.Key {
		return sockopt.Key{Kind: sockopt.AO, Peer: netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 32), Port: 180, Listener: true}
	}
	hook, list := failingHook{fail: make(chan struct{})}, &aoList{keys: []sockopt.Key{ao(10)}}
	s := sailBy(t, cfg, func(f *Fleet) {
		f.openHook = func() (keyHook, error) { return hook, nil }
		f.openAO = func() (keyLister, error) { return list, nil }
	})
	netnstest.Within(t, "the key", func() bool { return slices.Equal(s.keysIn("one"), []string{"192.0.2.10/32"}) })
	close(hook.fail)
	netnstest.Within(t, "the end of the hook", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return !s.hooked.on() && s.hooked.why == "the ring is gone"
	})
	list.mu.Lock()
	list.keys = []sockopt.Key{ao(10), ao(11)}
	list.mu.Unlock()
	netnstest.Within(t, "both keys, by a poll", func() bool { return slices.Equal(s.keysIn("one"), []string{"192.0.2.10/32", "192.0.2.11/32"}) })
}

// heldAsAO lists the kernel's TCP-MD5 keys as TCP-AO's, which no kernel at hand with BPF has: the program that lists them is the same.
type heldAsAO struct{ *sockbpf.HeldIter }

func (l heldAsAO) Keys() ([]sockopt.Key, int, error) {
	keys, cut, err := l.HeldIter.Keys()
	for i := range keys {
		keys[i].Kind = sockopt.AO
	}
	return keys, cut, err
}

// TestAOKeysArePolledWithoutAHook lists TCP-AO keys where the kernel's functions can't be traced, and where those of TCP-AO alone can't.
func TestAOKeysArePolledWithoutAHook(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	it, err := sockbpf.OpenHeld(true)
	if err != nil {
		t.Skipf("needs the BPF iterator over TCP sockets: %v", err)
	}
	_ = it.Close()
	for ns, open := range map[string]func() (keyHook, error){
		"none": noHook,
		"md5":  func() (keyHook, error) { return md5Hook{}, nil },
	} {
		named(t, ns)
		cfg := fleetConfig(t, ns)
		cfg.TCPKeysEvery = Duration(100 * time.Millisecond)
		s := sailBy(t, cfg, func(f *Fleet) {
			f.openHook = open
			f.openAO = func() (keyLister, error) {
				it, err := sockbpf.OpenHeld(true)
				return heldAsAO{it}, err
			}
		})
		s.state(ns, NetnsFollowed)
		kinds := func() (out []string) {
			if r := s.report(ns); r != nil {
				for _, c := range r.Coverages {
					out = append(out, c.Key+" "+c.Dst)
				}
			}
			return out
		}
		closeIt := signedIn(t, ns, "192.0.2.1:179", "192.0.2.9")
		netnstest.Within(t, "the key of both kinds", func() bool { return slices.Equal(kinds(), []string{"tcp-md5 192.0.2.9/32", "tcp-ao 192.0.2.9/32"}) })
		closeIt()
		netnstest.Within(t, "no key", func() bool { return len(kinds()) == 0 && s.report(ns) != nil })
		s.stop()
	}
}

// md5Hook watches all of TCP-MD5, and nothing of TCP-AO. Nothing ever happens.
type md5Hook struct{}

func (md5Hook) Close() error { return nil }
func (md5Hook) Functions() []string {
	return []string{"tcp_md5_do_add", "tcp_md5_do_del", "tcp_clear_md5_list"}
}
func (md5Hook) Watches(k sockopt.Kind) bool { return k == sockopt.MD5 }
func (md5Hook) Run(ctx context.Context, _ func(sockbpf.KeyEvent)) error {
	<-ctx.Done()
	return nil
}

// TestCutAOKeysAreAFinding says that not all TCP-AO keys of a socket are told, and keeps those that were.
func TestCutAOKeysAreAFinding(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	named(t, "one")
	cfg := fleetConfig(t, "one")
	cfg.TCPKeysEvery = Duration(100 * time.Millisecond)
	ao := func(n byte) sockopt.Key {
		return sockopt.Key{Kind: sockopt.AO, Peer: netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 32), Port: 180, Listener: true}
	}
	list := &aoList{keys: []sockopt.Key{ao(10), ao(11)}}
	set := func(cut int, keys ...sockopt.Key) {
		list.mu.Lock()
		defer list.mu.Unlock()
		list.keys, list.cut = keys, cut
	}
	s := sailBy(t, cfg, func(f *Fleet) {
		f.openHook = noHook
		f.openAO = func() (keyLister, error) { return list, nil }
	})
	has := func(cut bool, peers ...string) {
		t.Helper()
		netnstest.Within(t, strings.Join(peers, ", "), func() bool {
			r := s.report("one")
			return r != nil && slices.Equal(s.keysIn("one"), peers) && cut == slices.ContainsFunc(r.Findings, func(f string) bool {
				return strings.Contains(f, "1 of the sockets hold more TCP-AO keys than are listed of one (300)")
			})
		})
	}
	has(false, "192.0.2.10/32", "192.0.2.11/32")
	set(1, ao(11), ao(12))
	has(true, "192.0.2.10/32", "192.0.2.11/32", "192.0.2.12/32")
	set(0, ao(12))
	has(false, "192.0.2.12/32")
}
