package agent

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"tsoagent/agent/client"
	"tsoagent/agent/flows"
	"tsoagent/agent/netns"
	"tsoagent/sockopt/sockbpf"
)

// needIterator skips where the kernel lacks the iterator over TCP sockets.
func needIterator(t *testing.T) {
	t.Helper()
	it, err := sockbpf.Open()
	if err != nil {
		t.Skipf("the kernel has no BPF iterator over TCP sockets: %v", err)
	}
	if err := it.Close(); err != nil {
		t.Error(err)
	}
}

// signFor gives a socket a TCP-MD5 key for a peer.
func signFor(t *testing.T, c syscall.RawConn, peer netip.Addr) {
	t.Helper()
	sig := &unix.TCPMD5Sig{Keylen: uint16(len(testSecret))}
	copy(sig.Key[:], testSecret)
	if peer.Is4() {
		sig.Addr.Family = unix.AF_INET
		a := peer.As4()
		copy(storage(sig)[4:], a[:]) // after family and port (struct sockaddr_in)
	} else {
		sig.Addr.Family = unix.AF_INET6
		a := peer.As16()
		copy(storage(sig)[8:], a[:]) // after family, port and flowinfo (struct sockaddr_in6)
	}
	var err error
	if ctl := c.Control(func(fd uintptr) { err = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, sig) }); ctl != nil {
		t.Fatal(ctl)
	}
	if errors.Is(err, unix.ENOPROTOOPT) {
		t.Skipf("the kernel takes no TCP-MD5 key (CONFIG_TCP_MD5SIG): %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// storage are the bytes of the key's peer (struct sockaddr_storage).
func storage(sig *unix.TCPMD5Sig) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&sig.Addr)), unsafe.Sizeof(sig.Addr))
}

// testSecret is a key that must be nowhere but in the kernel and here.
const testSecret = "flows-test-secret"

// openPeers opens a listener in the namespace of the calling thread, with a key for signed if that is valid,
// and connects to it from each address.
func openPeers(t *testing.T, at string, signed netip.Addr, from ...string) {
	t.Helper()
	cfg := net.ListenConfig{}
	cfg.SetMultipathTCP(false) // Go's default, and refuses keys
	l, err := cfg.Listen(t.Context(), "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	to := l.Addr().(*net.TCPAddr).AddrPort()
	if signed.IsValid() {
		raw, err := l.(*net.TCPListener).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		signFor(t, raw, signed)
	}
	for _, src := range from {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(src), 0))}
		d.SetMultipathTCP(false)
		d.ControlContext = func(_ context.Context, _, _ string, c syscall.RawConn) error {
			if netip.MustParseAddr(src) == signed {
				signFor(t, c, to.Addr().Unmap())
			}
			return nil
		}
		c, err := d.DialContext(t.Context(), "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		// The cached route is that of what was sent last.
		if _, err := s.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
}

// accepted are the flows of the listeners' side, without what differs in each run.
func accepted(list []flows.Flow) []string {
	var out []string
	for _, f := range list {
		local := netip.MustParseAddrPort(f.Local)
		if local.Port() > 1024 {
			continue
		}
		remote, _, _ := strings.Cut(strings.TrimPrefix(f.Remote, "["), "]:")
		if local.Addr().Is4() {
			remote = netip.MustParseAddrPort(f.Remote).Addr().String()
		}
		lost := ""
		if f.Lost {
			lost = " lost"
		}
		out = append(out, strings.TrimSpace(f.Local+" "+remote+" "+f.Coverage+" "+string(f.Segmentation)+" "+f.Device+lost+" "+f.Why+" "+f.Contradiction))
	}
	return out
}

// TestHostConnectionsTellTheTruth is the trouble itself, in both families: a listener with one key, an
// unsigned neighbour of the signed peer, and a plain service on another port.
func TestHostConnectionsTellTheTruth(t *testing.T) {
	ns := newNS(t)
	needIterator(t)
	// With its own MTU no two segments would fit a super-packet.
	ns.ip(`link set lo mtu 1500
addr add 10.1.0.2/32 dev lo
addr add 10.1.0.3/32 dev lo`)
	ns.ip("-6 addr add 2001:db8::2/128 dev lo nodad")
	ns.ip("-6 addr add 2001:db8::3/128 dev lo nodad")
	openPeers(t, "10.1.0.1:179", netip.MustParseAddr("10.1.0.2"), "10.1.0.2", "10.1.0.3")
	openPeers(t, "[2001:db8::1]:179", netip.MustParseAddr("2001:db8::2"), "2001:db8::2", "2001:db8::3")
	openPeers(t, "10.1.0.1:80", netip.Addr{}, "10.1.0.3")
	openPeers(t, "[2001:db8::1]:80", netip.Addr{}, "2001:db8::3")
	want := []string{
		"10.1.0.1:179 10.1.0.2 key none lo TCP-MD5 key on this socket: the kernel takes GSO from it",
		"10.1.0.1:179 10.1.0.3 none none lo lost no key, but inherited from listener 10.1.0.1:179, which holds 1 TCP-MD5 key",
		"10.1.0.1:80 10.1.0.3 none offload lo",
		"[2001:db8::1]:179 2001:db8::2 key none lo TCP-MD5 key on this socket: the kernel takes GSO from it",
		"[2001:db8::1]:179 2001:db8::3 none none lo lost no key, but inherited from listener [2001:db8::1]:179, which holds 1 TCP-MD5 key",
		"[2001:db8::1]:80 2001:db8::3 none offload lo",
	}
	me, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	self := []flows.Process{{PID: os.Getpid(), Name: strings.TrimSpace(string(me))}}
	check := func(name string, list []flows.Flow, r *flows.Result, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := gocmp.Diff(want, accepted(list), cmpopts.SortSlices(strings.Compare)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		if r.Summary.Connections != 12 || r.Summary.Lost != 2 || r.Summary.Key != 4 || r.Summary.Contradictions != 0 || len(r.Collateral) != 2 {
			t.Errorf("%s: %+v", name, r)
		}
		for _, c := range r.Collateral {
			if c.Port != 179 || c.Lost != 1 || c.Signed != 1 || c.MD5Keys != 1 || !gocmp.Equal(c.Processes, self) {
				t.Errorf("%s: collateral %+v", name, c)
			}
		}
	}
	cfg := hostConfig(t)
	var list []flows.Flow
	add := func(f *flows.Flow) error { list = append(list, *f); return nil }
	r, err := FlowsIn(t.Context(), "host", cfg, discard(), "test", flows.Filter{}, add)
	check("without an agent", list, r, err)
	a := ns.start(cfg)
	served := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { served <- a.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	c := client.New(cfg.RunDir)
	within(t, 5*time.Second, "the socket", func() bool { _, err := c.Report(ctx); return err == nil })
	list = nil
	r, err = c.FlowsIn(ctx, "", flows.Filter{Processes: true}, add)
	check("with an agent", list, r, err)
	for _, f := range list {
		if !gocmp.Equal(f.Processes, self) || f.UID != 0 {
			t.Errorf("%s is open by %+v, uid %d", f.Local, f.Processes, f.UID)
		}
	}
	// What is due with the next resync is in the report without being asked for.
	a.diagnoseSoon()
	within(t, 5*time.Second, "a diagnosis in the report", func() bool { return a.Report().Diagnosis != nil })
	d, err := c.DiagnosisIn(ctx, "")
	if err != nil || d.Lost != 2 || d.Connections != 12 || len(d.Collateral) != 2 || d.Unreadable != "" {
		t.Errorf("diagnosis %+v, %v", d, err)
	}
	// A policy that comes covers a connection at once, though its socket learns of it when it sends next.
	ns.policy("add", "10.1.0.1/32", "10.1.0.3/32", "")
	plain := flows.Filter{Listener: flows.Listener{Port: 80}}
	within(t, 5*time.Second, "the policy is seen", func() bool {
		list = nil
		_, err := c.FlowsIn(ctx, "", plain, add)
		return err == nil && len(list) == 2 && list[0].Coverage+list[1].Coverage != flows.NotCovered+flows.NotCovered
	})
	for _, f := range list {
		if covered := f.Local == "10.1.0.1:80"; covered != (f.Policy != 0) || covered != strings.HasPrefix(f.Contradiction, "no SA applies: ") || f.Lost {
			t.Errorf("with a policy: %+v", f)
		}
	}
	ns.policy("delete", "10.1.0.1/32", "10.1.0.3/32", "")
	within(t, 5*time.Second, "the policy is gone", func() bool {
		list = nil
		_, err := c.FlowsIn(ctx, "", plain, add)
		return err == nil && list[0].Coverage+list[1].Coverage == flows.NotCovered+flows.NotCovered
	})
	list = nil
	if r, err = c.FlowsIn(ctx, "", flows.Filter{Lost: true}, add); err != nil || len(list) != 2 || r.Summary.Shown != 2 {
		t.Errorf("only lost ones: %+v, %+v, %v", list, r, err)
	}
	ns.neverSaid(a, cfg)
}

// TestHostListenerForIPv6AloneTakesNoBlame has an IPv4 connection that has lost offload by a listener that is gone, while another one for
// IPv6 alone holds a key on the same port, and then one for both.
func TestHostListenerForIPv6AloneTakesNoBlame(t *testing.T) {
	newNS(t)
	needIterator(t)
	keyed := func(network, at, peer string) net.Listener {
		t.Helper()
		cfg := net.ListenConfig{}
		cfg.SetMultipathTCP(false)
		l, err := cfg.Listen(t.Context(), network, at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		raw, err := l.(*net.TCPListener).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		signFor(t, raw, netip.MustParseAddr(peer))
		return l
	}
	shut := func(l net.Listener) {
		t.Helper()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	gone := keyed("tcp4", "10.1.0.1:179", "10.1.0.2")
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "tcp4", "10.1.0.1:179")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	s, err := gone.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if _, err := s.Write([]byte("x")); err != nil { // so that it has a route
		t.Fatal(err)
	}
	shut(gone)
	for network, why := range map[string]string{
		"tcp6": "no key now, but it had one, or its listener did: the loss stays", // Go has it for IPv6 alone
		"tcp":  "no key, but inherited from listener [::]:179, which holds 1 TCP-MD5 key",
	} {
		l := keyed(network, "[::]:179", "2001:db8::2")
		var list []string
		if _, err := FlowsIn(t.Context(), "host", hostConfig(t), discard(), "test", flows.Filter{Lost: true}, func(f *flows.Flow) error {
			list = append(list, f.Local+" "+f.Why)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if d := gocmp.Diff([]string{"10.1.0.1:179 " + why}, list); d != "" {
			t.Errorf("%s (-want +got):\n%s", network, d)
		}
		shut(l)
	}
}

// neverSaid looks for the key in what the agent has written and said.
func (ns *testNS) neverSaid(a *running, cfg Config) {
	ns.t.Helper()
	secret := []byte(testSecret)
	if bytes.Contains([]byte(a.log.String()), secret) {
		ns.t.Error("the key is in the log")
	}
	err := filepath.WalkDir(cfg.RunDir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, secret) {
			ns.t.Errorf("the key is in %s", path)
		}
		return err
	})
	if err != nil {
		ns.t.Error(err)
	}
}

// flowsIn looks for a listener in namespace a, which is not there for who looks in the host's.
func flowsIn(t *testing.T, c *client.Client, cfg Config) {
	t.Helper()
	if it, err := sockbpf.Open(); err != nil {
		t.Logf("flows in a namespace are not tested: no BPF iterator over TCP sockets: %v", err)
		return
	} else if err := it.Close(); err != nil {
		t.Error(err)
	}
	ns, err := netns.Open(netns.Path("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var l net.Listener
	err = ns.Do(func() (err error) {
		l, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", "[::]:4321")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	filter := flows.Filter{Listener: flows.Listener{Port: 4321}, States: flows.StateNames{"listening"}}
	for name, want := range map[string]int{"a": 1, "": 0} {
		n := 0
		count := func(*flows.Flow) error { n++; return nil }
		r, err := c.FlowsIn(t.Context(), name, filter, count)
		if err != nil || n != want || r.Netns != name {
			t.Errorf("with an agent in %q: %d flows, %+v, %v", name, n, r, err)
		}
		n = 0
		r, err = FlowsIn(t.Context(), cmp.Or(name, netns.Host), cfg, discard(), "test", filter, count)
		if err != nil || n != want || r.Netns != name {
			t.Errorf("without an agent in %q: %d flows, %+v, %v", name, n, r, err)
		}
	}
	if d, err := c.DiagnosisIn(t.Context(), "a"); err != nil || d.Unreadable != "" {
		t.Errorf("diagnosis in a: %+v, %v", d, err)
	}
}
