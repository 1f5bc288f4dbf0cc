package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

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
	var a *Agent
	s.mu.Lock()
	for _, m := range s.members {
		if slices.Contains(m.names, name) {
			a = m.agent
		}
	}
	s.mu.Unlock() // a loop that is asked may wait for it
	if a == nil {
		return nil
	}
	return a.Report()
}

// hookOrSkip is a hook that is closed with the test.
func hookOrSkip(t *testing.T) *sockbpf.Hook {
	t.Helper()
	h, err := sockbpf.OpenHook()
	if err != nil {
		t.Skipf("nothing tells of keys: %v", err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

// TestKeysAreSeenAtOnce sets and deletes keys in two namespaces, where they are polled once an hour: only the kernel's
// key functions can tell.
func TestKeysAreSeenAtOnce(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	if h := hookOrSkip(t); !h.Watches(sockopt.MD5) {
		t.Skipf("the kernel's key functions can't be traced: %v", h.Refused())
	}
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

// keyed makes a socket in a namespace that has a key for a peer, and does nothing else yet.
func keyed(t *testing.T, name, peer string) *os.File {
	t.Helper()
	ns, err := netns.Open(netns.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	family, addr := unix.AF_INET, netip.MustParseAddr(peer)
	if addr.Is6() {
		family = unix.AF_INET6
	}
	var fd int
	err = ns.Do(func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "socket")
	t.Cleanup(func() { _ = f.Close() })
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	signFor(t, raw, addr)
	return f
}

func address(at string) unix.Sockaddr {
	a := netip.MustParseAddrPort(at)
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// statesHook is a hook that doesn't tell of keys that are set, as where no function can be traced.
type statesHook struct{ keyHook }

func (h statesHook) Run(ctx context.Context, fn func([]sockbpf.KeyEvent)) error {
	return h.keyHook.Run(ctx, func(events []sockbpf.KeyEvent) {
		fn(slices.DeleteFunc(events, func(ev sockbpf.KeyEvent) bool { return ev.Op == sockbpf.Added }))
	})
}

// TestKeysAreSeenWhenTheirSocketStarts sets keys long ahead of listen(2) and connect(2), where they are polled once an hour: until then
// no dump shows the socket. Only the change of its state can tell, also where no function is traced.
func TestKeysAreSeenWhenTheirSocketStarts(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	if h := hookOrSkip(t); !h.WatchesSockets() {
		t.Skipf("the kernel doesn't tell of its sockets' states: %v", h.Functions())
	}
	named(t, "one")
	cfg := fleetConfig(t, "one")
	cfg.TCPKeysEvery = Duration(time.Hour)
	followed := make(chan struct{})
	s := sailBy(t, cfg, func(f *Fleet) {
		f.openHook = func() (keyHook, error) {
			<-followed
			h, err := openKeyHook()
			return statesHook{h}, err
		}
	})
	looked := func(n uint64) {
		t.Helper()
		netnstest.Within(t, "a look", func() bool {
			list := s.Observations()
			return len(list) == 1 && looks(list[0].Report) >= n
		})
	}
	// The first look, the one that following asks for, and a second one after that; the hook asks for the same two. Then nothing looks
	// until it is asked to, for an hour.
	looked(3)
	close(followed)
	looked(5)
	for _, tt := range []struct {
		peer     string
		listens  string // where it does, else it connects to the peer, which never answers
		coverage string
	}{
		{"192.0.2.9", "192.0.2.1:179", "192.0.2.9/32"},
		{"fd00::9", "[fd00::1]:179", "fd00::9/128"},
		{"192.0.2.9", "", "192.0.2.9/32"},
		{"fd00::9", "", "fd00::9/128"},
	} {
		socket := keyed(t, "one", tt.peer)
		var err error
		if tt.listens != "" {
			err = errors.Join(unix.Bind(int(socket.Fd()), address(tt.listens)), unix.Listen(int(socket.Fd()), 1))
		} else if err = unix.Connect(int(socket.Fd()), address(netip.AddrPortFrom(netip.MustParseAddr(tt.peer), 179).String())); errors.Is(err, unix.EINPROGRESS) {
			err = nil
		}
		if err != nil {
			t.Fatal(err)
		}
		netnstest.Within(t, "the key", func() bool { return slices.Equal(s.keysIn("one"), []string{tt.coverage}) })
		if c := s.report("one").Coverages[0]; c.Listener != (tt.listens != "") || c.Listener == (c.PeerPort == 179) {
			t.Errorf("%+v", c)
		}
		if err := socket.Close(); err != nil {
			t.Fatal(err)
		}
		netnstest.Within(t, "no key", func() bool { return len(s.keysIn("one")) == 0 })
	}
}

// TestReportSaysWhatIsSeenAtOnce has a kernel whose key functions can't be traced, and one that does all.
func TestReportSaysWhatIsSeenAtOnce(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	for _, tt := range []struct {
		ns   string
		hook fixedHook
		all  bool
		want SourceReport
	}{
		{"states", fixedHook{states: true, refused: errors.New("no\ntracing")}, false, SourceReport{
			Traced: []string{"inet_sock_set_state"},
			Untraced: "sockets that have keys when they begin to listen or to connect are seen at once, other keys by polls, as the kernel's key " +
				"functions are not traced: no; tracing",
		}},
		{"both", fixedHook{states: true, functions: []string{"tcp_md5_do_add"}}, true, SourceReport{Traced: []string{"tcp_md5_do_add", "inet_sock_set_state"}}},
		{"functions", fixedHook{functions: []string{"tcp_md5_do_add"}}, false, SourceReport{Traced: []string{"tcp_md5_do_add"}}},
	} {
		named(t, tt.ns)
		s := sailBy(t, fleetConfig(t, tt.ns), func(f *Fleet) {
			f.openHook = func() (keyHook, error) { return tt.hook, nil }
			f.openAO = func() (keyLister, error) { return nil, sockbpf.ErrUnsupported }
		})
		netnstest.Within(t, "the report", func() bool {
			r := s.report(tt.ns)
			if r == nil {
				return false
			}
			i := slices.IndexFunc(r.Sources, func(s SourceReport) bool { return s.Source == "sockopt" })
			return i >= 0 && slices.Equal(r.Sources[i].Traced, tt.want.Traced) && r.Sources[i].Untraced == tt.want.Untraced
		})
		s.mu.Lock()
		if s.hooked.all != tt.all {
			t.Errorf("%s: all is %v", tt.ns, s.hooked.all)
		}
		s.mu.Unlock()
		s.stop()
	}
}

// TestLooksAreWantedOnce has as many looks as namespaces, however many events there are.
func TestLooksAreWantedOnce(t *testing.T) {
	ev := func(ns uint32, ops ...sockbpf.Op) (list []sockbpf.KeyEvent) {
		for range 1000 {
			for _, op := range ops {
				list = append(list, sockbpf.KeyEvent{Op: op, Netns: ns})
			}
		}
		return list
	}
	events := slices.Concat(
		ev(1, sockbpf.Added), ev(2, sockbpf.Deleted, sockbpf.Cleared), ev(3, sockbpf.Started, sockbpf.Connected), ev(4, sockbpf.Inherited),
		ev(5, sockbpf.Connected), ev(6, sockbpf.Cleared))
	urgent, everywhere := wantedLooks(events)
	want := map[uint64]bool{1: true, 2: true, 3: true, 4: false, 5: false, 6: false}
	if diff := cmp.Diff(want, urgent); diff != "" || everywhere {
		t.Errorf("everywhere %v, (-want +got):\n%s", everywhere, diff)
	}
	if _, everywhere := wantedLooks(append(events, sockbpf.KeyEvent{Op: sockbpf.Lost, Missing: 1})); !everywhere {
		t.Error("what is missing can be anywhere")
	}
}

// batchHook tells what it is given.
type batchHook struct {
	fixedHook
	events chan []sockbpf.KeyEvent
}

func (h batchHook) Run(ctx context.Context, fn func([]sockbpf.KeyEvent)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case events := <-h.events:
			fn(events)
		}
	}
}

// TestManyKeysAreLookedAtOnce sets many keys in one go in one of two namespaces, and counts the looks: one, and the second one of Look.
func TestManyKeysAreLookedAtOnce(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	named(t, "one", "two")
	cfg := fleetConfig(t, "one", "two")
	cfg.TCPKeysEvery = Duration(time.Hour)
	followed, hook := make(chan struct{}), batchHook{events: make(chan []sockbpf.KeyEvent)}
	s := sailBy(t, cfg, func(f *Fleet) {
		f.openHook = func() (keyHook, error) { <-followed; return hook, nil }
	})
	looked := func(one, two uint64) {
		t.Helper()
		netnstest.Within(t, "looks", func() bool {
			list := s.Observations()
			return len(list) == 2 && looks(list[0].Report) >= one && looks(list[1].Report) >= two
		})
		if list := s.Observations(); looks(list[0].Report) != one || looks(list[1].Report) != two {
			t.Errorf("looks: %d and %d, want %d and %d", looks(list[0].Report), looks(list[1].Report), one, two)
		}
	}
	looked(3, 3) // as in TestKeysAreSeenWhenTheirSocketStarts
	close(followed)
	looked(5, 5)
	id, err := netns.Stat(netns.Path("one"))
	if err != nil {
		t.Fatal(err)
	}
	listener := keyed(t, "one", "10.0.0.0")
	raw, err := listener.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var events []sockbpf.KeyEvent
	const keys = 100 // 6.1 refuses more than 150 (net.core.optmem_max)
	for i := range keys {
		signFor(t, raw, netip.AddrFrom4([4]byte{10, 0, byte(i / 256), byte(i)}))
		events = append(events, sockbpf.KeyEvent{Op: sockbpf.Added, Kind: sockopt.MD5, Netns: uint32(id.Ino)})
	}
	if err := errors.Join(unix.Bind(int(listener.Fd()), address("192.0.2.1:179")), unix.Listen(int(listener.Fd()), 1)); err != nil {
		t.Fatal(err)
	}
	hook.events <- events
	looked(7, 5)
	netnstest.Within(t, "all keys", func() bool { return len(s.keysIn("one")) == keys })
}

// fixedHook tells nothing.
type fixedHook struct {
	functions []string
	states    bool
	refused   error
}

func (fixedHook) Close() error { return nil }
func (h fixedHook) Functions() []string {
	if h.states {
		return append(slices.Clone(h.functions), "inet_sock_set_state")
	}
	return h.functions
}
func (h fixedHook) Watches(k sockopt.Kind) bool { return k == sockopt.MD5 && len(h.functions) > 0 }
func (h fixedHook) WatchesSockets() bool        { return h.states }
func (h fixedHook) Refused() error              { return h.refused }
func (fixedHook) Run(ctx context.Context, _ func([]sockbpf.KeyEvent)) error {
	<-ctx.Done()
	return nil
}

// noHook can't be opened.
func noHook() (keyHook, error) { return nil, errors.New("no tracing here") }

// brokenHook ends at once.
type brokenHook struct{}

func (brokenHook) Close() error              { return nil }
func (brokenHook) Functions() []string       { return []string{"tcp_md5_do_add"} }
func (brokenHook) Watches(sockopt.Kind) bool { return false }
func (brokenHook) WatchesSockets() bool      { return false }
func (brokenHook) Refused() error            { return nil }
func (brokenHook) Run(context.Context, func([]sockbpf.KeyEvent)) error {
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
func (aoHook) WatchesSockets() bool      { return false }
func (aoHook) Refused() error            { return nil }
func (h aoHook) Run(ctx context.Context, fn func([]sockbpf.KeyEvent)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-h.events:
			fn([]sockbpf.KeyEvent{ev})
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

func (h failingHook) Run(ctx context.Context, _ func([]sockbpf.KeyEvent)) error {
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
func (md5Hook) WatchesSockets() bool        { return true }
func (md5Hook) Refused() error              { return nil }
func (md5Hook) Run(ctx context.Context, _ func([]sockbpf.KeyEvent)) error {
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
