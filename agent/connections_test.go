package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/client"
	"tsoagent/agent/flows"
	"tsoagent/sockopt"
)

// fakeConns lists sockets that no kernel has: more than a test can open, or an end in the middle.
type fakeConns struct {
	list   []sockopt.Conn
	err    error
	opened atomic.Int32
	closed atomic.Int32
}

func (f *fakeConns) open() (connIter, error) { f.opened.Add(1); return f, nil }

// Each lists them, and then fails if it is to.
func (f *fakeConns) Each(fn func(sockopt.Conn) bool) error {
	for _, c := range f.list {
		if !fn(c) {
			return nil
		}
	}
	return f.err
}

// Close counts.
func (f *fakeConns) Close() error { f.closed.Add(1); return nil }

func many(n int) []sockopt.Conn {
	list := []sockopt.Conn{{Local: netip.MustParseAddrPort("0.0.0.0:179"), State: sockopt.Listen, MD5Keys: 1, GSODisabled: true}}
	for i := range n {
		list = append(list, sockopt.Conn{
			Local:  netip.MustParseAddrPort("10.1.0.1:179"),
			Remote: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), 40000),
			State:  sockopt.Established, GSODisabled: i%2 == 0, GSO: i%2 == 1, MSS: 1448, GSOMaxSize: 65000, GSOMaxSegs: 65535,
			Route: sockopt.ConnRoute{Dev: 3, TSO: true, GSOMaxSegs: 65535},
		})
	}
	return list
}

func TestFlowsComeBitByBit(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	fake := &fakeConns{list: many(20_000)}
	w.a.conns.open = fake.open
	c := w.serve()
	n := 0
	r, err := c.FlowsIn(t.Context(), "", flows.Filter{}, func(f *flows.Flow) error {
		if n == 0 && f.Remote != "10.9.0.0:40000" || f.State != "established" {
			t.Errorf("%d: %+v", n, f)
		}
		n++
		return nil
	})
	if err != nil || n != 20_000 || r.Summary.Shown != n || r.Summary.Lost != n/2 || !r.Live || r.Version != flows.Version {
		t.Fatalf("%d flows, %+v, %v", n, r, err)
	}
	if len(r.Collateral) != 1 || r.Collateral[0].Lost != n/2 || r.Collateral[0].Listener != "0.0.0.0:179" {
		t.Errorf("collateral %+v", r.Collateral)
	}
	n = 0
	enough := errors.New("enough")
	_, err = c.FlowsIn(t.Context(), "", flows.Filter{Lost: true}, func(*flows.Flow) error {
		if n++; n == 10 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || n != 10 {
		t.Errorf("a client that has enough: %d, %v", n, err)
	}
	within(t, 5*time.Second, "the list that nobody reads ends", func() bool { return len(w.a.conns.slots) == 0 })
	if fake.opened.Load() != 2 || fake.closed.Load() != 2 {
		t.Errorf("opened %d, closed %d", fake.opened.Load(), fake.closed.Load())
	}
}

func TestFlowsSayWhatIsWrong(t *testing.T) {
	w := controlWorld(t)
	c := w.serve()
	fake := &fakeConns{list: many(2)}
	w.a.conns.open = fake.open
	ask := func(f flows.Filter) (int, error) {
		n := 0
		_, err := c.FlowsIn(t.Context(), "", f, func(*flows.Flow) error { n++; return nil })
		return n, err
	}
	if _, err := ask(flows.Filter{}); err == nil || !strings.Contains(err.Error(), "try again in a moment") {
		t.Errorf("before the first plan: %v", err)
	}
	w.start(tunnelPolicy, tunnelSA)
	if n, err := ask(flows.Filter{Device: "nope"}); n != 0 || err == nil || err.Error() != `there is no device "nope"` {
		t.Errorf("a device that is not there: %d, %v", n, err)
	}
	if n, err := ask(flows.Filter{States: flows.StateNames{"open"}}); n != 0 || err == nil || !strings.Contains(err.Error(), `state: "open" is no TCP state`) {
		t.Errorf("a state that is none: %d, %v", n, err)
	}
	if _, err := c.FlowsIn(t.Context(), "blue", flows.Filter{}, nil); err == nil || !strings.Contains(err.Error(), "does not follow") {
		t.Errorf("a namespace that is not followed: %v", err)
	}
	// What goes wrong after 64 KiB can only be told at the end, and not as success.
	fake.list, fake.err = many(2000), errors.New("short record")
	n, err := ask(flows.Filter{})
	if n != 2000 || err == nil || !strings.HasPrefix(err.Error(), "short record: ") {
		t.Errorf("the end in the middle: %d, %v", n, err)
	}
	w.a.conns.open = func() (connIter, error) { return nil, fmt.Errorf("no iterator: %w", fs.ErrPermission) }
	n, err = ask(flows.Filter{})
	if n != 0 || err == nil || err.Error() != "no iterator: permission denied: give CAP_BPF and CAP_PERFMON to the agent's service" {
		t.Errorf("no capability: %d, %v", n, err)
	}
	for path, want := range map[string]int{"/v1/flows": http.StatusNotImplemented, "/v1/flows?dev=nope": http.StatusNotFound, "/v1/flows?listener=x": http.StatusBadRequest} {
		res, err := c.Do(newRequest(t, http.MethodGet, path))
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, res.StatusCode, want)
		}
	}
}

func TestDiagnosisIsMadeOnceForMany(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	fake := &fakeConns{list: many(100)}
	w.a.conns.open = fake.open
	c := w.serve()
	before := w.a.Report()
	rounds := before.Counters.Rounds
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			d, err := c.DiagnosisIn(t.Context(), "")
			if err != nil || d.Connections != 100 || d.Lost != 50 || len(d.Collateral) != 1 || d.Unreadable != "" {
				t.Errorf("%+v, %v", d, err)
			}
		})
	}
	wg.Wait()
	if n := fake.opened.Load(); n != 1 {
		t.Errorf("the sockets were read %d times", n)
	}
	r, err := c.Report(t.Context())
	if err != nil || r.Diagnosis == nil || r.Diagnosis.Lost != 50 || r.Counters.Rounds != rounds {
		t.Errorf("the report has %+v after %d rounds, %v", r.Diagnosis, r.Counters.Rounds-rounds, err)
	}
	if before.Diagnosis != nil {
		t.Error("a report that was handed out has changed")
	}
	// It stays in the reports of later rounds.
	w.a.round(w.now)
	if d := w.a.Report().Diagnosis; d == nil || d.Lost != 50 {
		t.Errorf("after a round: %+v", d)
	}
}

func TestDiagnosisSaysWhatIsMissing(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	w.a.conns.open = func() (connIter, error) { return nil, errors.New("no BTF of the kernel\nat all") }
	d, err := w.serve().DiagnosisIn(t.Context(), "")
	if err != nil || d.Unreadable != "no BTF of the kernel; at all: all but flows and this part of the doctor works without" {
		t.Errorf("%+v, %v", d, err)
	}
}

// The policies are indexed again only after a change.
func TestWorldFollowsTheMirror(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	one, err := w.a.world(t.Context(), atOnce)
	if err != nil {
		t.Fatal(err)
	}
	two, err := w.a.world(t.Context(), atOnce)
	if err != nil || one.Policies != two.Policies {
		t.Errorf("indexed again without a change, %v", err)
	}
	w.dumpXFRM(partPolicy, partSA)
	w.settle()
	three, err := w.a.world(t.Context(), atOnce)
	if err != nil || three.Policies == two.Policies {
		t.Errorf("not indexed again after a change, %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.a.world(ctx, w.a.call); !errors.Is(err, context.Canceled) {
		t.Errorf("with nobody in the loop: %v", err)
	}
}

// proc makes a procfs with processes and the sockets that they have open.
func proc(t *testing.T, processes map[string][]string) string {
	t.Helper()
	dir := t.TempDir()
	for pid, files := range processes {
		fd := filepath.Join(dir, pid, "fd")
		err := errors.Join(os.MkdirAll(fd, 0o755), os.WriteFile(filepath.Join(dir, pid, "comm"), []byte("name"+pid+"\n"), 0o644))
		for i, target := range files {
			err = errors.Join(err, os.Symlink(target, filepath.Join(fd, fmt.Sprint(i))))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestIndexOfPoliciesGoesWithItsUsers: it holds all policies of its time, also those that are gone.
func TestIndexOfPoliciesGoesWithItsUsers(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	world, err := w.a.world(t.Context(), atOnce)
	if err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	if kept := w.a.conns.policies.Value(); kept == nil || kept != world.Policies {
		t.Errorf("it is not kept for others while it is used: %v", kept)
	}
	runtime.KeepAlive(world)
	runtime.GC()
	if w.a.conns.policies.Value() != nil {
		t.Error("nobody uses it, and it is still there")
	}
}

func TestOwnersOfSockets(t *testing.T) {
	dir := proc(t, map[string][]string{
		"7": {"/dev/null", "socket:[901]", "socket:[902]"}, "8": {"socket:[901]", "socket:[901]", "socket:[x]"}, "9": {"socket:[903]"}, "self": {"socket:[901]"},
	})
	list := []flows.Collateral{{Inodes: []uint64{901}}, {Inodes: []uint64{904}}, {}}
	o := findOwners(dir, func(inode uint64) bool { return inode == 901 || inode == 904 }, 100)
	o.name(list)
	want := []flows.Process{{PID: 7, Name: "name7"}, {PID: 8, Name: "name8"}}
	if d := cmp.Diff(want, list[0].Processes); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if list[1].ProcessesUnknown != "no process that can be seen from here has it open" || list[2].ProcessesUnknown != "" {
		t.Errorf("unknown: %q, %q", list[1].ProcessesUnknown, list[2].ProcessesUnknown)
	}
	if len(o.of) != 1 {
		t.Errorf("found what nobody asked for: %v", o.of)
	}
	if o := findOwners(dir, func(uint64) bool { return true }, 3); !o.cut {
		t.Error("no end after three files")
	}
	crowd := map[string][]string{}
	for pid := range 20 {
		crowd[fmt.Sprint(pid+1)] = []string{"socket:[901]"}
	}
	if n := len(findOwners(proc(t, crowd), func(uint64) bool { return true }, 100).of[901]); n != maxSocketSharers {
		t.Errorf("%d processes named", n)
	}
}

func TestOwnersThatMayNotBeSeen(t *testing.T) {
	if os.Getenv("TSO_TEST_OWNERS") != "" {
		list := []flows.Collateral{{Inodes: []uint64{1}}}
		findOwners("/proc", func(inode uint64) bool { return inode == 1 }, maxOpenFiles).name(list)
		t.Log(list[0].ProcessesUnknown)
		return
	}
	if out := asNobody(t, "TestOwnersThatMayNotBeSeen", "TSO_TEST_OWNERS=1"); !strings.Contains(out, "not every process may be looked at: it takes root") {
		t.Error(out)
	}
}

// busyWorld has all slots taken, as by clients that read slowly.
func busyWorld(t *testing.T, wait time.Duration) (*world, *client.Client) {
	t.Helper()
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	w.a.conns.open = (&fakeConns{list: many(10)}).open
	w.a.conns.wait = wait
	for range maxLists {
		w.a.conns.slots <- struct{}{}
	}
	return w, w.serve()
}

// Clients that read slowly hold all slots: a diagnosis needs none, and who asks for another list is told in time.
func TestSlowReadersHoldNobodyUp(t *testing.T) {
	_, c := busyWorld(t, time.Millisecond)
	if d, err := c.DiagnosisIn(t.Context(), ""); err != nil || d.Connections != 10 {
		t.Errorf("no diagnosis: %+v, %v", d, err)
	}
	_, err := c.FlowsIn(t.Context(), "", flows.Filter{}, func(*flows.Flow) error { return nil })
	if err == nil || err.Error() != "2 lists of connections are read already: try again in 5s" {
		t.Errorf("another list: %v", err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://tsoagent/v1/flows", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Retry-After") != "5" {
		t.Errorf("another list: %d, Retry-After %q", res.StatusCode, res.Header.Get("Retry-After"))
	}
}

// TestOnlySoManyWaitForAList has as many clients wait as may: one more is told at once, though the wait has no end here, and whose turn
// comes has its list.
func TestOnlySoManyWaitForAList(t *testing.T) {
	w, c := busyWorld(t, time.Hour)
	ask := func(ctx context.Context) error {
		_, err := c.FlowsIn(ctx, "", flows.Filter{}, func(*flows.Flow) error { return nil })
		return err
	}
	crowd, leave := context.WithCancel(t.Context())
	defer leave()
	var waiting sync.WaitGroup
	for range maxWaiting {
		waiting.Go(func() {
			if err := ask(crowd); !errors.Is(err, context.Canceled) {
				t.Errorf("one who waits: %v", err)
			}
		})
	}
	within(t, 20*time.Second, "all wait", func() bool { return len(w.a.conns.waiting) == maxWaiting })
	const more = "2 lists of connections are read already, and 8 clients wait for theirs: try again in 5s"
	if err := ask(t.Context()); err == nil || err.Error() != more {
		t.Errorf("one too many: %v, want %q", err, more)
	}
	leave()
	waiting.Wait()
	within(t, 20*time.Second, "nobody waits", func() bool { return len(w.a.conns.waiting) == 0 })
	got := make(chan error, 1)
	go func() { got <- ask(t.Context()) }()
	within(t, 20*time.Second, "one waits", func() bool { return len(w.a.conns.waiting) == 1 })
	<-w.a.conns.slots
	if err := <-got; err != nil {
		t.Errorf("one whose turn came: %v", err)
	}
}

// TestListHasAnEnd gives up the list of a client that reads on and on.
func TestListHasAnEnd(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	w.a.conns.open = (&fakeConns{list: many(60_000)}).open
	var late atomic.Bool
	began := time.Now()
	w.a.conns.now = func() time.Time {
		if late.Load() {
			return began.Add(flowsWhole + 1)
		}
		return began
	}
	c := w.serve()
	n := 0
	_, err := c.FlowsIn(t.Context(), "", flows.Filter{}, func(*flows.Flow) error {
		n++
		late.Store(true) // most of the rest is not even in the socket's buffer yet
		return nil
	})
	if err == nil || !strings.HasPrefix(err.Error(), "the list was given up, as it was not read within 5m0s: ") || n == 0 || n == 60_000 {
		t.Errorf("%d flows, %v", n, err)
	}
	within(t, 20*time.Second, "the slot is free", func() bool { return len(w.a.conns.slots) == 0 })
}

// TestListThatNobodyReadsEnds gives up the list of a client that reads nothing.
func TestListThatNobodyReadsEnds(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	fake := &fakeConns{list: many(60_000)}
	w.a.conns.open, w.a.conns.step = fake.open, time.Millisecond
	w.serve()
	conn, err := net.Dial("unix", SocketPath(w.a.cfg.RunDir))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := fmt.Fprint(conn, "GET /v1/flows HTTP/1.1\r\nHost: tsoagent\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	within(t, 20*time.Second, "the list ends", func() bool { return fake.closed.Load() == 1 && len(w.a.conns.slots) == 0 })
}

// blockedConns are sockets whose list does not end before the test says so.
type blockedConns struct{ began, end chan struct{} }

func (b blockedConns) Each(func(sockopt.Conn) bool) error {
	close(b.began)
	<-b.end
	return nil
}

func (blockedConns) Close() error { return nil }

// Whoever waits for a diagnosis that another one makes can stop to wait: the agent does when it ends.
func TestWaitForADiagnosisEnds(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	b := blockedConns{make(chan struct{}), make(chan struct{})}
	w.a.conns.open = func() (connIter, error) { return b, nil }
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(b.end)
	wg.Go(func() {
		if _, err := w.a.diagnose(t.Context(), atOnce); err != nil {
			t.Error(err)
		}
	})
	<-b.began
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	done := make(chan error, 1)
	wg.Go(func() {
		_, err := w.a.diagnose(ctx, atOnce)
		done <- err
	})
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it waits for the other one, whatever its context says")
	}
}
