package sockbpf

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// patience ends a test that waits in vain.
const patience = time.Minute

// md5Ways are the ways to see MD5 keys, by the first function of each.
var md5Ways = []string{"tcp_md5_do_add", "tcp_v4_parse_md5_keys"}

// openHookBy opens the hook so that it sees MD5 keys by one of these functions and those that go with it, and no socket's state.
func openHookBy(t testing.TB, functions ...string) *Hook {
	t.Helper()
	left := append([]string{stateTracepoint}, md5Ways...)
	h, err := openHook(func(f string) bool { return slices.Contains(functions, f) || !slices.Contains(left, f) })
	if errors.Is(err, ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		t.Skipf("needs a kernel that traces functions (fexit), and CAP_BPF and CAP_PERFMON: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	if !h.Watches(sockopt.MD5) {
		t.Skipf("needs a kernel in which one of %v can be traced", functions)
	}
	t.Logf("traced: %s", strings.Join(h.Functions(), ", "))
	return h
}

// events runs the hook and delivers this namespace's events.
func events(t testing.TB, h *Hook) <-chan KeyEvent {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ch, done := make(chan KeyEvent, 1000), make(chan error, 1)
	go func() {
		done <- h.Run(ctx, func(drain []KeyEvent) {
			for _, e := range drain {
				if uint64(e.Netns) == st.Ino || e.Op == Lost {
					select {
					case ch <- e:
					case <-ctx.Done():
					}
				}
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return ch
}

func next(t testing.TB, ch <-chan KeyEvent) KeyEvent {
	t.Helper()
	select {
	case e := <-ch:
		return e
	case <-time.After(patience):
		t.Fatal("no event")
		return KeyEvent{}
	}
}

// expect takes the next event, which must be this one but for the namespace and the cookie.
func expect(t testing.TB, ch <-chan KeyEvent, op Op, peer string, port uint16) {
	t.Helper()
	e := next(t, ch)
	want := KeyEvent{Op: op, Kind: sockopt.MD5, Netns: e.Netns, Cookie: e.Cookie, Port: port}
	if peer != "" {
		want.Peer = netip.MustParsePrefix(peer)
	}
	if e != want {
		t.Errorf("%+v, want %+v", e, want)
	}
}

// TestHookSeesKeys sets and deletes keys in each family, by each way to see it.
func TestHookSeesKeys(t *testing.T) {
	for _, function := range md5Ways {
		t.Run(function, func(t *testing.T) {
			enterNS(t, "fd00::1/128", "fd00:2::2/128")
			h := openHookBy(t, function)
			ch := events(t, h)
			for _, w := range worlds() {
				keySteps(t, w, h, ch)
			}
		})
	}
}

func keySteps(t *testing.T, w world, h *Hook, ch <-chan KeyEvent) {
	t.Helper()
	traced := func(f string) bool { return slices.Contains(h.Functions(), f) }
	peer := netip.PrefixFrom(w.signedPrefix.Addr().Unmap(), w.signedPrefix.Bits()).String()
	back := netip.PrefixFrom(w.serverPrefix.Addr().Unmap(), w.serverPrefix.Bits()).String()
	listener := newSocket(t, netip.AddrPortFrom(w.server, 0))
	port := listener.local(t).Port()

	listener.sign(t, w.signedPrefix, secret)
	expect(t, ch, Added, peer, port)
	listener.sign(t, w.signedPrefix, "")
	expect(t, ch, Deleted, peer, port)
	// What fails is no event: the next one is the next deed's.
	if err := listener.trySign(w.signedPrefix, ""); !errors.Is(err, unix.ENOENT) {
		t.Fatalf("delete again: %v", err)
	}
	listener.sign(t, w.signedPrefix, secret)
	expect(t, ch, Added, peer, port)
	listener.sign(t, w.signedPrefix, secret+"2")
	expect(t, ch, Added, peer, port)
	listener.sign(t, w.signedPrefix, secret)
	expect(t, ch, Added, peer, port)
	listener.listen(t)

	client := newSocket(t, netip.AddrPortFrom(w.signed, 0))
	client.sign(t, w.serverPrefix, secret)
	expect(t, ch, Added, back, client.local(t).Port())
	end := client.connect(t, listener, listener.local(t))
	host := netip.PrefixFrom(w.signed.Unmap(), w.signed.Unmap().BitLen()).String()
	switch {
	case traced("tcp_md5_key_copy"):
		expect(t, ch, Inherited, host, port)
	case traced("tcp_md5_do_add"): // before 6.2 an accepted connection's key is added as others are
		expect(t, ch, Added, host, port)
	}
	if traced("tcp_clear_md5_list") {
		for _, s := range []socket{listener, client, end} {
			port := s.local(t).Port()
			// The end of a connection with a reset: nothing of it lingers.
			if err := unix.SetsockoptLinger(int(s), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
				t.Fatal(err)
			}
			_ = unix.Close(int(s))
			expect(t, ch, Cleared, "", port)
		}
	}
}

// TestHookSeesVRF has a key that is bound to a VRF.
func TestHookSeesVRF(t *testing.T) {
	enterNS(t)
	h := openHookBy(t, md5Ways...)
	vrf := &vnl.Vrf{LinkAttrs: vnl.LinkAttrs{Name: "blue"}, Table: 5450}
	if err := vnl.LinkAdd(vrf); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("needs a kernel with VRF")
	} else if err != nil {
		t.Fatal(err)
	}
	ch := events(t, h)
	s := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
	for _, op := range []struct {
		op  Op
		key string
	}{{Added, secret}, {Deleted, ""}} {
		sig := md5sig(netip.MustParsePrefix("192.0.2.0/24"), op.key)
		sig.Flags |= 2 // TCP_MD5SIG_FLAG_IFINDEX
		sig.Ifindex = int32(vrf.Attrs().Index)
		if err := unix.SetsockoptTCPMD5Sig(int(s), unix.IPPROTO_TCP, tcpMD5SigExt, &sig); err != nil {
			t.Fatal(err)
		}
		if e := next(t, ch); e.Op != op.op || e.Ifindex != sig.Ifindex || e.Peer.String() != "192.0.2.0/24" {
			t.Errorf("%+v, want %s with ifindex %d", e, op.op, sig.Ifindex)
		}
	}
}

// makeRing is a hook with a ring to which nobody writes.
func makeRing(t *testing.T) *Hook {
	t.Helper()
	spec, err := loadKeys()
	if err != nil {
		t.Fatal(err)
	}
	h := &Hook{}
	t.Cleanup(func() { _ = h.Close() })
	if err := h.openRing(spec); errors.Is(err, os.ErrPermission) {
		t.Skipf("needs CAP_BPF and CAP_PERFMON: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestRunEndsWithItsContext needs no function that can be traced: there is a ring, and nobody who writes to it.
func TestRunEndsWithItsContext(t *testing.T) {
	openIter(t) // skips without the capabilities
	h := makeRing(t)
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- h.Run(ctx, func(e []KeyEvent) { t.Errorf("%+v", e) }) }()
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("it runs on")
		}
	}
}

// TestHookTellsWhatIsLost fills the ring while nobody reads.
func TestHookTellsWhatIsLost(t *testing.T) {
	enterNS(t)
	h := openHookBy(t, md5Ways...)
	s := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
	peer := netip.MustParsePrefix("127.0.0.2/32")
	const sets = 8000
	for range sets {
		s.sign(t, peer, secret)
	}
	ch := events(t, h)
	var seen, lost uint64
	for seen+lost < sets {
		if e := next(t, ch); e.Op == Lost {
			lost += e.Missing
		} else {
			seen++
		}
	}
	if seen+lost != sets || lost == 0 || seen == 0 {
		t.Errorf("%d seen and %d lost of %d", seen, lost, sets)
	}
	s.sign(t, peer, "")
	expect(t, ch, Deleted, "127.0.0.2/32", s.local(t).Port())
}

// TestNoKeyInEvents searches the ring's bytes for the key, by each way to see it.
func TestNoKeyInEvents(t *testing.T) {
	for _, function := range md5Ways {
		t.Run(function, func(t *testing.T) {
			enterNS(t, "fd00::1/128", "fd00:2::2/128")
			h := openHookBy(t, function)
			for _, w := range worlds() {
				newSocket(t, netip.AddrPortFrom(w.server, 0)).sign(t, w.signedPrefix, secret)
			}
			for range worlds() {
				record, err := h.reader.Read()
				if err != nil {
					t.Fatal(err)
				}
				for i := range len(secret) - 4 {
					if bytes.Contains(record.RawSample, []byte(secret[i:i+4])) {
						t.Fatalf("a part of the key is in the event: %x", record.RawSample)
					}
				}
			}
		})
	}
}

// TestHookCapabilities opens the hook on threads with some capabilities and no others.
func TestHookCapabilities(t *testing.T) {
	unprivileged := func(caps ...uint) error {
		return withCapabilities(t, caps, func() error {
			h, err := OpenHook()
			if err != nil {
				return err
			}
			return h.Close()
		})
	}
	for want, caps := range map[string][]uint{
		"CAP_BPF is missing":                  {unix.CAP_PERFMON},
		"CAP_PERFMON is missing":              {unix.CAP_BPF},
		"CAP_BPF and CAP_PERFMON are missing": nil,
	} {
		err := unprivileged(caps...)
		if errors.Is(err, ErrUnsupported) {
			t.Skip(err)
		}
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("with %v: %v, want one line with %q", caps, err, want)
		}
	}
	openHookBy(t, md5Ways...)
	if err := unprivileged(unix.CAP_BPF, unix.CAP_PERFMON); err != nil {
		t.Errorf("with both: %v", err)
	}
}

// BenchmarkSetKey is setsockopt(TCP_MD5SIG_EXT) with the hook and without. Each event is read.
func BenchmarkSetKey(b *testing.B) {
	set := func(b *testing.B) {
		s := newSocket(b, netip.MustParseAddrPort("127.0.0.1:0"))
		peer := netip.MustParsePrefix("127.0.0.2/32")
		s.sign(b, peer, secret)
		for b.Loop() {
			if err := s.trySign(peer, secret); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("without", func(b *testing.B) {
		enterNS(b)
		set(b)
	})
	for _, function := range md5Ways {
		b.Run(function, func(b *testing.B) {
			enterNS(b)
			h := openHookBy(b, function)
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error, 1)
			go func() { done <- h.Run(ctx, func([]KeyEvent) {}) }()
			set(b)
			cancel()
			if err := <-done; err != nil {
				b.Error(err)
			}
		})
	}
}
