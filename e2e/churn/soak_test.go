package churn

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestAgentStaysFlat has one agent live through churn: routes, policies, SAs, devices, whole namespaces and clients come and go at random. After
// each round all that came has gone again, so that the agent has as much to remember as before the first one. What it has of the machine's
// (memory, goroutines, file descriptors, threads, processes, mounts) must not grow from the first rounds to the last ones. `make soak` has it run
// for hours, TSOAGENT_SOAK; the short one finds what leaks with each round.
func TestAgentStaysFlat(t *testing.T) {
	host.Need(t, map[string]string{"ip": "iproute2"})
	var long time.Duration
	if s := os.Getenv("TSOAGENT_SOAK"); s != "" {
		var err error
		if long, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	l := &lab{T: t, bin: build(t)}
	l.wire("namespaces: all\n")
	seed := rand.Uint64()
	a, base := l.soaked()
	t.Cleanup(a.stop)
	begin := time.Now()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d, after %s, %d rounds; what the agent knows otherwise than it should (-should +does: links, routes, policies, SAs, namespaces):\n%s\nwhat the kernel has:\n%s\n%s",
				seed, time.Since(begin).Round(time.Second), len(a.series), l.off, kernelHas(), a.series)
		}
	}()
	for i := 0; i < warmRounds+shortRounds || time.Since(begin) < long; i++ {
		d := draw{rand.New(rand.NewPCG(seed, uint64(i)))}
		l.rest(a.churn(d), base)
		if i >= warmRounds {
			a.sample()
		}
	}
	t.Logf("%d rounds of %d changes in %s, seed %d\n%s", len(a.series), changes, time.Since(begin).Round(time.Second), seed, a.series)
	t.Logf("the runtime's memory, at first and in the end:\n%s", strings.Join(a.runtimes, "\n"))
	for _, grown := range a.series.grown() {
		t.Error(grown)
	}
}

// Rounds before anything is counted, and those of the short soak. The agent keeps its newest 2048 events: a round's changes lead to
// some hundred, and then the ring is full.
const (
	warmRounds  = 10
	shortRounds = 15
	changes     = 100
)

// soaked starts the agent that is watched, and returns its plan when nothing is to be done.
func (l *lab) soaked() (*watched, plan) {
	l.Helper()
	a := &watched{T: l.T, bin: l.bin, socket: "/run/tsoagent/tsoagent.sock"}
	log, err := os.Create(filepath.Join(host.WorkDir(), "log"))
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { log.Close() })
	a.cmd = exec.Command(filepath.Join(l.bin, "tsoagent"), "run", "-c", configFile)
	a.cmd.Stderr, a.log = log, log.Name()
	if err := a.cmd.Start(); err != nil {
		l.Fatal(err)
	}
	within(l.T, "the agent answers", func() bool { _, err := l.ask("status"); return err == nil })
	within(l.T, "the devices are up", func() bool {
		out, err := exec.Command("ip", "-o", "link", "show").Output()
		return err == nil && strings.Count(string(out), " state UP ") == 4
	})
	l.done() // it has read that
	var base plan
	batch("xfrm policy delete src 172.31.0.0/16 dst 203.0.113.7 dir out", "route del 203.0.113.1")
	within(l.T, "the first lock alone is there", func() bool {
		base, err = l.ask("status")
		return err == nil && len(base.Clones) == 1 && base.lingers == 0 && base.policies == 1
	})
	return a, base
}

// rest takes back all that was drawn, and waits until the agent has only what it had at first. A route and a policy that come last, and then go,
// tell that it has read everything.
func (l *lab) rest(drawn []string, base plan) {
	l.Helper()
	within(l.T, "the routes that were drawn are gone", noneDrawn)
	last := []string{"route add 203.0.114.1 via 192.0.2.9", "xfrm policy add src 172.31.0.0/16 dst 203.0.114.1 dir out"}
	batch(slices.Concat(takenBack(drawn), last)...)
	more := base
	more.routes, more.policies = base.routes+1, base.policies+1
	within(l.T, "the agent has read it all", func() bool { return l.restsAt(more) })
	batch("route del 203.0.114.1", "xfrm policy delete src 172.31.0.0/16 dst 203.0.114.1 dir out")
	within(l.T, "the agent rests", func() bool { return l.restsAt(base) })
}

// noneDrawn takes drawn routes away, and reports whether none is left: `ip route flush` deletes what it has read, and gives up where a route is
// another one by then ("Failed to send flush request: No such process"), as it is when the agent locks it in place.
func noneDrawn() bool {
	batch(flushes...)
	out, err := exec.Command("sh", "-c", "ip route show root 10.0.0.0/8 && ip -6 route show root fd10::/16").Output()
	return err == nil && len(out) == 0
}

// restsAt says whether the agent knows as much of the kernel as is wanted, and has no more written than at first: the first lock may be withdrawn,
// for a minute.
func (l *lab) restsAt(want plan) bool {
	got, err := l.ask("status")
	if err != nil {
		l.Fatal(err)
	}
	count := func(p plan) [5]int {
		return [...]int{p.links, p.routes - len(p.Clones), p.policies, p.sas, p.namespaces}
	}
	l.off = cmp.Diff(count(want), count(got))
	return l.off == "" && got.lingers == 0 && len(got.Locks) == 0 && len(got.Clones) <= 1 && len(got.Rules) <= 1
}

// kernelHas lists what the agent's counts are of, but for the SAs, which have keys: whose fault it is when they are others than they should be.
func kernelHas() string {
	out, err := exec.Command("sh", "-c", "ip -br link; ip route show table all; ip -6 route show table all; ip xfrm policy; ip netns list").CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s%v", out, err)
	}
	return string(out)
}

var flushes = []string{"route flush root 10.0.0.0/8", "-6 route flush root fd10::/16"}

// takenBack is what takes back lines of ip that were drawn.
func takenBack(drawn []string) []string {
	back := append([]string{"xfrm state flush"}, flushes...)
	for _, line := range drawn {
		if f := strings.Fields(line); f[0] == "xfrm" && f[1] == "policy" && f[2] != "delete" {
			back = append(back, "xfrm policy delete "+strings.Join(f[3:9], " "))
		}
	}
	slices.Sort(back)
	return slices.Compact(back)
}

// churn is one round. It returns the changes that were drawn.
func (a *watched) churn(d draw) []string {
	a.Helper()
	// Devices and a namespace come, with something to do for the agent in each. Not every kernel has vxlan.
	batch("netns add drawn", "link add drawn0 type veth peer name drawn2", "link set drawn0 up", "link set drawn2 up", "addr add 10.9.0.1/24 dev drawn0",
		"link add drawn1 type vxlan id 9 remote 192.0.2.77 dstport 4789 dev nic0", "link set drawn1 up", "-6 addr add fd10:9::1/64 dev drawn1 nodad")
	inside := exec.Command("ip", "-netns", "drawn", "-force", "-batch", "-")
	inside.Stdin = strings.NewReader("link set lo up\nlink add n0 type veth peer name n1\nlink set n0 up\nlink set n1 up\naddr add 192.0.2.1/24 dev n0\nroute add default via 192.0.2.9\n" + marked + template + "\n")
	if out, err := inside.CombinedOutput(); err != nil {
		a.Fatalf("in a namespace of its own: %v\n%s", err, out)
	}
	follower, err := net.Dial("unix", a.socket)
	if err == nil {
		_, err = follower.Write([]byte("GET /v1/events?since=0&follow=true HTTP/1.1\r\nHost: tsoagent\r\n\r\n"))
	}
	if err != nil {
		a.Fatal(err)
	}
	lines := make([]string, 0, changes)
	for range changes {
		lines = append(lines, d.soakChange())
	}
	batch(lines...)
	within(a.T, "the namespace is followed", func() bool {
		return exec.Command(filepath.Join(a.bin, "tsoctl"), "locks", "--netns", "drawn").Run() == nil
	})
	if _, err := a.get("/metrics", "tcp", "127.0.0.1:15450"); err != nil {
		a.Error(err)
	}
	follower.Close()
	batch("netns del drawn", "link del drawn0", "link del drawn1")
	return lines
}

// soakChange is a change as any other, or one of an SA. A kernel without ESP refuses those.
func (d draw) soakChange() string {
	if d.IntN(8) > 0 {
		return d.change()
	}
	sa := fmt.Sprintf("src 192.0.2.1 dst %s proto esp spi %#x", d.of("192.0.2.77", "10.2.1.1"), 0x100+d.IntN(4))
	if d.IntN(2) == 0 {
		return "xfrm state delete " + sa
	}
	return "xfrm state add " + sa + " mode tunnel reqid " + d.of("1", "2") + " aead 'rfc4106(gcm(aes))' 0x" + strings.Repeat("17", 20) + " 128"
}

// batch gives ip lines, some of which may fail. A failing line of `ip -batch` can end it, and none has options of its own.
func batch(lines ...string) {
	cmd := exec.Command("sh")
	cmd.Stdin = strings.NewReader("ip " + strings.Join(lines, "\nip ") + "\n")
	_ = cmd.Run()
}

// get asks one of the agent's two servers.
func (a *watched) get(path, network, address string) ([]byte, error) {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}
	defer tr.CloseIdleConnections()
	return fetch(&http.Client{Transport: tr, Timeout: time.Minute}, "http://tsoagent"+path)
}

// stop ends the agent, which must have nothing to complain of.
func (a *watched) stop() {
	if err := a.cmd.Process.Signal(unix.SIGTERM); err != nil {
		a.Error(err)
	}
	if err := a.cmd.Wait(); err != nil {
		text, _ := os.ReadFile(a.log)
		a.Errorf("the agent: %v\n%s", err, text[max(0, len(text)-4096):])
	}
}
