package kill

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"tsoagent/failpoint"
)

// The ways to clean up after a kill.
const (
	restart = iota
	restore
	staleRestart // what the unit's ExecStopPost does, and then systemd
	staleRestore
	ways
)

var wayNames = [ways]string{"restart", "tsoctl restore", "tsoctl restore --stale, restart", "tsoctl restore --stale, tsoctl restore"}

// A schedule is what happens in one try. All of it follows from the seed.
type schedule struct {
	config string
	tc     bool     // an admin has clsact on nic1
	keys   bool     // somebody listens with a TCP-MD5 key
	mute   bool     // and ends with the first agent
	orders []string // of the first process, and of those that clean up, for as long as they go
	way    int
	// The events: before there is an agent, while it runs, while none does, while another one runs, and at the end.
	events [5][]event
	pause  int // between events, in milliseconds
	// killed says that the first agent is killed some time after its events, in milliseconds, and not stopped.
	killed bool
	after  int
	// race says that the events of the first agent wait until it is stopped.
	race    bool
	damaged bool // somebody has written into the journal
}

func (s *schedule) String() string {
	return fmt.Sprintf("config:\n%stc %v, keys %v, mute %v, orders %q, way %s, pause %d, killed %v after %d, race %v, damaged %v\nevents %q",
		s.config, s.tc, s.keys, s.mute, s.orders, wayNames[s.way], s.pause, s.killed, s.after, s.race, s.damaged, s.events)
}

// configs are what makes the agent write to all the places that it knows. A kernel without ESP has no SAs: the MTU is presumed, and it takes
// keys of TCP to have a lane.
const (
	plain = ""
	off   = "shared_nics: off\n"
	clamp = "partial: clamp\n"
	lane  = "shared_nics: lane\ntcp_keys_every: 100ms\n"
)

type draw struct{ *rand.Rand }

func (d draw) of(s ...string) string { return s[d.IntN(len(s))] }

// leads is what leads to a point: a configuration, and what happens before the first agent starts.
func (d draw) leads(point string) (config string, events []event) {
	const policy = "xfrm policy add src 0.0.0.0/0 dst 10.0.0.0/13 dir out priority 5 tmpl src 192.0.2.1 dst 192.0.2.77 proto esp mode tunnel reqid 9"
	events = []event{event("route replace " + d.of("10.0.0.0/16", "10.1.1.0/24") + " via 192.0.2.8 dev nic0"), policy}
	kind, _, _ := strings.Cut(point, "-")
	switch kind {
	case "clamp", "nft":
		return clamp, events
	case "lane":
		return lane, events
	case "hold", "unhold", "features":
		return off, events
	case "clone", "rule", "route", "lock", "unlock":
		return plain, events
	}
	if d.IntN(2) == 0 {
		events = nil
	}
	return d.of(plain, plain, off, clamp), events
}

// schedule draws one. A point, where there is one, is where the first agent is to be killed.
func (d draw) schedule(point string, way int) *schedule {
	config, events := d.leads(point)
	s := &schedule{
		config: "presume_mtu: 1400\nmetrics: off\nrestore_after: 20ms\n" + config,
		tc:     d.IntN(3) == 0, keys: config == lane, mute: d.IntN(2) == 0, damaged: strings.HasPrefix(point, "journal-damaged"),
		way: way, pause: []int{0, 1, 5, 20}[d.IntN(4)], killed: point == "" && d.IntN(3) == 0, after: d.IntN(20),
	}
	s.events[0] = events
	first := fmt.Sprintf("*:%d", 1+d.IntN(1<<d.IntN(7)))
	switch {
	case s.killed:
		first = "none"
	case point != "":
		first = fmt.Sprintf("%s:%d", point, 1+d.IntN(4)/3)
	}
	for d.IntN(4) == 0 {
		first = fmt.Sprintf("%s:%d=stop,%s", failpoint.Points[d.IntN(len(failpoint.Points))], 1+d.IntN(3), first)
	}
	s.orders = []string{first}
	for d.IntN(3) == 0 {
		s.orders = append(s.orders, fmt.Sprintf("*:%d", 1+d.IntN(1<<d.IntN(6))))
	}
	for i, n := range []int{1 + d.IntN(4), 2 + d.IntN(6), d.IntN(3), d.IntN(3), d.IntN(2)} {
		for range n {
			s.events[i] = append(s.events[i], d.event())
		}
	}
	switch point {
	case "lock-stale":
		s.provoke()
	case "lane-removed": // without the flower classifier no lane is whole, and the next process takes away what there is of one
		s.mute = true
		s.orders = []string{"lane-qdisc-after:1", "lane-removed:1"}
		if way == staleRestart || way == staleRestore {
			s.orders = slices.Insert(s.orders, 1, "")
		}
	}
	return s
}

// provoke has the owner of a route change it between what the agent has read and what it writes, which is mended then.
func (s *schedule) provoke() {
	s.race = true
	s.events[0] = append(s.events[0], "route replace 10.0.1.0/24 via 192.0.2.8 dev nic0")
	s.events[1] = append([]event{"route replace 10.0.1.0/24 proto 99 via 198.51.100.8 dev nic1"}, s.events[1]...)
	s.orders[0] = "route-replace-before:1=stop,lock-stale:1"
}

func (d draw) dst(v6 bool) string {
	a, b := d.IntN(2), d.IntN(2)
	if v6 {
		return d.of("fd10::/16", fmt.Sprintf("fd10:%d::/32", a), fmt.Sprintf("fd10:%d:%d::/48", a, b), fmt.Sprintf("fd10:%d:%d::1/128", a, b))
	}
	return d.of("10.0.0.0/13", "10.8.0.0/16", fmt.Sprintf("10.%d.0.0/16", a), fmt.Sprintf("10.%d.%d.0/24", a, b), fmt.Sprintf("10.%d.%d.1/32", a, b))
}

// event draws one.
func (d draw) event() event {
	v6 := d.IntN(5) < 2
	way := d.IntN(4)
	via := []string{"via 192.0.2.8 dev nic0", "via 198.51.100.8 dev nic1", "dev nic2", "nexthop via 192.0.2.8 nexthop via 198.51.100.8"}[way]
	src, self, peer := d.of("0.0.0.0/0", "0.0.0.0/0", "172.16.0.0/16", "192.0.2.0/24"), "192.0.2.1", d.of("192.0.2.77", "198.51.100.77")
	if v6 {
		via = []string{"via fd00:2::8 dev nic0", "via fd00:3::8 dev nic1", "dev nic2", "nexthop via fd00:2::8 nexthop via fd00:3::8"}[way]
		src, self, peer = d.of("::/0", "::/0", "fd00:9::/32"), "fd00:2::1", d.of("fd00:2::77", "fd00:3::77")
	}
	dst := d.dst(v6)
	// An owner's MTU is never one of ours, and never all that it changes: a witness knows its routes by their ways.
	more := []string{"", " mtu 1300", " mtu lock 1250 advmss 1100", " proto 99"}[way] + d.of("", "", "", " metric 50")
	switch n := d.IntN(25); {
	case n < 8:
		return event("route replace " + dst + more + " " + via)
	case n < 11:
		return event("route del " + dst)
	case n < 12:
		return event("route replace blackhole " + dst + " metric 50")
	case n < 18:
		what := "tmpl src " + self + " dst " + peer + " proto esp mode tunnel reqid " + d.of("1", "2")
		if d.IntN(8) == 0 {
			what = d.of("", "action block")
		}
		return event(fmt.Sprintf("xfrm policy %s src %s dst %s dir out priority %d %s", d.of("add", "update"), src, dst, d.IntN(3), what))
	case n < 21:
		return event("xfrm policy delete src " + src + " dst " + dst + " dir out")
	case n < 22:
		rule := d.of("rule add from 172.16.0.0/16", "rule del from 172.16.0.0/16", "-6 rule add from fd00:9::/32", "-6 rule del from fd00:9::/32")
		return event(rule + " pref " + d.of("100", "20000") + " lookup " + d.of("main", "77"))
	case n < 23:
		return event("link set " + d.of("nic0", "nic1", "nic2") + " mtu " + d.of("1480", "1500"))
	case n < 24:
		// Off where it is held off already can't be seen (docs/limits.md), so it is not asked for.
		return event("ethtool -K " + d.of("nic0", "nic1", "nic2") + " " + d.of("tx-tcp-segmentation on", "gro on", "gro off", "gso off", "gso on", "tx-udp-segmentation off"))
	}
	return event("route replace default " + d.of("via 192.0.2.9 dev nic0", "via 198.51.100.9 dev nic1"))
}
