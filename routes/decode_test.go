package routes

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var capture = flag.Bool("capture", false, "write testdata/messages.txt anew from this kernel (root)")

// message is one captured message: its type and payload.
type message struct {
	typ  uint16
	data []byte
}

// captured reads testdata/messages.txt: a type and a payload in hexadecimal on each line. It
// was written on Linux 6.18 by TestCapturedMessagesDecode -capture.
func captured(t testing.TB) []message {
	t.Helper()
	return capturedIn(t, "testdata/messages.txt")
}

func capturedIn(t testing.TB, file string) []message {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []message
	for s := bufio.NewScanner(f); s.Scan(); {
		var m message
		var data string
		if _, err := fmt.Sscanf(s.Text(), "%d %s", &m.typ, &data); err != nil {
			t.Fatal(err)
		}
		if m.data, err = hex.DecodeString(data); err != nil {
			t.Fatal(err)
		}
		out = append(out, m)
	}
	return out
}

// describe is an event as text, with what a pointer points to.
func describe(ev Event) string {
	switch ev := ev.(type) {
	case RouteSet:
		b := ev.Route.Body
		return fmt.Sprintf("route %s type %d proto %d scope %d flags %#x src %s nexthops %+v nhid %d %+v expires %t",
			ev.Route.Key(), b.Type, b.Protocol, b.Scope, b.Flags, b.PrefSrc, b.Nexthops, b.NHID, b.Metrics, b.Expires)
	case LinkSet:
		return fmt.Sprintf("link %+v", *ev.Link)
	case AddrSet:
		return fmt.Sprintf("addr %+v", ev.Addr)
	case RuleSet:
		return fmt.Sprintf("rule %+v", *ev.Rule)
	case NexthopSet:
		return fmt.Sprintf("nexthop %+v", *ev.Nexthop)
	}
	return fmt.Sprintf("%T %+v", ev, ev)
}

func TestCapturedMessagesDecode(t *testing.T) {
	decodesAsGolden(t, captured(t), "testdata/messages.golden")
}

// TestCapturedTunnelsDecode reads the links of TestKernelTunnels, captured on Linux 6.12 and
// proven there.
func TestCapturedTunnelsDecode(t *testing.T) {
	decodesAsGolden(t, capturedIn(t, "testdata/tunnels.txt"), "testdata/tunnels.golden")
}

func decodesAsGolden(t *testing.T, messages []message, golden string) {
	t.Helper()
	var d Decoder
	var b strings.Builder
	for _, m := range messages {
		ev, err := d.Decode(Header{Type: m.typ}, m.data)
		if err != nil {
			t.Errorf("type %d: %v\n%x", m.typ, err, m.data)
			continue
		}
		fmt.Fprintln(&b, describe(ev))
	}
	if *capture {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(b.String(), "\n")); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestTruncatedMessagesAreErrorsOrIncomplete(t *testing.T) {
	var d Decoder
	for _, m := range append(captured(t), capturedIn(t, "testdata/tunnels.txt")...) {
		for n := range m.data {
			_, _ = d.Decode(Header{Type: m.typ}, m.data[:n:n]) // must not panic
		}
		if _, err := d.Decode(Header{Type: m.typ}, m.data[:3]); err == nil {
			t.Errorf("type %d: three bytes decoded", m.typ)
		}
	}
}

// raw builds a message by hand.
func raw(head []byte, attributes ...[]byte) []byte {
	for _, a := range attributes {
		head = append(head, a...)
	}
	return head
}

func attr(typ uint16, val ...byte) []byte { return appendAttr(nil, typ, val) }

func attr32(typ uint16, v uint32) []byte { return appendU32(nil, typ, v) }

func TestMessagesThatSayNothingAboutRouting(t *testing.T) {
	bridge := make([]byte, ifinfomsgLen)
	bridge[0] = 7 // AF_BRIDGE
	wireless := raw(make([]byte, ifinfomsgLen), attr(iflaIfname, 'w', '0', 0), attr(iflaWireless, 1, 2, 3, 4))
	wireless[4] = 9
	cached := make([]byte, rtmsgLen)
	cached[0] = byte(IPv4)
	binary.NativeEndian.PutUint32(cached[8:], rtmFCloned)
	mpls := make([]byte, rtmsgLen)
	mpls[0] = 28 // AF_MPLS
	ipmr := make([]byte, fibRuleHdrLen)
	ipmr[0] = 128 // RTNL_FAMILY_IPMR
	for name, m := range map[string]message{
		"a bridge port":      {rtmNewLink, bridge},
		"a port that left":   {rtmDelLink, bridge},
		"a wireless event":   {rtmNewLink, wireless},
		"a cached route":     {rtmNewRoute, cached},
		"an MPLS route":      {rtmNewRoute, mpls},
		"a multicast rule":   {rtmNewRule, ipmr},
		"another group":      {100, []byte{1, 2, 3}},
		"a neighbour":        {28, nil},
		"an MPLS address":    {rtmNewAddr, make([]byte, ifaddrmsgLen)},
		"a removed mpls one": {rtmDelRoute, mpls},
	} {
		var d Decoder
		if ev, err := d.Decode(Header{Type: m.typ}, m.data); ev != nil || err != nil {
			t.Errorf("%s: %v, %v", name, ev, err)
		}
	}
}

func TestRuleAttributes(t *testing.T) {
	head := func() []byte {
		h := make([]byte, fibRuleHdrLen)
		h[0], h[4], h[7] = byte(IPv4), 254, RuleToTable
		return h
	}
	base := Rule{Family: IPv4, Table: 254, Action: RuleToTable, SuppressPrefixLen: -1, SuppressIfgroup: -1}
	for name, c := range map[string]struct {
		attrs [][]byte
		want  func(*Rule)
	}{
		"a mark without a mask":   {[][]byte{attr32(fraFwmark, 7)}, func(r *Rule) { r.Mark, r.Mask = 7, 0xffffffff }},
		"a mask":                  {[][]byte{attr32(fraFwmark, 7), attr32(fraFwmask, 15)}, func(r *Rule) { r.Mark, r.Mask = 7, 15 }},
		"realms decide nothing":   {[][]byte{attr32(fraFlow, 7)}, func(*Rule) {}},
		"an unknown attribute":    {[][]byte{attr32(200, 7)}, func(r *Rule) { r.Unknown = true }},
		"a flow label":            {[][]byte{attr32(fraFlowlabel, 7), attr32(fraFlowlabelMask, 1)}, func(r *Rule) { r.Unknown = true }},
		"a full port mask":        {[][]byte{attr(fraSportRange, 1, 0, 1, 0), attr(fraSportMask, 255, 255)}, func(r *Rule) { r.Sport = PortRange{1, 1} }},
		"a port mask":             {[][]byte{attr(fraDportMask, 254, 255)}, func(r *Rule) { r.Unknown = true }},
		"a DSCP of 0":             {[][]byte{attr(fraDSCP, 0), attr(fraDSCPMask, 0x3f)}, func(r *Rule) { r.DSCP = 1 }},
		"a DSCP mask":             {[][]byte{attr(fraDSCP, 0), attr(fraDSCPMask, 0x38)}, func(r *Rule) { r.DSCP, r.Unknown = 1, true }},
		"a tunnel id":             {[][]byte{attr(fraTunID, 0, 0, 0, 0, 0, 0, 0, 9)}, func(r *Rule) { r.TunID = 9 }},
		"suppression, a large id": {[][]byte{attr32(fraSuppressPrefixlen, 0), attr32(fraTable, 5450)}, func(r *Rule) { r.SuppressPrefixLen, r.Table = 0, 5450 }},
	} {
		want := base
		c.want(&want)
		got, err := decodeRule(raw(head(), c.attrs...))
		if err != nil || *got != want {
			t.Errorf("%s: %v\n%+v, want\n%+v", name, err, got, want)
		}
	}
}

func TestInternerSharesBodiesAndForgetsDeadOnes(t *testing.T) {
	var in Interner
	a, _ := in.ParseRoute(plain4(1, 1))
	b, _ := in.ParseRoute(plain4(2, 1))
	c, _ := in.ParseRoute(plain4(3, 2))
	a2, _ := in.ParseRoute(plain4(1, 1))
	if a.Body != b.Body || a.Body != a2.Body || a.Body == c.Body {
		t.Error("bodies are not shared as they should be")
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = in.ParseRoute(plainSeed) }); n > 0 {
		t.Errorf("%v allocations for a known body", n)
	}
	for i := range 10 * sweepMin {
		_, _ = in.ParseRoute(plain4(1, uint32(100+i)))
		if i%500 == 0 {
			runtime.GC()
		}
	}
	if n := in.Len(); n > 4*sweepMin {
		t.Errorf("%d bodies are kept", n)
	}
	if b2, _ := in.ParseRoute(plain4(7, 1)); b2.Body != a.Body {
		t.Error("a body in use was forgotten")
	}
	runtime.KeepAlive(a)
}

var plainSeed = plain4(9, 1)

func plain4(host byte, oif uint32) []byte {
	h := make([]byte, rtmsgLen)
	h[0], h[1], h[4], h[5], h[7] = byte(IPv4), 32, 254, 4, 1
	return raw(h, attr32(rtaTable, 254), attr(rtaDst, 10, 0, 0, host), attr32(rtaOif, oif))
}

func TestDefaultRoutesHaveAPrefixOfTheirFamily(t *testing.T) {
	for f, want := range map[Family]netip.Prefix{IPv4: netip.MustParsePrefix("0.0.0.0/0"), IPv6: netip.MustParsePrefix("::/0")} {
		h := make([]byte, rtmsgLen)
		h[0] = byte(f)
		var in Interner
		if r, err := in.ParseRoute(h); err != nil || r.Dst != want {
			t.Errorf("%s: %s, %v", f, r.Dst, err)
		}
	}
}

func TestNexthopsOfXfrmTunnelsHaveTheirIfID(t *testing.T) {
	encap := attr(rtaEncap, attr32(lwtXfrmIfID, 42)...)
	other := attr(rtaEncap, attr32(lwtXfrmIfID, 43)...)
	kind := func(k byte) []byte { return attr(rtaEncapType, k, 0, 0, 0)[:8] }
	head := func() []byte {
		h := make([]byte, rtmsgLen)
		h[0], h[1], h[4], h[7] = byte(IPv4), 0, 254, 1
		return h
	}
	member := func(oif byte, attrs ...[]byte) []byte {
		m := raw([]byte{0, 0, 0, 0, oif, 0, 0, 0}, attrs...)
		binary.NativeEndian.PutUint16(m, uint16(len(m)))
		return m
	}
	for name, tc := range map[string]struct {
		msg  []byte
		want []Nexthop
	}{
		"the kernel's order": {raw(head(), attr32(rtaOif, 3), encap, kind(lwtEncapXfrm)), []Nexthop{{Oif: 3, Encap: true, IfID: 42}}},
		"the other order":    {raw(head(), kind(lwtEncapXfrm), encap, attr32(rtaOif, 3)), []Nexthop{{Oif: 3, Encap: true, IfID: 42}}},
		"another kind":       {raw(head(), attr32(rtaOif, 3), encap, kind(2)), []Nexthop{{Oif: 3, Encap: true}}},
		"several": {
			raw(head(), attr(rtaMultipath, raw(member(3, encap, kind(lwtEncapXfrm)), member(4, other, kind(lwtEncapXfrm)), member(5))...)),
			[]Nexthop{{Oif: 3, Encap: true, IfID: 42}, {Oif: 4, Encap: true, IfID: 43}, {Oif: 5}},
		},
	} {
		var in Interner
		r, err := in.ParseRoute(tc.msg)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d := cmp.Diff(tc.want, r.Body.Nexthops, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		// Written again each of them is marked as nested, which the kernel insists on.
		out, err := EncodeRoute(r)
		nested := binary.NativeEndian.AppendUint16(nil, rtaEncap|1<<15)
		if n := strings.Count(string(out), string(nested)); err != nil || n != tunnelsIn(tc.want) {
			t.Errorf("%s: %d nested tunnels in %x, %v", name, n, out, err)
		}
		if again, err := in.ParseRoute(out); err != nil || !EqualButMTU(r.Body, again.Body) {
			t.Errorf("%s: %x is another route, %v", name, out, err)
		}
	}
	var in Interner
	if _, err := in.ParseRoute(raw(head(), attr32(rtaOif, 3), attr(rtaEncap, attr(lwtXfrmIfID, 1)...), kind(lwtEncapXfrm))); err == nil {
		t.Error("an if_id of one byte was decoded")
	}
}

func tunnelsIn(hops []Nexthop) (n int) {
	for _, h := range hops {
		if h.Encap {
			n++
		}
	}
	return n
}

func fuzz(f *testing.F, types ...uint16) {
	for _, m := range append(captured(f), capturedIn(f, "testdata/tunnels.txt")...) {
		for i, typ := range types {
			if m.typ == typ {
				f.Add(uint8(i), m.data)
			}
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, data []byte) {
		var d Decoder
		before := string(data)
		ev, err := d.Decode(Header{Type: types[int(which)%len(types)]}, data)
		if ev != nil && err != nil {
			t.Error("an event and an error")
		}
		if string(data) != before {
			t.Error("the decoder changed its input")
		}
		if ev != nil {
			_ = describe(ev)
		}
		if set, ok := ev.(RouteSet); ok {
			roundTrip(t, set.Route)
		}
		if set, ok := ev.(RuleSet); ok && !set.Rule.Unknown {
			ruleRoundTrip(t, *set.Rule)
		}
	})
}

func FuzzRoute(f *testing.F)   { fuzz(f, rtmNewRoute, rtmDelRoute) }
func FuzzLink(f *testing.F)    { fuzz(f, rtmNewLink, rtmDelLink) }
func FuzzAddr(f *testing.F)    { fuzz(f, rtmNewAddr, rtmDelAddr) }
func FuzzRule(f *testing.F)    { fuzz(f, rtmNewRule, rtmDelRule) }
func FuzzNexthop(f *testing.F) { fuzz(f, rtmNewNexthop, rtmDelNexthop) }

func BenchmarkDecodeRoute(b *testing.B) {
	var d Decoder
	data := plain4(1, 3)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Decode(Header{Type: rtmNewRoute}, data); err != nil {
			b.Fatal(err)
		}
	}
}

// TestDecodeLinkIPv6MTU reads the MTU that IPv6 has of its own on a device.
func TestDecodeLinkIPv6MTU(t *testing.T) {
	for _, tc := range []struct {
		name      string
		mtu6      uint32
		want      int
		wantFor6  int
		shortened bool
	}{
		{name: "smaller", mtu6: 1400, want: 1400, wantFor6: 1400},
		{name: "the device's", mtu6: 1500, want: 0, wantFor6: 1500},
		{name: "an array without it", mtu6: 1400, want: 0, wantFor6: 1500, shortened: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			msg := make([]byte, ifinfomsgLen)
			binary.NativeEndian.PutUint32(msg[4:], 7)
			msg = appendAttr(msg, iflaIfname, []byte("eth0\x00"))
			msg = appendU32(msg, iflaMTU, 1500)
			conf := make([]byte, 12)
			binary.NativeEndian.PutUint32(conf[8:], tc.mtu6)
			if tc.shortened {
				conf = conf[:8]
			}
			inet6 := appendAttr(nil, iflaInet6Conf, conf)
			msg = appendAttr(msg, iflaAFSpec, appendAttr(nil, uint16(IPv6), inet6))
			l, err := decodeLink(msg)
			if err != nil {
				t.Fatal(err)
			}
			if l.MTU6 != tc.want || l.MTUFor(IPv6) != tc.wantFor6 || l.MTUFor(IPv4) != 1500 {
				t.Errorf("MTU6 %d, for IPv6 %d, for IPv4 %d; want %d, %d, 1500", l.MTU6, l.MTUFor(IPv6), l.MTUFor(IPv4), tc.want, tc.wantFor6)
			}
		})
	}
}
