package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/netns/netnstest"
	"tsoagent/ethtool"
)

// testNS is a throw-away network namespace with a veth pair that is up: n0 with 192.0.2.1/24,
// 10.1.0.1/16 and 2001:db8::1/64, default routes by 192.0.2.254 and 2001:db8::fe; n1 is its peer.
type testNS struct {
	t *testing.T
	f *os.File
}

// hostNS is the namespace that the tests were started in, which they must leave alone.
var hostNS, _ = os.Readlink("/proc/self/ns/net")

func inHostNS() bool {
	now, err := os.Readlink("/proc/thread-self/ns/net")
	return err != nil || now == hostNS
}

// newNS moves the test into a namespace of its own until it ends. The namespace goes with the
// last thing that uses it, also when the test fails.
func newNS(t *testing.T) *testNS {
	t.Helper()
	ns := &testNS{t, netnstest.Enter(t, "ip")}
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
	ns.ip(`link set lo up
link add n0 type veth peer name n1
link set n0 addrgenmode none
link set n1 addrgenmode none
link set n0 up
link set n1 up
addr add 192.0.2.1/24 dev n0
addr add 10.1.0.1/16 dev n0
addr add 2001:db8::1/64 dev n0 nodad
route add default via 192.0.2.254`)
	ns.ip("-6 route add default via 2001:db8::fe")
	// The kernel adds its own IPv6 routes a moment after a device came up.
	ns.shows("-6 route show table local", "local 2001:db8::1 dev n0", "multicast ff00::/8 dev n0", "multicast ff00::/8 dev n1")
	return ns
}

// ip runs lines of iproute2 commands in the namespace, in order; those that start with an option
// by themselves.
func (ns *testNS) ip(lines string) {
	ns.t.Helper()
	if inHostNS() {
		panic("a test would change the host's namespace")
	}
	for line := range strings.Lines(lines) {
		out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput()
		if err != nil {
			ns.t.Fatalf("ip %s: %v\n%s", strings.TrimSpace(line), err, out)
		}
	}
}

func (ns *testNS) show(args string) string {
	ns.t.Helper()
	if inHostNS() {
		panic("a test looks at the host's namespace")
	}
	cmd := exec.Command("ip", strings.Fields(args)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil && !strings.Contains(errs.String(), "does not exist") { // a table that is empty
		ns.t.Fatalf("ip %s: %v\n%s", args, err, errs.String())
	}
	return strings.TrimSpace(string(out))
}

var timers = regexp.MustCompile(`expires \d+sec`)

// snapshot is what a person sees of rules, routes and features with their wanted bits.
func (ns *testNS) snapshot() string {
	ns.t.Helper()
	var b strings.Builder
	for _, args := range []string{"-d -4 rule show", "-d -6 rule show", "-d -4 route show table all", "-d -6 route show table all"} {
		fmt.Fprintf(&b, "# ip %s\n%s\n", args, ns.show(args))
	}
	c, err := ethtool.Dial()
	if err != nil {
		ns.t.Fatal(err)
	}
	defer c.Close()
	err = c.All(func(f *ethtool.Features) error {
		for name, s := range f.All() {
			fmt.Fprintf(&b, "%s %s %s\n", f.Name, name, s)
		}
		return nil
	})
	if err != nil {
		ns.t.Fatal(err)
	}
	return timers.ReplaceAllString(b.String(), "expires Nsec")
}

// policy adds or deletes an output policy with an ESP tunnel.
func (ns *testNS) policy(verb, src, dst, more string) {
	ns.t.Helper()
	tmpl := "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel"
	if strings.Contains(dst, ":") {
		tmpl = "tmpl src 2001:db8::1 dst 2001:db8::2 proto esp reqid 1 mode tunnel"
	}
	if verb == "delete" || strings.Contains(more, "bypass") {
		tmpl = ""
	}
	ns.ip(strings.Join(strings.Fields(fmt.Sprintf("xfrm policy %s src %s dst %s dir out %s %s", verb, src, dst, strings.ReplaceAll(more, "bypass", ""), tmpl)), " "))
}

// running is an agent in the namespace.
type running struct {
	*Agent
	t      *testing.T
	cancel context.CancelFunc
	done   chan error
	log    *lockedBuffer
}

// start runs an agent until stop, which a failing test calls as well.
func (ns *testNS) start(cfg Config) *running {
	ns.t.Helper()
	return ns.startWith(cfg, func(*Agent) {})
}

// startWith is start with something that is changed about the agent first.
func (ns *testNS) startWith(cfg Config, change func(*Agent)) *running {
	ns.t.Helper()
	r := &running{t: ns.t, done: make(chan error, 1), log: new(lockedBuffer)}
	a, err := New(cfg, slog.New(slog.NewTextHandler(r.log, nil)), "test")
	if err != nil {
		ns.t.Fatal(err)
	}
	r.Agent = a
	change(a)
	var ctx context.Context
	ctx, r.cancel = context.WithCancel(context.Background())
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Setns(int(ns.f.Fd()), unix.CLONE_NEWNET); err != nil {
			r.done <- err
			return
		}
		r.done <- a.Run(ctx)
	}()
	var once sync.Once
	stop := r.cancel
	r.cancel = func() { once.Do(stop) }
	ns.t.Cleanup(func() {
		if r.Agent != nil {
			r.stop()
		}
		if ns.t.Failed() {
			ns.t.Logf("the agent's log:\n%s", r.log)
		}
	})
	within(ns.t, 20*time.Second, "the first plan", func() bool { return a.Report() != nil })
	return r
}

// stop is SIGTERM, and waits for the end.
func (r *running) stop() {
	r.t.Helper()
	r.cancel()
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("Run: %v", err)
		}
	case <-time.After(40 * time.Second):
		r.t.Error("Run does not end")
		return
	}
	if err := r.Close(); err != nil {
		r.t.Errorf("Close: %v", err)
	}
	r.Agent = nil
}

// crash ends the agent as kill -9 does: nothing is given back, and the journal stays.
func (r *running) crash() {
	r.t.Helper()
	if err := r.call(r.t.Context(), func() { r.once = true }); err != nil {
		r.t.Fatal(err)
	}
	r.cancel()
	if err := <-r.done; err != nil && !errors.Is(err, context.Canceled) {
		r.t.Errorf("Run: %v", err)
	}
	if err := r.Close(); err != nil {
		r.t.Errorf("Close: %v", err)
	}
	r.Agent = nil
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// checkLeaks fails if more goroutines run at the end of the test than now.
func checkLeaks(t *testing.T) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		deadline := time.Now().Add(5 * time.Second)
		for runtime.NumGoroutine() > before {
			if time.Now().After(deadline) {
				b := make([]byte, 1<<20)
				t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, b[:runtime.Stack(b, true)])
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
