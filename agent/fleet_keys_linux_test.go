package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
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
type brokenHook struct{ keyHook }

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
		s := sailWith(t, cfg, tt.open)
		signedIn(t, tt.ns, "192.0.2.1:179", "192.0.2.9")
		netnstest.Within(t, "the key, by a poll", func() bool { return slices.Equal(s.keysIn(tt.ns), []string{"192.0.2.9/32"}) })
		netnstest.Within(t, "the reason", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return !s.hooked.on() && s.hooked.why == tt.why
		})
		s.stop()
	}
}
