package sockbpf

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

func openHeld(t testing.TB, md5 bool) *HeldIter {
	t.Helper()
	it, err := OpenHeld(md5)
	if errors.Is(err, ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		t.Skipf("needs a kernel with BPF iterators, and CAP_BPF and CAP_PERFMON: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = it.Close() })
	return it
}

// diagKeys are the keys as sock_diag shows them.
func diagKeys(t *testing.T) []sockopt.Key {
	t.Helper()
	w, err := sockopt.Dial(sockopt.Options{})
	if err != nil {
		t.Skipf("needs sock_diag for TCP with its keys, and CAP_NET_ADMIN: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var keys []sockopt.Key
	err = w.Run(ctx, func(events []sockopt.Event) {
		for _, ev := range events {
			switch ev := ev.(type) {
			case sockopt.KeysSet:
				keys = ev.Keys
			case sockopt.Lost:
				t.Errorf("lost: %v", ev.Err)
			}
		}
		cancel()
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	return keys
}

// TestHeldKeysAreSockDiags compares the keys of listeners, of connections that they accepted and of clients with what sock_diag shows: TCP-MD5's
// are told by the same code as TCP-AO's, of which no kernel at hand has both.
func TestHeldKeysAreSockDiags(t *testing.T) {
	for _, w := range worlds() {
		t.Run(w.name, func(t *testing.T) {
			enterNS(t, w.addrs...)
			it := openHeld(t, true)
			at := func(a netip.Addr) socket { return newSocket(t, netip.AddrPortFrom(a, 0)) }
			open, keyed := at(w.server).listen(t), at(w.server)
			keyed.sign(t, w.signedPrefix, secret)
			keyed.sign(t, w.serverPrefix, secret)
			keyed.listen(t)
			signed := at(w.signed)
			signed.sign(t, w.serverPrefix, secret)
			signed.connect(t, keyed, keyed.local(t))
			at(w.client).connect(t, open, open.local(t))

			got, hidden, err := it.Keys()
			if err != nil || hidden != 0 {
				t.Fatalf("%d hidden, %v", hidden, err)
			}
			want := diagKeys(t)
			if len(want) != 3 { // two of the listener, one of the client
				t.Errorf("sock_diag has %d keys, want 3: %v", len(want), want)
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); diff != "" {
				t.Errorf("(-sock_diag +iterator):\n%s", diff)
			}
			if none, _, err := openAO(t).Keys(); err != nil || len(none) != 0 {
				t.Errorf("TCP-AO keys: %v, %v; there are none", none, err)
			}
		})
	}
}

// TestHeldKeysOwners tells whose the sockets are, as sock_diag does: a user's listener, of which root has accepted a connection, and client.
func TestHeldKeysOwners(t *testing.T) {
	for _, w := range worlds() {
		t.Run(w.name, func(t *testing.T) {
			enterNS(t, w.addrs...)
			it := openHeld(t, true)
			const somebody = 12345
			if err := unix.Setfsuid(somebody); err != nil {
				t.Fatal(err)
			}
			l := newSocket(t, netip.AddrPortFrom(w.server, 0))
			client := newSocket(t, netip.AddrPortFrom(w.signed, 0))
			if err := unix.Setfsuid(0); err != nil {
				t.Fatal(err)
			}
			l.sign(t, w.signedPrefix, secret)
			l.listen(t)
			client.sign(t, w.serverPrefix, secret)
			client.connect(t, l, l.local(t))
			root := newSocket(t, netip.AddrPortFrom(w.server, 0))
			root.sign(t, w.signedPrefix, secret)
			root.listen(t)
			got, _, err := it.Keys()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(diagKeys(t), got, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); diff != "" {
				t.Errorf("(-sock_diag +iterator):\n%s", diff)
			}
			owners := map[sockopt.Owner]int{}
			for _, k := range got {
				owners[k.Owner]++
			}
			if owners[sockopt.Root] != 2 || owners[sockopt.Owner{UID: somebody, Known: true}] != 2 {
				t.Errorf("keys by owner: %v", owners)
			}
		})
	}
}

// openAO is for TCP-AO's keys alone, whether the kernel knows any or not.
func openAO(t *testing.T) *HeldIter {
	t.Helper()
	it, err := openHeldOf(false, func(string) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = it.Close() })
	return it
}

// TestHeldKeysAreMany holds more keys than one socket's records, and than one read has room for.
func TestHeldKeysAreMany(t *testing.T) {
	enterNS(t)
	it := openHeld(t, true)
	peer := netip.MustParseAddr("10.0.0.1")
	sign := func(n int) {
		s := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
		for range n {
			err := s.trySign(netip.PrefixFrom(peer, 32), secret)
			if errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOPROTOOPT) {
				t.Skipf("needs a kernel whose sockets can hold %d keys (net.core.optmem_max, which 6.1 has too small; CONFIG_TCP_MD5SIG): %v", n, err)
			}
			if err != nil {
				t.Fatal(err)
			}
			peer = peer.Next()
		}
		s.listen(t)
	}
	for range 4 {
		sign(299)
	}
	sign(300)
	keys, hidden, err := it.Keys()
	if err != nil || len(keys) != 4*299+300 || hidden != 0 {
		t.Errorf("%d keys, %d hidden, %v", len(keys), hidden, err)
	}
	sign(301)
	if keys, hidden, err = it.Keys(); err != nil || len(keys) != 4*299+600 || hidden != 1 {
		t.Errorf("with one too many: %d keys, %d hidden, %v", len(keys), hidden, err)
	}
	if !slices.IsSortedFunc(keys, sockopt.Key.Compare) {
		t.Error("not in order")
	}
}

// TestHeldKeysHaveNoSecret looks for the secret in all that the program writes.
func TestHeldKeysHaveNoSecret(t *testing.T) {
	enterNS(t)
	it := openHeld(t, true)
	s := newSocket(t, netip.MustParseAddrPort("127.0.0.1:0"))
	s.sign(t, netip.MustParsePrefix("10.0.0.1/32"), secret)
	s.listen(t)
	r, err := it.link.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	all, err := io.ReadAll(r)
	if err != nil || len(all) != heldSize {
		t.Fatalf("%d bytes, %v", len(all), err)
	}
	if bytes.Contains(all, []byte(secret)) {
		t.Error("the secret is in the records")
	}
}

// TestHeldKeysNeedAKernelWithAO says in one line that the kernel knows no TCP-AO.
func TestHeldKeysNeedAKernelWithAO(t *testing.T) {
	it, err := OpenHeld(false)
	switch {
	case err == nil:
		_ = it.Close()
		t.Skip("needs a kernel without TCP-AO")
	case errors.Is(err, os.ErrPermission):
		t.Skipf("needs CAP_BPF and CAP_PERFMON: %v", err)
	case !errors.Is(err, ErrUnsupported):
		t.Error(err)
	}
}
