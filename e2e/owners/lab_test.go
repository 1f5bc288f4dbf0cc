package owners

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/harness"
)

// patience is how long anything may take on a machine that is busy.
const patience = 60 * time.Second

// base is what each world begins with: three NICs, sources that policies cover, a way out, and a route all of whose flows are covered. Nothing of it
// is random. What has no address family in its words comes twice.
const base = `link set lo up
link add nic0 address 02:00:00:00:00:10 type veth peer name far0 address 02:00:00:00:00:20
link add nic1 address 02:00:00:00:00:11 type veth peer name far1 address 02:00:00:00:00:21
link add nic2 address 02:00:00:00:00:12 type veth peer name far2 address 02:00:00:00:00:22
link add marker address 02:00:00:00:00:30 type veth peer name marker2 address 02:00:00:00:00:31
link set far0 up
link set far1 up
link set far2 up
link set nic0 up
link set nic1 up
link set nic2 up
addr add 192.0.2.1/24 dev nic0
addr add 198.51.100.1/24 dev nic1
addr add 203.0.113.1/24 dev nic2
addr add 10.9.0.1/32 dev lo
addr add 10.9.1.1/32 dev lo
addr add fd00:2::1/64 dev nic0 nodad
addr add fd00:3::1/64 dev nic1 nodad
addr add fd00:4::1/64 dev nic2 nodad
addr add fd09::1/128 dev lo nodad
addr add fd09:0:1::1/128 dev lo nodad
route add default via 192.0.2.9
route add default via fd00:2::9 dev nic0
route add 10.5.0.0/16 via 198.51.100.9
route add fd05::/16 via fd00:3::9 dev nic1
`

// policies are those of a world that has none of its own. A part of a source's flows is covered, all flows of a route are, one port, and there is a
// bypass in the middle.
const policies = `xfrm policy add src 10.9.0.0/24 dst 10.3.0.0/16 dir out priority 100 tmpl src 192.0.2.1 dst 192.0.2.77 proto esp mode tunnel reqid 1
xfrm policy add src 10.9.0.0/16 dst 10.3.7.0/24 dir out priority 50
xfrm policy add src 0.0.0.0/0 dst 10.5.0.0/16 dir out priority 100 tmpl src 192.0.2.1 dst 192.0.2.78 proto esp mode tunnel reqid 2
xfrm policy add src 10.9.1.0/24 dst 10.6.0.0/16 proto tcp dport 5001 dir out priority 100 tmpl src 198.51.100.1 dst 198.51.100.77 proto esp mode tunnel reqid 3
xfrm policy add src fd09::/64 dst fd03::/16 dir out priority 100 tmpl src fd00:2::1 dst fd00:2::77 proto esp mode tunnel reqid 4
xfrm policy add src fd09::/48 dst fd03:7::/48 dir out priority 50
xfrm policy add src ::/0 dst fd05::/16 dir out priority 100 tmpl src fd00:2::1 dst fd00:2::78 proto esp mode tunnel reqid 5
xfrm policy add src fd09:0:1::/64 dst fd06::/16 proto tcp dport 5001 dir out priority 100 tmpl src fd00:3::1 dst fd00:3::77 proto esp mode tunnel reqid 6
`

// A lab is one world twice: the namespace with the agent, and one that never sees it.
type lab struct {
	testing.TB
	bin, dir    string
	ours, other *harness.Netns
	asks        [2]asker // in ours and in the other
	talk        interview
	packets     []packet
	marks       int
	agent       *exec.Cmd
	done        chan error // of the agent
	log         *os.File
	socket      *http.Client
	numbered    bool // the kernel has given a rule its priority
	broadcast   map[netip.Addr]bool
	strict      bool // flows that no policy covers have no lock, also those of the host itself
	tunnels     []policy

	asked, locked, cloned int
}

// newLab makes both namespaces alike.
func newLab(t testing.TB, bin string, seed *rand.Rand, config string, lines ...string) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "owners-") // which is this process's own
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{TB: t, bin: bin, dir: dir, strict: strings.Contains(config, "source_less_lookups: off"), talk: interview{Rand: seed}}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if !strings.Contains(config, "metrics: ") {
		config += "metrics: off\n"
	}
	l.must(os.WriteFile(l.config(), fmt.Appendf(nil, "presume_mtu: 1400\nrestore_after: 20ms\nrun_dir: %s\nstate_dir: %s\n%s", dir, dir, config), 0o644))
	sysctls := []string{"ipv4/ip_forward 1", "ipv6/conf/all/forwarding 1"}
	for i, n := range []**harness.Netns{&l.ours, &l.other} {
		*n = harness.NewNetns(t, base, sysctls...)
		t.Cleanup((*n).Close)
		l.asks[i], err = newAsker(*n)
		l.must(err)
		t.Cleanup(func() { _ = l.asks[i].Close() })
	}
	for line := range strings.Lines(base) {
		l.talk.read(strings.TrimSpace(line))
	}
	l.broadcast = map[netip.Addr]bool{}
	for _, a := range addrs("192.0.2.255", "198.51.100.255", "203.0.113.255") {
		l.broadcast[a] = true
	}
	l.talk.own = [2][]netip.Addr{
		addrs("192.0.2.1", "198.51.100.1", "203.0.113.1", "10.9.0.1", "10.9.1.1"),
		addrs("fd00:2::1", "fd00:3::1", "fd00:4::1", "fd09::1", "fd09:0:1::1"),
	}
	for _, name := range []string{"nic0", "nic1", "nic2", "far0", "lo"} {
		l.talk.devices = append(l.talk.devices, l.ifindex(name))
	}
	l.change(lines...)
	return l
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func (l *lab) config() string { return filepath.Join(l.dir, "tsoagent.yaml") }

func (l *lab) must(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

func (l *lab) ifindex(name string) (index uint32) {
	l.Helper()
	l.must(l.ours.In(func() error {
		i, err := net.InterfaceByName(name)
		if err == nil {
			index = uint32(i.Index)
		}
		return err
	}))
	return index
}

// change has something happen in both namespaces.
func (l *lab) change(lines ...string) {
	l.Helper()
	for _, line := range lines {
		l.talk.read(line)
		l.policy(line)
		l.numbered = l.numbered || strings.Contains(line, "rule add") && !strings.Contains(line, " pref ")
		l.must(l.ours.Do(line))
		l.must(l.other.Do(line))
	}
}

// draw draws the packets that are asked about from now on, from what the world's lines have named so far.
func (l *lab) draw(n int) {
	l.packets = l.packets[:0]
	for range n {
		l.packets = append(l.packets, l.talk.packet())
	}
}

// start starts an agent that enforces, and waits until it is ready.
func (l *lab) start() {
	l.Helper()
	var err error
	l.log, err = os.Create(filepath.Join(l.dir, "log"))
	l.must(err)
	l.agent = exec.Command(filepath.Join(l.bin, "tsoagent"), "run", "-c", l.config())
	l.agent.Stderr = l.log
	l.must(l.ours.Start(l.agent))
	l.done = make(chan error, 1)
	go func(cmd *exec.Cmd, done chan<- error) { done <- cmd.Wait() }(l.agent, l.done)
	l.Cleanup(func() {
		_ = l.agent.Process.Kill() // it may have ended
		if l.Failed() {
			text, _ := os.ReadFile(l.log.Name())
			l.Logf("the agent said:\n%s", text)
		}
		l.log.Close()
	})
	l.socket = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(l.dir, "tsoagent.sock"))
	}}}
	l.within("the agent answers", func() error { return l.get("report", &report{}) })
}

// stop ends the agent, and reports how.
func (l *lab) stop(sig unix.Signal) error {
	l.Helper()
	l.must(l.agent.Process.Signal(sig))
	select {
	case err := <-l.done:
		return err
	case <-time.After(patience):
		l.Fatal("the agent does not end")
	}
	return nil
}

// tsoctl runs one.
func (l *lab) tsoctl(args ...string) {
	l.Helper()
	_, err := l.ours.Run("", append(append([]string{filepath.Join(l.bin, "tsoctl")}, args...), "-c", l.config())...)
	l.must(err)
}

// report is what the control API says, as far as it is used here.
type report struct {
	Coverages []struct {
		Priority uint32
		Gone     bool
		Src      string
		Notes    []string
	}
	Rules []struct {
		Family          string
		Priority, Table uint32
		State           string
	}
	Clones []struct {
		Table, MTU    uint32
		Dst           netip.Prefix
		Throw, Locked bool
		State         string
	}
	Locks []struct {
		Route  string
		MTU    uint32
		Locked bool
		State  string
	}
	Findings []string
	Counters struct{ Actions, Failed uint64 }
}

type devices struct {
	Devices []struct {
		Device string
		MTU    int
	}
}

// get asks the agent.
func (l *lab) get(what string, into any) error {
	resp, err := l.socket.Get("http://agent/v1/" + what)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// within waits until something is so.
func (l *lab) within(what string, ask func() error) {
	l.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		err := ask()
		if err == nil {
			return
		}
		select {
		case err := <-l.done:
			l.Fatalf("%s: the agent has ended: %v", what, err)
		default:
		}
		if time.Now().After(end) {
			l.Fatalf("not within %v: %s: %v", patience, what, err)
		}
	}
}

// The marker's policy is one of the world's, and nobody's flows are inside of it. Its priority, and the MTU of a device by which nothing leaves, tell
// that the agent has read all that came before.
const markerPolicy = "xfrm policy update src 172.31.255.0/24 dst 192.88.99.0/24 dir out priority %d tmpl src 192.0.2.1 dst 192.0.2.79 proto esp mode tunnel reqid 9"

// settle waits until the agent has read all that has happened, and has done what follows from it.
func (l *lab) settle() (r report) {
	l.Helper()
	actions := ^uint64(0)
	l.within("the agent is done", func() error {
		l.marks++
		priority, mtu := uint32(1<<20+l.marks), 1300+l.marks
		l.must(errors.Join(l.ours.Do(fmt.Sprintf(markerPolicy, priority)), l.ours.Do(fmt.Sprintf("link set marker mtu %d", mtu))))
		l.within("the agent reads", func() error {
			var d devices
			r = report{} // what is left out says nothing of what was there before
			if err := errors.Join(l.get("devices", &d), l.get("report", &r)); err != nil {
				return err
			}
			for _, dev := range d.Devices {
				if dev.Device == "marker" && dev.MTU != mtu {
					return fmt.Errorf("the marker's MTU is %d there, not %d", dev.MTU, mtu)
				}
			}
			for _, c := range r.Coverages {
				if c.Priority == priority {
					return nil
				}
			}
			return errors.New("the policy is not there")
		})
		before := actions
		if actions = r.Counters.Actions; before != actions {
			return fmt.Errorf("%d writes so far", actions)
		}
		for _, c := range r.Coverages {
			if c.Gone {
				return errors.New("something is about to be given back")
			}
		}
		return nil
	})
	l.must(l.other.Do(fmt.Sprintf(markerPolicy, 1<<20+l.marks)))
	return r
}

// compare asks both namespaces about all packets. r is what the agent says, nil for none: nothing may differ then.
func (l *lab) compare(when string, r *report) {
	l.Helper()
	wrong := 0
	for _, p := range l.packets {
		objects := false
		for _, match := range []bool{true, false} {
			var got [2]answer
			for i, a := range l.asks {
				var err error
				got[i], err = a.ask(p, match)
				l.must(err)
			}
			l.asked++
			if match {
				objects = got[0].nhid != 0 || got[1].nhid != 0
			}
			if why := l.differs(p, got[0], got[1], objects, r); why != "" {
				l.Errorf("%s: %s (the route %v): %s\n\twith:    %s\n\twithout: %s", when, p, match, why, got[0], got[1])
				wrong++
			}
		}
		if wrong > 4 {
			rules, _ := l.ours.Run("", "sh", "-c", "ip rule; ip -6 rule; ip route show table all | grep -v 'table local'; ip -6 route show table all | grep -v 'table local\\|^fe80'; ip -o xfrm policy")
			l.Fatalf("%s: and so on. In the namespace with the agent:\n%s", when, rules)
		}
	}
}

// loopback is the index of lo: what comes in by it is the host's own.
const loopback = 1

// ownTable reports whether a table is one of those those that the agent may use (docs/configuration.md: table).
func ownTable(t uint32) bool { return t >= 5450 && t < 5450+64 }

// differs says what is wrong with an answer, or nothing.
func (l *lab) differs(p packet, got, want answer, objects bool, r *report) string {
	if objects && p.dst.Is6() {
		if ownTable(got.table) && p.oif != 0 && got.by(p.oif) && !want.by(p.oif) {
			return "" // the kernel obeys the hash of a group of objects and not the device, and in a copy, with the ways written out, the device (docs/limits.md)
		}
		// The kernel keeps what it has looked up at the nexthop object, and names the route by which it was looked up first (rt6_make_pcpu_route).
		got.nhid, got.table, got.dst, got.metric, got.src, got.mtu, got.locked = want.nhid, want.table, want.dst, want.metric, want.src, want.mtu, want.locked
		if got.dst.IsValid() {
			got.hops = want.hops // of that one as well
		}
	}
	if p.dst.Is4() && want.typ > unix.RTN_UNICAST && want.table == unix.RT_TABLE_MAIN && got.table == unix.RT_TABLE_LOCAL {
		want.table = unix.RT_TABLE_LOCAL // IPv4 has both tables in one until the namespace has its first rule (fib_unmerge)
	}
	if p.dst.Is4() && p.iif != 0 && l.broadcast[p.src] && got.errno == unix.EINVAL {
		return "" // from its first rule on, a namespace drops such sources (docs/limits.md)
	}
	same := got
	same.nhid = want.nhid // clones have the object's ways written out
	if r == nil {
		if got != want {
			return "it differs"
		}
		return ""
	}
	mtu, own := got.mtu != want.mtu || got.locked != want.locked, ownTable(got.table)
	same.mtu, same.locked = want.mtu, want.locked
	if own {
		same.table, same.dst, same.metric = want.table, want.dst, want.metric
		l.cloned++
	}
	switch {
	case same != want:
		return "it goes another way"
	case !mtu && !own:
		return ""
	}
	l.locked++
	if why := l.planned(got, r); why != "" {
		return why
	}
	// A second rule serves the host's own lookups without a source, and takes others along (docs/limits.md).
	served := own && p.dst.Is6() && p.iif <= loopback && !l.strict
	bound := own && p.oif != 0
	if p.src.IsValid() && !l.covers(p) && !served && !bound {
		return "a lock, and no policy covers it"
	}
	return ""
}

// planned says where the plan has no such lock.
func (l *lab) planned(got answer, r *report) string {
	if ownTable(got.table) {
		for _, c := range r.Clones {
			if c.Table == got.table && c.MTU == got.mtu && c.Locked == got.locked && !c.Throw && (!got.dst.IsValid() || got.dst == c.Dst) {
				return ""
			}
		}
		return fmt.Sprintf("the plan has no such clone: %v", r.Clones)
	}
	for _, k := range r.Locks {
		dst, _, _ := strings.Cut(k.Route, " ")
		if k.MTU == got.mtu && k.Locked == got.locked && (!got.dst.IsValid() || got.dst.String() == dst) {
			return ""
		}
	}
	return "the plan has no such lock in place"
}

// A policy is what a line of `ip xfrm policy` says.
type policy struct {
	src, dst            netip.Prefix
	proto, sport, dport string
	priority            int
	tunnel, drops       bool
}

// policy takes a line, if it is about a policy.
func (l *lab) policy(line string) {
	f := strings.Fields(line)
	if len(f) < 3 || f[0] != "xfrm" || f[1] != "policy" {
		return
	}
	var p policy
	for i := 3; i+1 < len(f) && f[i] != "tmpl"; i += 2 {
		switch f[i] {
		case "src":
			p.src = netip.MustParsePrefix(f[i+1])
		case "dst":
			p.dst = netip.MustParsePrefix(f[i+1])
		case "proto":
			p.proto = f[i+1]
		case "sport":
			p.sport = f[i+1]
		case "dport":
			p.dport = f[i+1]
		case "priority":
			_, err := fmt.Sscan(f[i+1], &p.priority)
			l.must(err)
		case "action":
			p.drops = f[i+1] == "block"
		}
	}
	p.tunnel = slices.Contains(f, "tmpl")
	same := func(o policy) bool {
		return o.src == p.src && o.dst == p.dst && o.proto == p.proto && o.sport == p.sport && o.dport == p.dport
	}
	had := slices.ContainsFunc(l.tunnels, same)
	switch f[2] {
	case "add":
		if had {
			return
		}
	case "delete":
		l.tunnels = slices.DeleteFunc(l.tunnels, same)
		return
	}
	l.tunnels = append(slices.DeleteFunc(l.tunnels, same), p)
}

// covers reports whether the policy that takes a packet is a tunnel's, or drops it. Of several with one priority that one counts that says so: which
// goes ahead is the kernel's to know.
func (l *lab) covers(p packet) bool {
	best, covered := 1<<31, false
	for _, t := range l.tunnels {
		if t.src.Contains(p.src) && t.dst.Contains(p.dst) && t.takes(p) {
			switch {
			case t.priority < best:
				best, covered = t.priority, t.tunnel || t.drops
			case t.priority == best:
				covered = covered || t.tunnel || t.drops
			}
		}
	}
	return covered
}

func (t policy) takes(p packet) bool {
	proto := map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}[t.proto]
	port := func(want string, have uint16) bool { return want == "" || want == fmt.Sprint(have) }
	return (t.proto == "" || proto == p.proto) && port(t.sport, p.sport) && port(t.dport, p.dport)
}

// same compares all that an agent could have changed, once it is gone.
func (l *lab) same(when string) {
	l.Helper()
	// The marker's device is one of the agent's namespace alone.
	l.must(l.other.Do(fmt.Sprintf("link set marker mtu %d", 1300+l.marks)))
	var text [2]string
	for i, n := range []*harness.Netns{l.ours, l.other} {
		var err error
		text[i], err = n.Snapshot("nic0", "nic1", "nic2")
		l.must(err)
	}
	if l.numbered { // the kernel has numbered rules by what was there, ours as well, and the order is what counts
		for i := range text {
			text[i] = rulePriority.ReplaceAllString(text[i], "N:\t")
		}
	}
	got, want := strings.Split(text[0], "\n"), strings.Split(text[1], "\n")
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			l.Errorf("%s: it is not as it would be without an agent (- without, + with):\n- %s\n+ %s", when, line(want, i), line(got, i))
		}
	}
}

var rulePriority = regexp.MustCompile(`(?m)^[0-9]+:\t`)

func line(list []string, i int) string {
	if i < len(list) {
		return list[i]
	}
	return ""
}
