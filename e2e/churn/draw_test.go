package churn

import (
	"fmt"
	"math/rand/v2"
)

// draw draws lines of ip: routes and policies of both families that overlap all the time.
type draw struct{ *rand.Rand }

func (d draw) of(s ...string) string { return s[d.IntN(len(s))] }

func (d draw) dst(v6 bool) string {
	a, b, c := d.IntN(4), d.IntN(4), d.IntN(4)
	if v6 {
		return d.of("fd10::/16", fmt.Sprintf("fd10:%d::/32", a), fmt.Sprintf("fd10:%d:%d::/48", a, b), fmt.Sprintf("fd10:%d:%d::1/128", a, b))
	}
	a *= 2
	return d.of("10.0.0.0/8", fmt.Sprintf("10.%d.0.0/15", a), fmt.Sprintf("10.%d.0.0/16", a), fmt.Sprintf("10.%d.%d.0/24", a, b), fmt.Sprintf("10.%d.%d.%d/32", a, b, c))
}

// change is one line. Some fail, as what they delete is not there.
func (d draw) change() string {
	v6 := d.IntN(5) < 2
	family, via, src, self, peer := "", d.of("192.0.2.8 dev nic0", "198.51.100.8 dev nic1"), d.of("172.16.0.0/16", "0.0.0.0/0", "172.16.1.0/24", "192.0.2.0/24"), "192.0.2.1", d.of("192.0.2.77", "10.2.1.1")
	if v6 {
		family, via, src, self, peer = "-6 ", d.of("fd00:2::8 dev nic0", "fd00:3::8 dev nic1"), d.of("fd00:9::/32", "::/0", "fd00:9:1::/48"), "fd00:2::1", d.of("fd00:2::77", "fd10:1::1")
	}
	dst := d.dst(v6)
	switch n := d.IntN(20); {
	case n < 7:
		return family + "route replace " + dst + " via " + via
	case n < 12:
		return family + "route del " + dst
	case n < 13:
		return family + "route replace blackhole " + dst + " metric 50"
	case n < 17:
		what := "tmpl src " + self + " dst " + peer + " proto esp mode tunnel reqid " + d.of("1", "2")
		switch d.IntN(6) {
		case 0:
			what = ""
		case 1:
			what = "action block"
		}
		return fmt.Sprintf("xfrm policy %s src %s dst %s dir out priority %d %s", d.of("add", "update"), src, dst, d.IntN(3), what)
	}
	return "xfrm policy delete src " + src + " dst " + dst + " dir out"
}

// deviceChange is one line, about what routes stand on. Some fail, or change nothing. No address goes alone: the kernel writes no route whose
// gateway is on no link any more (docs/limits.md).
func (d draw) deviceChange() string {
	return d.of(
		"link set "+d.of("nic0 mtu 1500", "nic0 mtu 9000", "nic1 mtu 1500", "nic1 mtu 1400", "nic1 mtu 1390"),
		"link set "+d.of("nic1", "far1")+" "+d.of("down", "up"),
		"-6 addr add fd00:3::1/64 dev nic1 nodad", // which goes when the device is down
		"route replace default via 192.0.2."+d.of("8", "9"), "-6 route replace default via fd00:2::"+d.of("8", "9"),
	)
}
