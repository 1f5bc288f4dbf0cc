package probe

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/ethtool"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: no network namespace can be made")
	}
}

// hasESP tries to make an SA, as the probe does.
func hasESP(t *testing.T) bool {
	t.Helper()
	u, err := suiteOf(DefaultSA)
	if err != nil {
		t.Fatal(err)
	}
	e, err := newEnd("sender")
	if err != nil {
		t.Fatal(err)
	}
	defer e.close()
	l := &lab{shape: shapes[0], mode: Transport, suite: u}
	l.keys[sender], l.keys[receiver] = newKeys(u), newKeys(u)
	return e.do(func() error { return l.addESP(sender) }) == nil
}

// namespaces counts the network namespaces that this process's threads are in.
func namespaces(t *testing.T) int {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, task := range tasks {
		if ns, err := os.Readlink(task); err == nil { // the thread may have ended
			seen[ns] = true
		}
	}
	return len(seen)
}

func wantOneNamespace(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for namespaces(t) > 1 {
		if time.Now().After(deadline) {
			t.Fatalf("the threads are in %d network namespaces, want 1", namespaces(t))
		}
		time.Sleep(time.Millisecond)
	}
}

func TestProbeNamesWhatTheKernelLacks(t *testing.T) {
	needRoot(t)
	if hasESP(t) {
		t.Skip("this kernel has ESP: that it is missing can't be seen here")
	}
	var told []Progress
	r, err := Run(t.Context(), Config{Progress: func(p Progress) { told = append(told, p) }})
	if err != nil {
		t.Fatal(err)
	}
	if r.Measured() != 0 || len(r.Cases) == 0 {
		t.Errorf("got %d of %d cases measured, want 0 of some", r.Measured(), len(r.Cases))
	}
	for _, c := range r.Cases {
		want := "no ESP for " + c.Outer.String()
		if c.Verdict != Impossible || !strings.Contains(c.Why, want) || c.KeepTSO() || c.BreaksUDP() {
			t.Errorf("%s %s %s: got %s: %s; want %q", c.Kind, c.Outer, c.Mode, c.Verdict, c.Why, want)
		}
	}
	if c, _ := r.Lookup("gre", IPv4, Transport, DefaultSA); !strings.Contains(c.Why, "gre devices") {
		if id, err := ReadIdentity(); err != nil || id.Modules["ip_gre"] == Absent {
			t.Errorf("gre: got %s, want that its devices are missing, too", c.Why)
		}
	}
	if last := told[len(told)-1]; len(told) != len(r.Cases)+1 || last.Done != last.Total || last.Next != "" {
		t.Errorf("got %d reports of progress, the last one %+v", len(told), last)
	}
	if err := r.Valid(r.Kernel); err != nil {
		t.Error(err)
	}
	wantOneNamespace(t)
}

// TestFlowsThroughAPlainVeth shows that the measurement works without what the kernel may lack:
// the NIC serves as the tunnel device.
func TestFlowsThroughAPlainVeth(t *testing.T) {
	needRoot(t)
	l := plainLab(t)
	for _, on := range []bool{true, false} {
		if err := l.set("tx-tcp-segmentation", on, "tx-tcp-segmentation", "tx-tcp6-segmentation"); err != nil {
			t.Fatal(err)
		}
		f, err := l.tcp(t.Context(), IPv4, on, quick)
		if err != nil {
			t.Fatal(err)
		}
		if f.Acked < leastAcked || f.Wire.Packets < leastSeen || f.Wire.Super > 0 != on {
			t.Errorf("TSO %s: got %+v", onOff(on), f)
		}
		if f.NIC.Packets == 0 || f.NIC.Clear != f.NIC.Packets {
			t.Errorf("TSO %s: got %+v at the NIC, want all in the clear", onOff(on), f.NIC)
		}
	}
	for _, on := range []bool{true, false} {
		if err := l.set("tx-udp-segmentation", on, "tx-udp-segmentation"); err != nil {
			t.Fatal(err)
		}
		b, err := l.udpBurst(t.Context(), IPv4)
		if err != nil {
			t.Fatal(err)
		}
		if b.Sent != supers*inSuper || b.Arrived != b.Sent || b.Wire.Super > 0 != on {
			t.Errorf("tx-udp-segmentation %s: got %+v", onOff(on), b)
		}
	}
	l.close()
	wantOneNamespace(t)
}

// plainLab joins two namespaces, and uses the veth pair for the tunnel.
func plainLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{shape: shape{kind: "veth", outer: IPv4, inner: only4}}
	t.Cleanup(l.close)
	var err error
	for i, name := range []string{"sender", "receiver"} {
		if l.ends[i], err = newEnd(name); err != nil {
			t.Fatal(err)
		}
	}
	err = l.underlay(t.Context())
	if im := (*impossibleError)(nil); errors.As(err, &im) {
		t.Skip(err)
	}
	for i, e := range l.ends {
		err = errors.Join(err, e.do(func() error {
			link, err := vnl.LinkByIndex(l.nic[i])
			if err != nil {
				return err
			}
			return errors.Join(vnl.LinkSetDown(link), vnl.LinkSetName(link, tunnelName), l.inside(i))
		}))
	}
	if err := errors.Join(err, l.carrier(t.Context())); err != nil {
		t.Fatal(err)
	}
	err = l.ends[sender].do(func() (err error) {
		l.features, err = ethtool.Dial()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestProbeEndsWithItsContext(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := Run(ctx, Config{Kinds: []string{"vxlan"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, %v; want context.Canceled", r, err)
	}
	wantOneNamespace(t)
}

func TestEndKeepsTheNamespaceOfTheProcess(t *testing.T) {
	needRoot(t)
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 { // one of them may come upon the first thread
		e, err := newEnd("sender")
		if err != nil {
			t.Fatal(err)
		}
		var inside string
		err = e.do(func() (err error) {
			if unix.Gettid() == os.Getpid() {
				t.Error("the process's first thread is in the namespace")
			}
			inside, err = os.Readlink("/proc/thread-self/ns/net")
			return err
		})
		if err != nil || inside == before {
			t.Errorf("got %s, %v; want another namespace than %s", inside, err, before)
		}
		e.close()
	}
	if after, err := os.Readlink("/proc/self/ns/net"); err != nil || after != before {
		t.Errorf("got %s, %v; want %s", after, err, before)
	}
	wantOneNamespace(t)
}

func TestIdentityNamesThisKernel(t *testing.T) {
	id, err := ReadIdentity()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil || id.Release != strings.TrimSpace(string(b)) {
		t.Errorf("got release %s, want %s (%v)", id.Release, b, err)
	}
	if len(id.Modules) != len(modules) {
		t.Errorf("got %d modules, want %d", len(id.Modules), len(modules))
	}
}
