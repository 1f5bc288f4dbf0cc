package owners

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// draw draws the lines of an owner, of both families.
type draw struct{ *rand.Rand }

func (d draw) of(s ...string) string { return s[d.IntN(len(s))] }

// in is true once in n times.
func (d draw) in(n int) bool { return d.IntN(n) == 0 }

// some is a text once in n times, and nothing else.
func (d draw) some(n int, text string) string {
	if d.in(n) {
		return text
	}
	return ""
}

func (d draw) src(v6 bool) string {
	if v6 {
		return d.of("::/0", "::/0", "fd09::/64", "fd09::/48", "fd09:0:1::/64", "fd09::1/128", "fd00:2::/64")
	}
	return d.of("0.0.0.0/0", "0.0.0.0/0", "10.9.0.0/24", "10.9.0.0/16", "10.9.1.0/24", "10.9.0.1/32", "192.0.2.0/24")
}

func (d draw) dst(v6 bool) string {
	a, b := d.IntN(4)+3, d.IntN(4)
	if v6 {
		return d.of("fd00::/12", fmt.Sprintf("fd0%d::/16", a), fmt.Sprintf("fd0%d:%d::/32", a, b), fmt.Sprintf("fd0%d:%d:1::/48", a, b), fmt.Sprintf("fd0%d:%d::1/128", a, b))
	}
	return d.of("10.0.0.0/13", fmt.Sprintf("10.%d.0.0/16", a), fmt.Sprintf("10.%d.%d.0/24", a, b), fmt.Sprintf("10.%d.%d.128/25", a, b), fmt.Sprintf("10.%d.%d.1/32", a, b))
}

func (d draw) table() string { return d.of("main", "main", "main", "220", "52", "77") }

// way is where a route leads.
func (d draw) way(v6 bool) string {
	if v6 {
		return d.of("via fd00:2::8 dev nic0", "via fd00:3::8 dev nic1", "via fd00:4::8 dev nic2", "dev nic2", "nexthop via fd00:2::8 nexthop via fd00:3::8", "nexthop via fd00:3::7 nexthop via fd00:4::7 nexthop via fd00:2::7", "nhid 21", "nhid 23")
	}
	return d.of("via 192.0.2.8 dev nic0", "via 198.51.100.8 dev nic1", "via 203.0.113.8 dev nic2", "dev nic2", "nexthop via 192.0.2.8 nexthop via 198.51.100.8 weight 3", "nexthop via 203.0.113.7 nexthop via 192.0.2.7", "nhid 11", "nhid 13")
}

func (d draw) route() string {
	v6 := d.in(2)
	family := map[bool]string{true: "-6 ", false: "-4 "}[v6]
	dst, table := d.dst(v6), d.table()
	switch d.IntN(12) {
	case 0:
		return family + "route replace " + d.of("blackhole", "unreachable", "prohibit", "throw") + " " + dst + " table " + table + d.some(2, " metric 5")
	case 1:
		dst = map[bool]string{true: "::/0", false: "default"}[v6]
	case 2, 3, 4:
		return family + "route del " + dst + " table " + table
	}
	more := d.some(5, " metric 7") + d.some(8, " mtu "+d.of("1390", "1450", "lock 1300")) + d.some(3, " proto "+d.of("bird", "zebra", "static"))
	if v6 {
		more += d.some(6, " src fd09::1")
	} else {
		more += d.some(6, " src 10.9.0.1") + d.some(12, " tos 0x10")
	}
	return family + "route replace " + dst + " table " + table + more + " " + d.way(v6)
}

func (d draw) rule() string {
	v6 := d.in(2)
	family := map[bool]string{true: "-6 ", false: "-4 "}[v6]
	pref := d.of("0", "9", "100", "218", "219", "220", "1000", "5270", "20000", "32700", "32764", "32765")
	if d.in(3) {
		// The rule for table local stays: without another one ahead of it, its end would end what is addressed to the host once the agent has a rule.
		if pref == "0" {
			pref = "0 lookup " + d.of("main", "220", "52", "77")
		}
		return family + "rule del pref " + pref
	}
	s := family + "rule add pref " + pref
	if d.in(10) {
		s += " not"
	}
	if src := d.src(v6); !strings.HasSuffix(src, "/0") {
		s += " from " + src
	}
	if d.in(3) {
		s += " to " + d.dst(v6)
	}
	s += d.some(4, " fwmark "+d.of("1", "0x10/0xf0", "0x80000/0xff0000", "51820")) + d.some(12, " iif "+d.of("nic0", "nic1", "lo")) + d.some(14, " oif "+d.of("nic0", "nic1")) +
		d.some(14, " uidrange 1000-1010") + d.some(14, " tos 0x10") + d.some(8, " ipproto tcp dport "+d.of("80", "5001"))
	switch d.IntN(12) {
	case 0:
		return s + " " + d.of("blackhole", "unreachable", "prohibit", "nop")
	case 1:
		return s + " goto " + d.of("220", "20000", "32766")
	case 2, 3:
		return s + " suppress_prefixlength " + d.of("0", "8", "16") + " lookup " + d.table()
	}
	return s + " lookup " + d.table()
}

func (d draw) policy() string {
	v6 := d.in(2)
	sel := fmt.Sprintf("src %s dst %s", d.src(v6), d.dst(v6)) + d.some(5, " proto tcp dport 5001")
	if d.in(4) {
		return "xfrm policy delete " + sel + " dir out"
	}
	self, peer := "192.0.2.1", "192.0.2.77"
	if v6 {
		self, peer = "fd00:2::1", "fd00:2::77"
	}
	what := fmt.Sprintf("tmpl src %s dst %s proto esp mode tunnel reqid %d", self, peer, 1+d.IntN(2))
	if d.in(5) {
		what = d.of("", "action block")
	}
	return fmt.Sprintf("xfrm policy %s %s dir out priority %d %s", d.of("add", "update"), sel, 10+d.IntN(3), what)
}

// change is a line of anything.
func (d draw) change() string {
	switch n := d.IntN(20); {
	case n < 9:
		return d.route()
	case n < 13:
		return d.rule()
	case n < 16:
		return d.policy()
	case n < 17:
		return "link set " + d.of("nic0", "nic1", "nic2") + " " + d.of("up", "up", "down", "mtu 1480", "mtu 1500")
	case n < 18:
		return d.of("nexthop replace id 11 via 198.51.100.6 dev nic1", "nexthop replace id 11 via 192.0.2.6 dev nic0", "nexthop replace id 13 group 12", "nexthop replace id 13 group 11/12",
			"nexthop replace id 21 via fd00:3::6 dev nic1", "nexthop replace id 23 group 21/22")
	case n < 19:
		return d.of("addr add 203.0.113.2/32 dev nic2", "addr del 203.0.113.2/32 dev nic2", "addr del 198.51.100.1/24 dev nic1", "addr add 198.51.100.1/24 dev nic1", "-6 addr del fd00:4::1/64 dev nic2",
			"-6 addr add fd00:4::1/64 dev nic2 nodad")
	}
	return "sysctl -qw net.ipv4.conf.all.rp_filter=" + d.of("0", "1", "2")
}

// objects are the nexthop objects of all random worlds.
var objects = []string{
	"nexthop add id 11 via 192.0.2.6 dev nic0", "nexthop add id 12 via 198.51.100.6 dev nic1", "nexthop add id 13 group 11/12",
	"nexthop add id 21 via fd00:2::6 dev nic0", "nexthop add id 22 via fd00:3::6 dev nic1", "nexthop add id 23 group 21/22",
}
