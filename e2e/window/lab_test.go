package window

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A lab is a host with two ways to everywhere, and what is at their other ends.
type lab struct {
	testing.TB
	bin string
	far *os.File
	// way is that of the default routes, and of the more specific ones where there are some.
	way, specific int
	owner         *netlink.Handle
}

const wire = `link set lo up
addr add 10.1.0.1/32 dev lo
addr add 192.0.2.1/24 dev nic0
addr add 198.51.100.1/24 dev nic1
-6 addr add fd00:1::1/128 dev lo nodad
-6 addr add fd00:2::1/64 dev nic0 nodad
-6 addr add fd00:3::1/64 dev nic1 nodad
link set nic0 up
link set nic1 up
neigh add 192.0.2.8 lladdr 02:00:00:00:00:20 dev nic0
neigh add 198.51.100.8 lladdr 02:00:00:00:00:21 dev nic1
-6 neigh add fd00:2::8 lladdr 02:00:00:00:00:20 dev nic0
-6 neigh add fd00:3::8 lladdr 02:00:00:00:00:21 dev nic1
route add default via 192.0.2.8
-6 route add default via fd00:2::8
xfrm policy add src 10.1.0.0/16 dst 10.3.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.77 proto esp mode tunnel
xfrm policy add src fd00:1::/64 dst fd10::/32 dir out tmpl src fd00:2::1 dst fd00:2::77 proto esp mode tunnel`

// prefixes are the destinations that move.
var (
	defaults  = []string{"0.0.0.0/0", "::/0"}
	specifics = []string{"10.3.7.0/24", "fd10:0:0:7::/64"}
	gateways  = [2][2]string{{"192.0.2.8", "198.51.100.8"}, {"fd00:2::8", "fd00:3::8"}}
)

func newLab(t testing.TB) *lab {
	t.Helper()
	host.Need(t, map[string]string{"ip": "iproute2"})
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{TB: t, bin: bin, specific: -1}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			l.far, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	l.must(<-made)
	t.Cleanup(func() { _ = l.far.Close() })
	for way := range 2 {
		l.ip("link add nic%d type veth peer name far%d address 02:00:00:00:00:2%d netns /proc/%d/fd/%d", way, way, way, os.Getpid(), l.far.Fd())
		l.must(in(l.far, func() error { return run("ip", "link", "set", fmt.Sprintf("far%d", way), "up") }))
		name := fmt.Sprintf("nic%d", way)
		t.Cleanup(func() { _ = run("ip", "link", "del", name) })
	}
	for line := range strings.Lines(wire) {
		l.ip("%s", strings.TrimSpace(line))
	}
	t.Cleanup(func() { _ = run("ip", "xfrm", "policy", "flush"); _ = run("ip", "addr", "flush", "dev", "lo") })
	l.owner, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	l.must(err)
	t.Cleanup(l.owner.Close)
	return l
}

func (l *lab) must(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

func run(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (l *lab) ip(format string, args ...any) {
	l.Helper()
	l.must(run(append([]string{"ip"}, strings.Fields(fmt.Sprintf(format, args...))...)...))
}

// route is one of those that move, by a way.
func (l *lab) route(dst string, way int) *netlink.Route {
	l.Helper()
	_, net4, err := net.ParseCIDR(dst)
	l.must(err)
	family := 0
	if strings.Contains(dst, ":") {
		family = 1
	}
	link, err := l.owner.LinkByName(fmt.Sprintf("nic%d", way))
	l.must(err)
	r := &netlink.Route{Dst: net4, Gw: net.ParseIP(gateways[family][way]), LinkIndex: link.Attrs().Index}
	if family == 1 {
		r.Priority = 1024
	}
	return r
}

// move has the owner of the default routes lead them the other way, or a more specific route come, and says which way is the new one.
func (l *lab) move(specific bool) (way int) {
	l.Helper()
	way = 1 - l.way
	dsts := defaults
	if specific {
		dsts, l.specific = specifics, way
	} else {
		l.way = way
	}
	for _, dst := range dsts {
		l.must(l.owner.RouteReplace(l.route(dst, way)))
	}
	return way
}

// back takes the more specific routes away.
func (l *lab) back() {
	l.Helper()
	if l.specific < 0 {
		return
	}
	for _, dst := range specifics {
		l.must(l.owner.RouteDel(l.route(dst, l.specific)))
	}
	l.specific = -1
}

// storm changes other routes, a tenth of them below the agent's clones, as fast as the kernel takes them, until it is told to stop.
func (l *lab) storm() (stop func()) {
	l.Helper()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	l.must(err)
	end := make(chan struct{})
	var wg sync.WaitGroup
	n := 0
	var routes [2][]*netlink.Route
	for way := range 2 {
		for i := range 1000 {
			dst := fmt.Sprintf("11.%d.%d.0/24", i/250, i%250)
			if i%10 == 0 { // inside of what is covered, so that each has a clone or a throw of its own
				dst = fmt.Sprintf("10.3.%d.0/24", 100+i/10)
			}
			routes[way] = append(routes[way], l.route(dst, way))
		}
	}
	wg.Go(func() {
		defer h.Close()
		for ; ; n++ {
			select {
			case <-end:
				return
			default:
			}
			if e := h.RouteReplace(routes[n/1000%2][n%1000]); e != nil {
				err = e
				return
			}
		}
	})
	began := time.Now()
	return func() {
		l.Helper()
		close(end)
		wg.Wait()
		l.must(err)
		l.Logf("the storm: %d changes, %.0f in a second", n, float64(n)/time.Since(began).Seconds())
		for _, r := range routes[0] {
			_ = l.owner.RouteDel(&netlink.Route{Dst: r.Dst}) // some are not there yet
		}
	}
}

// An agent is one that runs, and who waits for its end.
type agent struct {
	cmd  *exec.Cmd
	log  *bytes.Buffer
	gone chan struct{}
	then func() // what who waits for its end does then
}

const config = "presume_mtu: 1400\nmetrics: off\nrestore_after: 100ms\nrun_dir: /run/window\nstate_dir: /run/window-state\n"

// start starts an agent, and waits until packets go by its clones.
func (l *lab) start(then func()) *agent {
	l.Helper()
	const file = "/run/window.yaml"
	l.must(os.WriteFile(file, []byte(config), 0o644))
	a := &agent{cmd: exec.Command(filepath.Join(l.bin, "tsoagent"), "run", "-c", file), log: &bytes.Buffer{}, gone: make(chan struct{}), then: then}
	log, err := os.CreateTemp(host.WorkDir(), "log")
	l.must(err)
	a.cmd.Stderr = log
	l.must(a.cmd.Start())
	go func() {
		defer close(a.gone)
		_ = a.cmd.Wait()
		if a.then != nil {
			a.then()
		}
		_ = log.Close()
	}()
	within(l, "the locks are in place", func() bool { return l.cloned() })
	return a
}

// cloned reports whether both families have their rules and clones, and the kernel routes by them.
func (l *lab) cloned() bool {
	for _, args := range [][]string{{"-4", "10.3.0.1", "from", "10.1.0.1"}, {"-6", "fd10::1", "from", "fd00:1::1"}} {
		out, err := exec.Command("ip", append([]string{args[0], "route", "get"}, args[1:]...)...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "table 5450") {
			return false
		}
	}
	return true
}

// bare reports whether no rule of ours is there.
func (l *lab) bare() bool {
	out, err := exec.Command("sh", "-c", "ip rule; ip -6 rule").CombinedOutput()
	return err == nil && !strings.Contains(string(out), "545")
}

// stop ends an agent gracefully.
func (l *lab) stop(a *agent) {
	l.Helper()
	a.then = nil
	_ = a.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-a.gone:
	case <-time.After(patience):
		l.Fatal(errors.New("the agent does not end"))
	}
}

// killGuard kills an agent's guard, and waits until it is dead. The agent starts another one a second later, which none of these agents sees.
func (l *lab) killGuard(a *agent) error {
	l.Helper()
	pids := func() (out []int) {
		all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", a.cmd.Process.Pid))
		for _, file := range all {
			text, _ := os.ReadFile(file)
			for _, f := range strings.Fields(string(text)) {
				pid, _ := strconv.Atoi(f)
				out = append(out, pid)
			}
		}
		return out
	}
	if len(pids()) != 1 {
		return fmt.Errorf("the agent has %d children, not one", len(pids()))
	}
	if err := unix.Kill(pids()[0], unix.SIGKILL); err != nil {
		return err
	}
	within(l, "the guard is dead", func() bool { return len(pids()) == 0 })
	return nil
}

// tsoctl runs one.
func (l *lab) tsoctl(verb ...string) error {
	return run(append(append([]string{filepath.Join(l.bin, "tsoctl")}, verb...), "-c", "/run/window.yaml")...)
}
