package routes

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// world makes random changes to the routing of a namespace. A line begins with -6 where `ip`
// needs to be told the family. Many of them fail, which is all right.
type world struct {
	rng  *rand.Rand
	vrfs bool
	devs [3]string // the names of the devices with peers, which can change
}

// newWorld is a namespace with three veth pairs, a forwarding host's settings, and where the
// kernel has them two VRFs.
func newWorld(t testing.TB, seed uint64) *world {
	t.Helper()
	w := &world{rng: rand.New(rand.NewPCG(seed, 1)), devs: [3]string{"a0", "b0", "c0"}}
	newNS(t)
	for name, value := range map[string]string{
		// Only what is asked for: no address, no route, no message of its own.
		"ipv6/conf/default/accept_dad": "0", "ipv6/conf/default/addr_gen_mode": "1", "ipv6/conf/default/router_solicitations": "0",
		"ipv6/conf/all/forwarding": "1", "ipv4/ip_forward": "1",
		// The kernel answers for packets that come in whatever the way back is (fib_validate_source).
		"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0", "ipv4/conf/default/accept_local": "1", "ipv4/conf/all/accept_local": "1",
	} {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	for i := range w.devs {
		ip(t, w.pair(i))
		for _, line := range w.addrs(i) {
			ip(t, line)
		}
	}
	if out, err := tryIP("link add v1 type vrf table 1001\nlink set v1 up\nlink add v2 type vrf table 100002\nlink set v2 up"); err != nil {
		t.Logf("without VRFs: %s", strings.TrimSpace(out))
	} else {
		w.vrfs = true
	}
	return w
}

func (w *world) pair(i int) string {
	d := w.devs[i]
	peer := fmt.Sprintf("%c1", 'a'+i)
	return fmt.Sprintf("link add %s type veth peer name %s\nlink set %s up\nlink set %s up", d, peer, d, peer)
}

func (w *world) addrs(i int) []string {
	return []string{
		fmt.Sprintf("addr replace 10.0.%d.1/24 dev %s", i, w.devs[i]),
		fmt.Sprintf("-6 addr replace fd00:%c::1/64 dev %s nodad", 'a'+i, w.devs[i]),
	}
}

func (w *world) n(n int) int { return w.rng.IntN(n) }

func pick[T any](w *world, from ...T) T { return from[w.n(len(from))] }

func (w *world) dev() string { return w.devs[w.n(3)] }

func (w *world) some(one string) string { return pick(w, "", "", "", one) }

var (
	destinations = map[Family][]string{
		IPv4: {"198.18.0.0/16", "198.18.0.0/24", "198.18.0.0/28", "198.18.0.1/32", "198.18.1.0/24", "198.19.0.0/16", "0.0.0.0/0"},
		IPv6: {"2001:db8::/32", "2001:db8::/48", "2001:db8::/64", "2001:db8::1/128", "2001:db8:1::/48", "2001:db9::/32", "::/0"},
	}
	targets = map[Family][]string{
		IPv4: {"198.18.0.1", "198.18.0.9", "198.18.0.99", "198.18.1.1", "198.18.9.9", "198.19.1.1", "10.0.0.2", "10.0.1.9", "10.0.2.1", "192.0.2.1"},
		IPv6: {"2001:db8::1", "2001:db8::9", "2001:db8:0:9::1", "2001:db8:1::1", "2001:db8:9::1", "2001:db9::1", "fd00:a::2", "fd00:b::9", "fd00:c::1", "2001:dba::1"},
	}
	foreign = map[Family][]string{
		IPv4: {"203.0.113.1", "203.0.113.200", "198.51.100.1"},
		IPv6: {"2001:db8:aaaa::1", "2001:db8:aaaa:8000::1", "2001:db8:bbbb::1"},
	}
	sources = map[Family][]string{
		IPv4: {"203.0.113.0/24", "203.0.113.128/25", "198.51.100.0/24", "10.0.0.1/32", "10.0.0.0/16"},
		IPv6: {"2001:db8:aaaa::/48", "2001:db8:aaaa:8000::/49", "2001:db8:bbbb::/48", "fd00:a::1/128", "fd00::/16"},
	}
)

func (w *world) family() (Family, string) {
	if w.n(2) == 0 {
		return IPv6, "-6 "
	}
	return IPv4, ""
}

func (w *world) gateway(f Family) string {
	i := w.n(3)
	if f == IPv6 {
		return fmt.Sprintf("fd00:%c::%d", 'a'+i, 2+w.n(2))
	}
	return fmt.Sprintf("10.0.%d.%d", i, 2+w.n(2))
}

// step is what is done between two looks: one to four changes.
func (w *world) step() []string {
	var lines []string
	for range 1 + w.n(4) {
		switch k := w.n(40); {
		case k < 18:
			lines = append(lines, w.route())
		case k < 20:
			lines = append(lines, w.unroute())
		case k < 25:
			lines = append(lines, w.rule())
		case k < 27:
			f, six := w.family()
			_ = f
			lines = append(lines, fmt.Sprintf("%srule del pref %d", six, w.priority()))
		case k < 31:
			lines = append(lines, w.object())
		case k < 33:
			lines = append(lines, fmt.Sprintf("nexthop del id %d", pick(w, 1+w.n(9), 11+w.n(4))))
		case k < 36:
			lines = append(lines, w.address()...)
		default:
			lines = append(lines, w.link()...)
		}
	}
	return lines
}

func (w *world) table() string {
	return pick(w, "", "", "", " table 77", " table 77", " table 100000", " table 1001", " table 100002", " table 253")
}

func (w *world) priority() int { return pick(w, 10+w.n(6), 10+w.n(6), 999, 1000, 1001, 32765) }

func (w *world) route() string {
	f, six := w.family()
	verb := pick(w, "add", "add", "replace", "replace", "append", "prepend", "change")
	typ := pick(w, "", "", "", "", "", "", "throw ", "blackhole ", "unreachable ", "prohibit ", "local ")
	line := fmt.Sprintf("%sroute %s %s%s%s", six, verb, typ, pick(w, destinations[f]...), w.table())
	line += pick(w, "", "", " metric 10", " metric 20")
	if f == IPv4 {
		line += pick(w, "", "", "", "", "", " tos 0x10")
	} else if w.n(10) == 0 {
		line += " from " + pick(w, sources[f]...)
	}
	switch {
	case typ == "local ":
		if w.n(3) == 0 {
			line += " table local"
		}
		return line + " dev " + pick(w, "lo", w.dev())
	case typ != "":
		return line
	}
	line += w.some(" mtu 1400") + w.some(" mtu lock 1300")
	switch w.n(8) {
	case 0, 1, 2:
		line += " via " + w.gateway(f)
		if f == IPv4 {
			line += pick(w, "", "", "", " src 10.5.5.1", " src 10.0.0.1")
		}
	case 3:
		line += " dev " + w.dev()
	case 4:
		line += " via " + w.gateway(f) + " dev " + w.dev() + " onlink"
	case 5:
		line += fmt.Sprintf(" nexthop via %s weight %d nexthop via %s", w.gateway(f), 1+w.n(3), w.gateway(f))
		line += pick(w, "", " nexthop dev "+w.dev())
	default:
		line += fmt.Sprintf(" nhid %d", pick(w, 1+w.n(9), 11+w.n(4)))
	}
	return line
}

func (w *world) unroute() string {
	f, six := w.family()
	line := fmt.Sprintf("%sroute del %s%s", six, pick(w, destinations[f]...), w.table())
	return line + pick(w, "", "", " metric 10", " metric 20", " via "+w.gateway(f), " dev "+w.dev())
}

// rule is a rule with random selectors and a random action.
func (w *world) rule() string {
	f, six := w.family()
	line := fmt.Sprintf("%srule add pref %d", six, w.priority())
	some := func(text string) {
		if w.n(4) == 0 {
			line += " " + text
		}
	}
	if w.n(8) == 0 {
		line += " not"
	}
	some("from " + pick(w, sources[f]...))
	some("to " + pick(w, destinations[f]...))
	some("fwmark " + pick(w, "5", "0x10/0xf0"))
	if w.n(3) == 0 {
		line += " ipproto " + pick(w, "tcp", "udp")
		some(pick(w, "sport 1000-2000", "sport 1500"))
		some(pick(w, "dport 443", "dport 80-500"))
	}
	switch w.n(16) {
	case 0:
		line += " iif " + pick(w, "lo", w.dev())
	case 1:
		line += " oif " + w.dev()
	case 2:
		line += " tos 0x10"
	case 3:
		line += " uidrange 1000-2000"
	}
	switch w.n(24) {
	case 0:
		return line + fmt.Sprintf(" goto %d", w.priority())
	case 1:
		return line + pick(w, " unreachable", " blackhole", " prohibit", " nop")
	case 2:
		return line + " l3mdev"
	case 3, 4, 5, 6:
		return line + pick(w, " lookup main", " lookup 77") + fmt.Sprintf(" suppress_prefixlength %d", pick(w, 0, 16, 24, 32, 48))
	}
	return line + pick(w, " lookup 77", " lookup 77", " lookup 100000", " lookup main", " lookup 1001", " lookup 99999")
}

// object adds or replaces a nexthop object: 1 to 4 and 9 of IPv4, 5 to 8 of IPv6, 11 to 14 groups.
func (w *world) object() string {
	verb := pick(w, "add", "replace", "replace")
	id := 1 + w.n(9)
	f, six := IPv4, ""
	if id > 4 && id < 9 {
		f, six = IPv6, "-6 "
	}
	switch w.n(8) {
	case 0:
		return fmt.Sprintf("%snexthop %s id %d blackhole", six, verb, id)
	case 1:
		return fmt.Sprintf("%snexthop %s id %d dev %s", six, verb, id, w.dev())
	case 2, 3, 4:
		lo := 1
		id = 11 + w.n(4)
		if id > 12 {
			lo = 5
		}
		members := fmt.Sprintf("%d", lo+w.n(4))
		for range w.n(3) {
			members += fmt.Sprintf("/%d,%d", lo+w.n(4), 1+w.n(3))
		}
		return fmt.Sprintf("nexthop %s id %d group %s", verb, id, members) + pick(w, "", "", "", " type resilient buckets 4")
	}
	i := w.n(3)
	gw := fmt.Sprintf("10.0.%d.%d", i, 2+w.n(2))
	if f == IPv6 {
		gw = fmt.Sprintf("fd00:%c::%d", 'a'+i, 2+w.n(2))
	}
	return fmt.Sprintf("%snexthop %s id %d via %s dev %s", six, verb, id, gw, pick(w, w.devs[i], w.devs[i], w.dev()+" onlink"))
}

func (w *world) address() []string {
	i := w.n(3)
	switch w.n(6) {
	case 0:
		return []string{fmt.Sprintf("addr del 10.0.%d.1/24 dev %s", i, w.devs[i])}
	case 1:
		return []string{fmt.Sprintf("-6 addr del fd00:%c::1/64 dev %s", 'a'+i, w.devs[i])}
	case 2:
		return []string{fmt.Sprintf("addr add 10.5.5.%d/32 dev %s", 1+w.n(2), w.devs[i])}
	case 3:
		return []string{fmt.Sprintf("addr del 10.5.5.%d/32 dev %s", 1+w.n(2), w.devs[i])}
	}
	return w.addrs(i)
}

func (w *world) link() []string {
	i := w.n(3)
	d := w.devs[i]
	switch w.n(12) {
	case 0, 1:
		return append([]string{"link set " + d + " down", "link set " + d + " up"}, w.addrs(i)...)
	case 2:
		return []string{"link set " + d + " down"}
	case 3, 4:
		return append([]string{"link set " + d + " up"}, w.addrs(i)...)
	case 5:
		return []string{fmt.Sprintf("link set %c1 %s", 'a'+i, pick(w, "up", "up", "down"))}
	case 6:
		w.devs[i] = map[bool]string{true: d[:1] + "x", false: d[:1] + "0"}[d[1] == '0']
		return append([]string{"link set " + d + " down", "link set " + d + " name " + w.devs[i], "link set " + w.devs[i] + " up"}, w.addrs(i)...)
	case 7:
		return append([]string{"link del " + d}, append(strings.Split(w.pair(i), "\n"), w.addrs(i)...)...)
	case 8:
		return []string{fmt.Sprintf("link set %s mtu %d", d, pick(w, 1500, 1400, 1300))}
	}
	if !w.vrfs {
		return nil
	}
	switch v := 1 + w.n(2); w.n(8) {
	case 0:
		return []string{fmt.Sprintf("link del v%d", v)}
	case 1, 2:
		return []string{
			fmt.Sprintf("link add v%d type vrf table %d", v, []int{1001, 100002}[v-1]), fmt.Sprintf("link set v%d up", v),
		}
	case 3:
		return append([]string{"link set " + d + " nomaster"}, w.addrs(i)...)
	default:
		return append([]string{fmt.Sprintf("link set %s master v%d", d, v)}, w.addrs(i)...)
	}
}

// run does the lines of a step; what they print goes nowhere.
func (w *world) run(t testing.TB, lines []string) {
	t.Helper()
	if inHostNS() {
		panic("a test would change the host's namespace")
	}
	for len(lines) > 0 {
		family := "-4"
		_, six := strings.CutPrefix(lines[0], "-6 ")
		if six {
			family = "-6"
		}
		var b strings.Builder
		for len(lines) > 0 && strings.HasPrefix(lines[0], "-6 ") == six {
			fmt.Fprintln(&b, strings.TrimPrefix(lines[0], "-6 "))
			lines = lines[1:]
		}
		if !six {
			family = "-d" // of no consequence: `ip` goes by the address
		}
		cmd := exec.Command("ip", family, "-force", "-batch", "-")
		cmd.Stdin = strings.NewReader(b.String())
		_ = cmd.Run()
	}
}

// query is a random packet, and the VRF that it belongs to.
func (w *world) query(f *FIB) (Query, *Link) {
	fam, _ := w.family()
	q := Query{
		Dst: netip.MustParseAddr(pick(w, targets[fam]...)), Mark: pick[uint32](w, 0, 0, 5, 0x10),
		IPProto: pick[uint8](w, 6, 17), Sport: pick[uint16](w, 1500, 999), Dport: pick[uint16](w, 443, 80, 9),
	}
	var up, vrfs []*Link
	var own []netip.Addr
	for _, l := range f.Links() {
		if l.Index == 1 || !l.Up {
			continue
		}
		if l.VRFTable != 0 {
			vrfs = append(vrfs, l)
			continue
		}
		up = append(up, l)
		if m := f.Link(l.Master); m == nil {
			for a := range f.Addrs(l.Index) {
				if FamilyOf(a.Addr()) == fam {
					own = append(own, a.Addr())
				}
			}
		}
	}
	var vrf *Link
	switch k := w.n(8); {
	case k < 2 && len(up) > 0:
		in := up[w.n(len(up))]
		q.Iif, q.Src = in.Index, netip.MustParseAddr(pick(w, foreign[fam]...))
		if m := f.Link(in.Master); m != nil && m.VRFTable != 0 {
			vrf = m
		}
	case k < 4 && len(vrfs) > 0:
		vrf = vrfs[w.n(len(vrfs))]
		q.Oif = vrf.Index
	case k < 5 && fam == IPv6:
		q.Src = netip.MustParseAddr(pick(w, foreign[fam]...))
	case k < 7 && len(own) > 0:
		q.Src = own[0]
		for _, a := range own {
			if a.Less(q.Src) {
				q.Src = a
			}
		}
	}
	return q, vrf
}
