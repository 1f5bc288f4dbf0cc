package plan

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// checks is how many worlds each property test builds, unless -rapid.checks says otherwise.
const checks = "800"

// worldSeed makes them the same ones in each run, so that a change elsewhere never fails by chance. What looks for worlds that
// nobody has thought of yet, and is to be run for each change of the planner, is
//
//	go test ./agent/plan -run 'Promises|Changes' -rapid.seed=0 -rapid.checks=100000
const worldSeed = "5450"

func TestMain(m *testing.M) {
	flag.Parse()
	set := map[string]bool{}
	flag.Visit(func(f *flag.Flag) { set[f.Name] = true })
	for name, value := range map[string]string{"rapid.checks": checks, "rapid.seed": worldSeed, "rapid.nofailfile": "true"} {
		if set[name] {
			continue
		}
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// TestPlansKeepTheirPromises builds small random worlds in which prefixes, selectors and rules
// overlap all the time, and asks the simulated kernel about each.
func TestPlansKeepTheirPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := genWorld(t)
		seed := rapid.Uint64().Draw(t, "seed")
		w, err := newWorld(text)
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		if err := laws(w, rand.New(rand.NewPCG(seed, 0)), 250); err != nil {
			t.Fatalf("%v\n\nin the world\n%s", err, text)
		}
	})
}

// maker draws the lines of a world.
type maker struct {
	t     *rapid.T
	lines []string
	v6    bool
	// devices are those that some routes go by.
	devices []string
}

func (m *maker) line(format string, args ...any) {
	m.lines = append(m.lines, fmt.Sprintf(format, args...))
}

func (m *maker) of(label string, s ...string) string { return rapid.SampledFrom(s).Draw(m.t, label) }

// some is true about once in n times.
func (m *maker) some(label string, n int) bool { return rapid.IntRange(0, n-1).Draw(m.t, label) == n-1 }

func (m *maker) num(label string, from, to int) int { return rapid.IntRange(from, to).Draw(m.t, label) }

func (m *maker) dst(label string) string {
	if m.v6 {
		return m.of(label, "fd00:1::/32", "fd00:1::/48", "fd00:1::/47", "fd00:1:1::/48", "fd00:1::/126", "fd00:1::/127", "fd00:1::1/128", "fd00:1::2/128", "fd00:1:1::/128", "::/0", "::/1")
	}
	return m.of(label, "10.0.0.0/8", "10.0.0.0/15", "10.0.0.0/16", "10.1.0.0/16", "10.0.0.0/30", "10.0.0.0/31", "10.0.0.1/32", "10.0.0.2/32", "10.1.0.0/32", "0.0.0.0/0", "0.0.0.0/1")
}

func (m *maker) src(label string) string {
	if m.v6 {
		return m.of(label, "::/0", "::/0", "fd00:9::/32", "fd00:9::/48", "fd00:9::1/128", "fd00:1::/48")
	}
	return m.of(label, "0.0.0.0/0", "0.0.0.0/0", "192.168.0.0/16", "192.168.1.0/24", "192.168.1.1/32", "10.0.0.0/16")
}

func (m *maker) peer(label string) string {
	if m.v6 {
		return m.of(label, "fd00:2::1", "fd00:2::2", "fd00:1::1")
	}
	return m.of(label, "192.0.2.1", "192.0.2.2", "10.0.0.1")
}

func (m *maker) self() string {
	if m.v6 {
		return m.of("self", "fd00:9::1", "fd00:9::2")
	}
	return m.of("self", "192.168.1.1", "192.168.2.1")
}

func genWorld(t *rapid.T) string {
	m := &maker{t: t}
	m.config()
	m.line("link 1 lo mtu 65536")
	m.line("link 2 eth0")
	m.line("link 3 eth1 mtu %s", m.of("mtu", "1500", "1400", "9000", "1320"))
	m.line("link 4 xfrm0 if_id 7")
	m.line("link 5 xfrm1 if_id %s mtu %s", m.of("if_id", "8", "7"), m.of("mtu", "1500", "1400"))
	m.line("link 6 red vrf 100")
	m.line("link 7 eth2 master red")
	m.line("link 8 xfrmx external")
	m.line("link 9 eth3 down")
	if m.some("fixed", 6) {
		m.line("features xfrm0 tx-tcp-segmentation %s", m.of("state", "off", "fixed", "on-fixed"))
	}
	if m.some("offload", 8) {
		m.line("features eth1 tx-esp-segmentation %s", m.of("state", "on", "off"))
	}
	if m.some("forwarding", 2) {
		m.line("forwarding")
	}
	m.v6 = m.some("ipv6", 3)
	m.tunnels()
	m.outside()
	if m.some("nested", 5) {
		m.nested()
	}
	for range m.num("rules", 0, 3) {
		m.rule()
	}
	for range m.num("routes", 0, 7) {
		m.route()
	}
	n := m.num("policies", 1, 4)
	for i := range n {
		m.policy(i + 1)
	}
	for i := range m.num("sas", 0, 5) {
		m.sa(i + 1)
	}
	if m.some("default", 10) {
		m.line("default block")
	}
	if m.some("gone", 6) {
		m.line("gone %d", m.num("which", 1, n))
	}
	for range m.num("lasts", 0, 1) {
		peer := ""
		if m.some("split", 3) {
			peer = "peer " + m.peer("last")
		}
		m.line("last %d %s %s", m.num("of", 1, n), peer, m.of("mtu", "1446", "1300", "1200"))
	}
	return strings.Join(m.lines, "\n") + "\n"
}

func (m *maker) config() {
	if m.some("config", 4) {
		m.line("config %s", m.of("setting", "dedicated keep", "device xfrm0 keep", "mtu advise", "mtu off", "partial off",
			"source_less_lookups off", "presume_mtu 1350", "max_clones 3", "max_clones_per_coverage 1", "dedicated off"))
	}
}

// tunnels are a few of those that wrap packets, with a VLAN above one. Half of the worlds have none.
func (m *maker) tunnels() {
	if m.some("tunnels", 2) {
		m.devices = []string{"eth0", "eth1", "xfrm0"}
		return
	}
	l := "link 10 tun0 " + m.of("kind", "gre", "gre key 7", "gre key 65536", "ipip", "vxlan dport 4789 anymark", "geneve dport 6081 anymark", "gre mark 1")
	if !m.some("nolocal", 6) {
		l += " local " + m.self()
	}
	m.line("%s remote %s mtu %s", l, m.peer("remote"), m.of("mtu", "1476", "1400"))
	m.line("link 11 tun0v kind %s parent tun0 mtu 1476", m.of("upper", "vlan", "macvlan"))
	m.line("link 12 tun1 gre local %s remote %s mtu 1476 %s", m.self(), m.peer("remote"), m.of("key", "", "key 7"))
	m.line("link 13 vti0 kind vti okey %s mtu 1480", m.of("okey", "1", "2"))
	m.devices = []string{"tun0", "tun0", "tun0v", "tun1", "vti0", "eth0"}
	outer := []string{"eth0", "tun1", "tun0", "xfrm0", "tun0v", "vti0", "xfrmx encap if_id 7", "tun1 encap"}
	if m.some("bond", 6) { // above tunnels, and below one
		m.line("link 20 bond0 kind bond mtu 1476")
		for i := range m.num("ports", 0, 2) {
			m.line("link %d tap%d gre local %s remote %s mtu 1476 key %d master bond0", 21+i, i, m.self(), m.peer("remote"), 8+i)
		}
		m.devices, outer = append(m.devices, "bond0"), append(outer, "bond0")
	}
	for range m.num("outer routes", 0, 2) {
		m.line("route %s dev %s", m.peer("to"), m.of("dev", outer...))
	}
}

// outerPolicy takes outer packets of a tunnel, or a part of them.
func (m *maker) outerPolicy() string {
	return fmt.Sprintf("src %s dst %s %s", m.of("from", m.self(), m.self(), m.src("src")), m.of("to", m.peer("peer"), m.peer("peer"), m.dst("dst")),
		m.of("narrow", "", "", "proto gre", "proto gre", "proto gre sport 0 dport 7", "proto gre sport 1", "proto 4", "proto udp", "proto udp dport 4789", "proto udp dport 0/0xff00", "mark 1/1"))
}

// outside leads to the peers.
func (m *maker) outside() {
	out := "192.0.2.0/24"
	if m.v6 {
		out = "fd00:2::/64"
	}
	m.line("route %s dev %s proto kernel", out, m.of("outside", "eth0", "eth1"))
}

// nested is a policy whose peer is behind an xfrm interface, a vti, or several ways, and one that may take
// its packets there once more.
func (m *maker) nested() {
	net, any := "10.1.0.0/16", "0.0.0.0/0"
	if m.v6 {
		net, any = "fd00:1:1::/48", "::/0"
	}
	self, peer, far := m.self(), m.peer("inner"), m.peer("outer")
	m.line("link 14 vti1 kind vti okey 3 mtu 1480")
	from := ""
	if m.v6 && m.some("from", 3) {
		from = "from " + self + "/128 "
	}
	m.line("route %s %s%s", peer, from, m.of("way", "dev xfrm0", "dev xfrm0", "dev vti1", "dev xfrmx encap if_id 7", "nexthop dev eth0 nexthop dev eth1",
		"nexthop dev eth1 nexthop dev eth0", "nexthop dev xfrm0 nexthop dev eth1", "nexthop dev eth0 nexthop dev xfrm0", "nexthop dev eth1 nexthop dev vti1"))
	what := m.of("what", "dst "+net, "dst "+net, "dst "+peer+" proto gre")
	mode, saMode := "tunnel "+self+" "+peer, ""
	if m.some("transport", 3) {
		mode, saMode = "transport", "transport"
	}
	m.line("policy 20 src %s %s tmpl esp %s reqid 8", any, what, mode)
	if m.line("sa esp %s %s spi 20 reqid 8 %s %s", self, peer, m.of("algorithm", "gcm", "cbc-sha256"), saMode); m.some("alone", 6) {
		return
	}
	by := m.of("by", "if_id 7", "if_id 7", "mark 3")
	m.line("policy 21 src %s dst %s %s %s tmpl esp tunnel %s %s reqid 9", any, m.of("again", any, peer), m.of("narrow", "", "", "", "proto 50", "proto gre"), by, self, far)
	m.line("sa esp %s %s spi 21 reqid 9 %s %s", self, far, m.of("algorithm", "gcm", "cbc-sha256"), by)
}

func (m *maker) rule() {
	l := fmt.Sprintf("rule %s", m.of("priority", "100", "219", "220", "1000", "32764", "32765", "32766"))
	if m.v6 {
		l += " inet6"
	}
	for range m.num("selectors", 0, 2) {
		switch m.num("selector", 0, 15) {
		case 0, 1, 2:
			l += " from " + m.src("from")
		case 3, 4:
			l += " to " + m.dst("to")
		case 5, 6:
			l += " fwmark " + m.of("mark", "1", "1/1", "2/3", "0/1")
		case 7:
			l += " ipproto " + m.of("proto", "tcp", "udp")
		case 8:
			l += " dport " + m.of("ports", "80", "80-443")
		case 9:
			l += " iif " + m.of("iif", "lo", "eth1")
		case 10:
			l += " oif " + m.of("oif", "eth1", "red")
		case 11:
			l += " not"
		case 12:
			l += " uidrange 1000 1000"
		case 13:
			l += " tos 0x10"
		case 14:
			l += " suppress_prefixlength " + m.of("suppress", "0", "8", "16")
		case 15:
			l += " l3mdev"
		}
	}
	l += " " + m.of("action", "lookup 220", "lookup 220", "lookup 220", "lookup 50", "lookup main", "lookup 5450",
		"goto 32766", "goto 32765", "goto 1000", "nop", "blackhole", "unreachable")
	m.line("%s", l)
}

func (m *maker) route() {
	if m.some("special", 8) {
		what, table := m.of("type", "throw", "blackhole", "unreachable", "local", "prohibit"), m.table()
		if table == "5450" { // what ends lookups there hides the way behind it until we have moved to another table
			what = "throw"
		}
		m.line("route %s %s table %s", what, m.dst("dst"), table)
		return
	}
	l := fmt.Sprintf("route %s table %s", m.dst("dst"), m.table())
	if m.some("metric", 4) {
		l += " metric 10"
	}
	switch m.num("extra", 0, 15) {
	case 0:
		l += " proto " + m.of("proto", "kernel", "ra")
	case 1, 2:
		l += " mtu " + m.of("mtu", "1446", "lock 1300", "1500", "9000")
	case 3:
		l += " expires"
	case 4:
		l += " advmss 1200"
	case 5:
		if !m.v6 { // which has no such routes: the kernel refuses them (rtm_to_fib6_config, net/ipv6/route.c)
			l += " tos 0x10"
		}
	case 6:
		if m.v6 {
			l += " from " + m.src("source")
		}
	}
	dev := func() string {
		if len(m.devices) > 0 && m.some("tunnel", 3) {
			return m.of("dev", m.devices...)
		}
		return m.of("dev", "eth0", "eth0", "eth1", "xfrm0", "xfrm0", "xfrm1", "eth2", "eth3", "xfrmx")
	}
	via := "192.0.2.9"
	if m.v6 {
		via = m.of("via", "fd00:2::9", "fd00:2::9", "fd00:2::8") // by one device for some, so that what is bound to it can go wrong
	}
	switch m.num("ways", 0, 7) {
	case 0:
		l += fmt.Sprintf(" nexthop via %s dev %s nexthop dev %s", via, dev(), dev())
	case 1:
		// The nexthops of an object are the same wherever it is used.
		l += fmt.Sprintf(" nhid 5 via %s dev eth1", via)
	case 2:
		l += fmt.Sprintf(" via %s dev %s encap", via, dev())
	case 3, 4:
		l += fmt.Sprintf(" via %s dev %s", via, dev())
	default:
		l += " dev " + dev()
	}
	m.line("%s", l)
}

func (m *maker) table() string {
	return m.of("table", "main", "main", "main", "main", "220", "220", "50", "100", "5450")
}

func (m *maker) policy(index int) {
	selector, narrow := fmt.Sprintf("src %s dst %s", m.src("src"), m.dst("dst")), 0
	if len(m.devices) > 0 && m.some("outer", 3) {
		selector, narrow = m.outerPolicy(), 7
	}
	l := fmt.Sprintf("policy %d %s priority %d", index, selector, m.num("priority", 0, 3))
	switch m.num("narrow", narrow, 11) {
	case 0, 1:
		l += " proto " + m.of("proto", "tcp", "udp")
	case 2:
		l += " proto tcp dport " + m.of("dport", "80", "65535", "80/0xfff0", "443")
	case 3:
		l += " proto tcp sport 5"
	case 4:
		l += " mark " + m.of("mark", "1/1", "1/3", "2/2", "2/1")
	case 5:
		l += " dev " + m.of("dev", "eth0", "eth1")
	case 6:
		l += " sport 5"
	}
	if id := m.num("if_id", 0, 4); id > 2 {
		l += fmt.Sprintf(" if_id %d", id+4)
	}
	switch m.num("kind", 0, 13) {
	case 0, 1:
		m.line("%s", l)
		return
	case 2:
		m.line("%s action block", l)
		return
	}
	for range 1 + m.num("more", 0, 6)/6 {
		l += " tmpl " + m.of("proto", "esp", "esp", "esp", "esp", "ah", "comp")
		if m.some("transport", 4) {
			l += " transport"
		} else {
			l += fmt.Sprintf(" tunnel %s %s", m.self(), m.peer("peer"))
		}
		l += fmt.Sprintf(" reqid %d", m.num("reqid", 1, 2))
		if m.some("level", 6) {
			l += " level use"
		}
	}
	m.line("%s", l)
}

func (m *maker) sa(spi int) {
	proto := m.of("proto", "esp", "esp", "esp", "ah")
	l := fmt.Sprintf("sa %s %s %s spi %d reqid %d", proto, m.self(), m.peer("peer"), spi, m.num("reqid", 1, 2))
	switch {
	case m.some("larval", 8):
		l += " larval"
	case proto == "ah":
		l += " sha256"
	default:
		l += " " + m.of("algorithm", "gcm", "gcm", "cbc-sha256", "alien")
	}
	if m.some("transport", 4) {
		l += " transport"
	}
	if id := m.num("if_id", 0, 4); id > 2 {
		l += fmt.Sprintf(" if_id %d", id+4)
	}
	if m.some("encap", 6) && proto == "esp" {
		l += " encap"
	}
	if m.some("offload", 8) {
		l += " offload eth1"
	}
	if m.some("mark", 8) {
		l += " output-mark 1"
	}
	m.line("%s", l)
}
