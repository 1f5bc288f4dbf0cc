package sockbpf

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// openStates opens the hook so that it sees nothing but the state of sockets that hold keys, as where no function can be traced.
func openStates(t testing.TB) *Hook {
	t.Helper()
	openIter(t) // skips without the capabilities
	h, err := openHook(func(f string) bool { return f == stateTracepoint })
	if errors.Is(err, ErrUnsupported) {
		t.Skipf("needs a kernel with TCP-MD5 or TCP-AO and the tracepoint %s: %v", stateTracepoint, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	if !h.WatchesSockets() || h.Watches(sockopt.MD5) || h.Watches(sockopt.AO) || !errors.Is(h.Refused(), ErrUnsupported) {
		t.Errorf("it follows %v, and refused is %v", h.Functions(), h.Refused())
	}
	return h
}

// reset has a connection end with a reset when it is closed, so that nothing of it lingers.
func (s socket) reset(t testing.TB) {
	t.Helper()
	if err := unix.SetsockoptLinger(int(s), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		t.Fatal(err)
	}
}

func (s socket) close(t testing.TB) {
	t.Helper()
	if err := unix.Close(int(s)); err != nil {
		t.Fatal(err)
	}
}

// TestSocketsWithKeysAreSeenWhenTheyStart has keys that are set ahead of listen(2) and connect(2), in each family. The next event is the next
// deed's: nothing is told of sockets without keys, nor of those that never were in a table.
func TestSocketsWithKeysAreSeenWhenTheyStart(t *testing.T) {
	for _, w := range worlds() {
		t.Run(w.name, func(t *testing.T) {
			enterNS(t, w.addrs...)
			ch := events(t, openStates(t))
			plain := newSocket(t, netip.AddrPortFrom(w.server, 0)).listen(t)
			newSocket(t, netip.AddrPortFrom(w.client, 0)).connect(t, plain, plain.local(t)).close(t)

			never := newSocket(t, netip.AddrPortFrom(w.server, 0))
			never.sign(t, w.signedPrefix, secret)
			never.close(t)

			listener := newSocket(t, netip.AddrPortFrom(w.server, 0))
			port := listener.local(t).Port()
			listener.sign(t, w.signedPrefix, secret)
			listener.listen(t)
			expect(t, ch, Started, "", port)

			client := newSocket(t, netip.AddrPortFrom(w.signed, 0))
			clientPort := client.local(t).Port()
			client.sign(t, w.serverPrefix, secret)
			end := client.connect(t, listener, listener.local(t))
			expect(t, ch, Started, "", clientPort)
			expect(t, ch, Connected, "", clientPort)
			expect(t, ch, Inherited, "", port)

			client.reset(t)
			client.close(t)
			expect(t, ch, Cleared, "", clientPort)
			expect(t, ch, Cleared, "", port) // the accepted end, by the reset
			end.close(t)

			// A listener whose last key is gone holds none.
			listener.sign(t, w.signedPrefix, "")
			listener.close(t)
			last := newSocket(t, netip.AddrPortFrom(w.server, 0))
			last.sign(t, w.signedPrefix, secret)
			last.listen(t)
			expect(t, ch, Started, "", last.local(t).Port())
			lastPort := last.local(t).Port()
			last.close(t)
			expect(t, ch, Cleared, "", lastPort)
		})
	}
}

// drains runs the hook until it has told n events of this namespace, or that some are missing, and returns what it told each time.
func drains(t *testing.T, h *Hook, n int) (told [][]KeyEvent) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := h.Run(ctx, func(events []KeyEvent) {
		told = append(told, slices.Clone(events))
		for _, e := range events {
			if uint64(e.Netns) == st.Ino {
				n--
			} else if e.Op == Lost {
				n -= int(e.Missing)
			}
		}
		if n <= 0 {
			cancel()
		}
	}); err != nil {
		t.Fatal(err)
	}
	if n > 0 {
		t.Fatalf("%d events are not told", n)
	}
	return told
}

// starts has a socket with a key listen, and not any more, which are two events, again and again.
func starts(t *testing.T, times int) {
	t.Helper()
	s := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
	s.sign(t, netip.MustParsePrefix("127.0.0.2/32"), secret)
	for range times {
		if err := unix.Shutdown(int(s.listen(t)), unix.SHUT_RDWR); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWhatIsThereIsToldAtOnce has more events than are told at once, and not too many for the ring, while nobody reads.
func TestWhatIsThereIsToldAtOnce(t *testing.T) {
	enterNS(t)
	h := openStates(t)
	starts(t, maxDrain/2+100)
	told := drains(t, h, maxDrain+200)
	if len(told[0]) != maxDrain || len(told[1]) < 200 || slices.ContainsFunc(slices.Concat(told...), func(e KeyEvent) bool { return e.Op == Lost }) {
		t.Errorf("told in %d goes, the first of %d, want %d, and the rest in the next", len(told), len(told[0]), maxDrain)
	}
}

// TestStatesThatAreMissingAreCounted has more events than the ring holds while nobody reads.
func TestStatesThatAreMissingAreCounted(t *testing.T) {
	enterNS(t)
	h := openStates(t)
	const n = 8000
	starts(t, n/2)
	var seen, missing uint64
	for _, e := range slices.Concat(drains(t, h, n)...) {
		if e.Op == Lost {
			missing += e.Missing
		} else {
			seen++
		}
	}
	if seen == 0 || missing == 0 || missing >= n {
		t.Errorf("%d seen and %d missing of %d", seen, missing, n)
	}
	// What was told is not told again.
	starts(t, 1)
	if last := slices.Concat(drains(t, h, 2)...); slices.ContainsFunc(last, func(e KeyEvent) bool { return e.Op == Lost }) {
		t.Errorf("told again: %+v", last)
	}
}

// TestNoKeyInStates searches the ring's bytes for the key.
func TestNoKeyInStates(t *testing.T) {
	enterNS(t)
	h := openStates(t)
	s := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
	s.sign(t, netip.MustParsePrefix("127.0.0.2/32"), secret)
	s.listen(t)
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

// TestRefusedFunctionsAreNoEnd opens the hook with all that the kernel gives: one whose functions can't be traced says why, and still tells of
// sockets.
func TestRefusedFunctionsAreNoEnd(t *testing.T) {
	openStates(t) // skips where there is nothing to see
	h, err := OpenHook()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if !h.WatchesSockets() {
		t.Errorf("it follows %v only", h.Functions())
	}
	switch err := h.Refused(); {
	case h.Watches(sockopt.MD5) || h.Watches(sockopt.AO):
		if err != nil {
			t.Errorf("%v, and functions are traced: %v", err, h.Functions())
		}
	case !errors.Is(err, os.ErrPermission) && !errors.Is(err, ErrUnsupported), strings.Contains(err.Error(), "\n"):
		t.Errorf("%v, want one line that says why %v is all", err, h.Functions())
	}
}

// TestHoldsKeys has kernels whose sockets can hold keys, and one whose can't.
func TestHoldsKeys(t *testing.T) {
	number := &btf.Int{Name: "int", Size: 4}
	for member, want := range map[string]bool{"md5sig_info": true, "ao_info": true, "mss_cache": false} {
		b, err := btf.NewBuilder([]btf.Type{&btf.Struct{Name: "tcp_sock", Size: 4, Members: []btf.Member{{Name: member, Type: number}}}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := b.Marshal(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		types, err := btf.LoadSpecFromReader(bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		if got := holdsKeys(types); got != want {
			t.Errorf("with %s: %v", member, got)
		}
	}
}

// TestKernelTypesAreReadOnce compares what it takes to load all programs with what it takes to load one: the kernel's types are most of it.
func TestKernelTypesAreReadOnce(t *testing.T) {
	openStates(t)
	allocated := func(f func() (io.Closer, error)) uint64 {
		t.Helper()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		c, err := f()
		runtime.ReadMemStats(&after)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		return after.TotalAlloc - before.TotalAlloc
	}
	types := allocated(func() (io.Closer, error) {
		_, err := readKernel()
		return closer(func() {}), err
	})
	one := allocated(func() (io.Closer, error) { return openHook(func(f string) bool { return f == stateTracepoint }) })
	all := allocated(func() (io.Closer, error) { return OpenHook() })
	if t.Logf("types %d, one program %d, all %d bytes", types, one, all); one < types || all > one+2*types {
		t.Errorf("types %d, one program %d, all %d bytes: they are read again", types, one, all)
	}
}

// BenchmarkConnect is a connection over the loopback from its start to its end, without keys, with the hook and without.
func BenchmarkConnect(b *testing.B) {
	connect := func(b *testing.B) {
		enterNS(b)
		listener := newSocket(b, netip.MustParseAddrPort("127.0.0.1:0")).listen(b)
		to := sockaddr(listener.local(b))
		for b.Loop() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			socket(fd).reset(b)
			if err := unix.Connect(fd, to); err != nil {
				b.Fatal(err)
			}
			end, _, err := unix.Accept4(int(listener), unix.SOCK_CLOEXEC)
			if err != nil {
				b.Fatal(err)
			}
			socket(fd).close(b)
			socket(end).close(b)
		}
	}
	b.Run("without", connect)
	b.Run("with", func(b *testing.B) {
		openStates(b)
		connect(b)
	})
}
