package churn

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
)

// TestAgentKeepsUpWithChurn lets routes, policies and what they stand on change under an agent. When it wants nothing more, what it wants is in force in the kernel, and
// its plan is the one that `tsoctl plan` makes from scratch once the agent has gone, and nothing of it is left behind. `make soak` has very many
// rounds, TSOAGENT_CHURN_ROUNDS, and other ones each time; otherwise a few that are always the same.
func TestAgentKeepsUpWithChurn(t *testing.T) {
	host.Need(t, map[string]string{"ip": "iproute2"})
	n, seed := 12, uint64(1)
	if rounds := os.Getenv("TSOAGENT_CHURN_ROUNDS"); rounds != "" {
		var err error
		if n, err = strconv.Atoi(rounds); err != nil {
			t.Fatal(err)
		}
		seed = rand.Uint64()
	}
	l := &lab{T: t, bin: build(t)}
	l.wire("")
	followed := 0
	for i := range n {
		d := draw{rand.New(rand.NewPCG(seed, uint64(i)))}
		followed += l.round(d)
		if t.Failed() {
			t.Fatalf("in round %d of seed %d", i, seed)
		}
	}
	if followed == 0 {
		t.Error("no coverage was ever locked: nothing was compared")
	}
}

// What tells that the agent has read everything are a route and a policy inside the selector of another one, which is there from the start: they
// change what is in a table of the agent's and none of its rules, after which the plan is made from scratch.
const (
	marked   = "xfrm policy add src 172.31.0.0/16 dst 203.0.113.0/24 dir out priority 5"
	template = " tmpl src 192.0.2.1 dst 192.0.2.78 proto esp mode tunnel"
	bypass   = "xfrm policy add src 172.31.0.0/16 dst 203.0.113.7 dir out"
)

type lab struct {
	*testing.T
	bin string
	off string // why the agent was not at rest when it was asked last
}

// configFile is the configuration of the agent and of tsoctl.
const configFile = "/run/tsoagent.yaml"

// wire makes two NICs with addresses, and a default route. The next test makes them anew, and starts with nothing of this one's: a blackhole
// outlives every device. More is for the configuration.
func (l *lab) wire(more string) {
	l.Helper()
	l.Cleanup(func() { batch(append(takenBack(nil), "link del nic0", "link del nic1", "xfrm policy flush")...) })
	// Without addresses of their own devices have no routes that come some time later.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/addr_gen_mode", []byte("1"), 0); err != nil {
		l.Fatal(err)
	}
	for _, line := range []string{
		"link set lo up", "link add nic0 type veth peer name far0", "link add nic1 type veth peer name far1",
		"link set nic0 up", "link set far0 up", "link set nic1 up", "link set far1 up",
		"addr add 192.0.2.1/24 dev nic0", "addr add 198.51.100.1/24 dev nic1",
		"-6 addr add fd00:2::1/64 dev nic0 nodad", "-6 addr add fd00:3::1/64 dev nic1 nodad",
		"route add default via 192.0.2.9", "-6 route add default via fd00:2::9",
	} {
		if err := ip("%s", line); err != nil {
			l.Fatal(err)
		}
	}
	// The kernel is asked about packets that come in by one of them, from anywhere (inForce). The host as a whole does not forward.
	for file, value := range map[string]string{"all/rp_filter": "0", "nic0/rp_filter": "0", "nic0/forwarding": "1"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+file, []byte(value), 0); err != nil {
			l.Fatal(err)
		}
	}
	if err := ip(marked + template); err != nil {
		l.Fatal(err)
	}
	// The kernel here need not have ESP: without SAs the MTU is presumed.
	if err := os.WriteFile(configFile, []byte("presume_mtu: 1400\nrestore_after: 100ms\n"+more), 0o644); err != nil {
		l.Fatal(err)
	}
}

// round runs an agent through some changes, and returns how much it had locked in the end.
func (l *lab) round(d draw) int {
	l.Helper()
	log, err := os.Create(filepath.Join(host.WorkDir(), "log"))
	if err != nil {
		l.Fatal(err)
	}
	defer log.Close()
	agent := exec.Command(filepath.Join(l.bin, "tsoagent"), "run", "-c", configFile)
	agent.Stderr = log
	if err := agent.Start(); err != nil {
		l.Fatal(err)
	}
	within(l.T, "the agent answers", func() bool { _, err := l.ask("status"); return err == nil })
	// Most rounds are short: what an early change should have led to, a later one nearby can lead to as well.
	for range []int{1, 2, 3, 4, 40}[d.IntN(5)] {
		line := d.change()
		if d.IntN(6) == 0 {
			line = d.deviceChange()
		}
		_ = ip("%s", line) // some delete what is not there
	}
	got := l.done()
	l.inForce(got)
	if err := agent.Process.Signal(unix.SIGTERM); err != nil {
		l.Fatal(err)
	}
	if err := agent.Wait(); err != nil {
		text, _ := os.ReadFile(log.Name())
		l.Errorf("the agent: %v\n%s", err, text)
	}
	want, err := l.ask("plan")
	if err != nil {
		l.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(plan{})); diff != "" {
		l.Errorf("the agent's plan is another one than from scratch (-from scratch +the agent's):\n%s", diff)
	}
	if err := errors.Join(ip("xfrm policy delete src 172.31.0.0/16 dst 203.0.113.7 dir out"), ip("route del 203.0.113.1")); err != nil {
		l.Fatal(err)
	}
	out, err := exec.Command("sh", "-c", "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all").CombinedOutput()
	if err != nil || strings.Contains(string(out), "545") || strings.Contains(string(out), "mtu lock") {
		l.Errorf("left behind, %v:\n%s", err, out)
	}
	l.Logf("%d coverages, %d locks, %d clones, %d rules", len(got.Coverages), len(got.Locks), len(got.Clones), len(got.Rules))
	return len(got.Clones) + len(got.Locks)
}

// done is the plan of an agent that has read all that was changed, and gives nothing back any more: the last changes tell, as events come in
// their order.
func (l *lab) done() (got plan) {
	l.Helper()
	if err := errors.Join(ip(bypass), ip("route add 203.0.113.1 via 192.0.2.9")); err != nil {
		l.Fatal(err)
	}
	within(l.T, "the agent is done", func() bool {
		var err error
		if got, err = l.ask("status"); err != nil {
			l.Fatal(err)
		}
		has := func(dst string) bool {
			return slices.ContainsFunc(got.Clones, func(c string) bool { return strings.HasPrefix(c, dst) })
		}
		return got.lingers == 0 && !got.withdrawn && has("203.0.113.1/32 ") && has("203.0.113.7/32 ")
	})
	return got
}

// plan is what two agents that come to the same must agree in: all but the numbers of tables, which depend on which were free.
type plan struct {
	Coverages, Locks, Rules, Clones []string
	lingers                         int // how many coverages are of policies that went
	// withdrawn says that a lock rests, as a route moved while the kernel was asked where packets go with it. It is tried again after a minute.
	withdrawn bool
	// Of what the kernel has: how much of each kind, and the namespaces that are followed.
	links, routes, policies, sas, namespaces int
	// What is in place, or is to be.
	rules  []rule
	clones []clone
}

type rule struct {
	Family, Text    string
	Priority, Table int
}

type clone struct {
	Dst     netip.Prefix
	Table   int
	MTU     int
	Throw   bool
	Devices []string
}

// ask is what a verb of tsoctl answers.
func (l *lab) ask(verb string) (plan, error) {
	out, err := exec.Command(filepath.Join(l.bin, "tsoctl"), verb, "-c", configFile, "-o", "json").Output()
	if len(out) == 0 {
		return plan{}, fmt.Errorf("tsoctl %s: %w", verb, err)
	}
	var r struct {
		Coverages []struct {
			Policy, MTU int
			Gone        bool
			Locked      []string
			Notes       []string
			Carriers    []string
		}
		Links, Routes, Policies, SAs int
		Namespaces                   []struct{}
		Findings                     []string
		Locks                        []struct {
			Route string
			MTU   int
		}
		Rules  []rule
		Clones []clone
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return plan{}, err
	}
	p := plan{
		withdrawn: slices.ContainsFunc(r.Findings, func(f string) bool { return strings.Contains(f, "withdrawn:") }),
		rules:     r.Rules, clones: r.Clones,
		links: r.Links, routes: r.Routes, policies: r.Policies, sas: r.SAs, namespaces: len(r.Namespaces),
	}
	tables := map[string]string{}
	for _, rule := range r.Rules {
		text, _, _ := strings.Cut(rule.Text, " lookup")
		p.Rules = append(p.Rules, fmt.Sprintf("%s %d: %s", rule.Family, rule.Priority, text))
		tables[fmt.Sprintf("%t %d", rule.Family == "ipv6", rule.Table)] = text
	}
	table := func(dst string, n int) string { return tables[fmt.Sprintf("%t %d", strings.Contains(dst, ":"), n)] }
	for _, c := range r.Coverages {
		if c.Gone {
			p.lingers++
			continue
		}
		for i, s := range c.Locked {
			var dst string
			var n, mtu int
			if _, err := fmt.Sscanf(s, "%s table %d mtu %d", &dst, &n, &mtu); err == nil {
				c.Locked[i] = fmt.Sprintf("%s [%s] mtu %d", dst, table(dst, n), mtu)
			}
		}
		slices.Sort(c.Locked)
		p.Coverages = append(p.Coverages, fmt.Sprintf("policy %d mtu %d locked %q notes %q carriers %q", c.Policy, c.MTU, c.Locked, c.Notes, c.Carriers))
	}
	for _, k := range r.Locks {
		p.Locks = append(p.Locks, fmt.Sprintf("%s mtu %d", k.Route, k.MTU))
	}
	for _, c := range r.Clones {
		p.Clones = append(p.Clones, fmt.Sprintf("%s [%s] mtu %d throw %t by %q", c.Dst, table(c.Dst.String(), c.Table), c.MTU, c.Throw, c.Devices))
	}
	for _, list := range [][]string{p.Coverages, p.Locks, p.Rules, p.Clones} {
		slices.Sort(list)
	}
	return p, nil
}

// within waits until something is so. The bound is for a lock that was withdrawn, and for a machine that is very busy.
func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within three minutes: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
