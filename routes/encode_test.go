package routes

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// roundTrip writes a route in all ways and reads it again.
func roundTrip(t *testing.T, r Route) {
	t.Helper()
	var in Interner
	if r.Body.Type == 0 && r.Body.Family == 0 {
		t.Errorf("no family: %+v", r.Body)
	}
	same, err := EncodeRoute(r)
	if err != nil {
		t.Fatalf("%v\n%x", err, r.Body.Raw)
	}
	got, err := in.ParseRoute(same)
	if err != nil {
		t.Fatalf("%v\n%x", err, same)
	}
	if got.Dst != r.Dst {
		t.Errorf("destination %s became %s", r.Dst, got.Dst)
	}
	if r.Body.Expires {
		return
	}
	if r.Body.NHID == 0 && !EqualButMTU(r.Body, got.Body) {
		t.Errorf("%x\nbecame\n%x", r.Body.Raw, got.Body.Raw)
	}
	if got.Body.NHID != 0 && len(got.Body.Nexthops) > 0 {
		t.Error("nexthops beside a nexthop object")
	}
	lock, err := EncodeLock(r, MTUMetric{1400, true})
	if err != nil {
		t.Fatal(err)
	}
	got, err = in.ParseRoute(lock)
	if err != nil {
		t.Fatalf("%v\n%x", err, lock)
	}
	if MTUMetricOf(got.Body) != (MTUMetric{1400, true}) && !twice(r.Body, rtaMetrics) {
		t.Errorf("locked: %s\n%x", MTUMetricOf(got.Body), lock)
	}
}

// twice reports whether the body has an attribute more than once, which no kernel sends.
func twice(b *Body, typ uint16) bool {
	n := 0
	for a := (attrs{b: []byte(b.Raw)[rtmsgLen:]}); a.next(); {
		if a.typ == typ {
			n++
		}
	}
	return n > 1
}

func ruleRoundTrip(t *testing.T, r Rule) {
	t.Helper()
	b, err := EncodeRule(r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeRule(b)
	if err != nil {
		t.Fatal(err)
	}
	// What a rule of another action can't have is not written.
	if r.Action != RuleToTable {
		r.SuppressPrefixLen, r.SuppressIfgroup = -1, -1
	}
	r.SuppressPrefixLen, r.SuppressIfgroup = max(-1, r.SuppressPrefixLen), max(-1, r.SuppressIfgroup)
	if r.Action != RuleGoto {
		r.Goto = 0
	}
	if *got != r {
		t.Errorf("%+v\nbecame\n%+v", r, *got)
	}
}

func TestCapturedRoutesAndRulesRoundTrip(t *testing.T) {
	var d Decoder
	for _, m := range captured(t) {
		ev, err := d.Decode(Header{Type: m.typ}, m.data)
		if err != nil {
			t.Fatal(err)
		}
		switch ev := ev.(type) {
		case RouteSet:
			roundTrip(t, ev.Route)
		case RuleSet:
			ruleRoundTrip(t, *ev.Rule)
		}
	}
}

func TestWhatTheKernelSetsIsNotWritten(t *testing.T) {
	hop := func(flags byte) []byte {
		h := make([]byte, rtnexthopLen)
		binary.NativeEndian.PutUint16(h, rtnexthopLen)
		h[2], h[4] = flags, 3
		return h
	}
	h := make([]byte, rtmsgLen)
	h[0] = byte(IPv4)
	binary.NativeEndian.PutUint32(h[8:], routeKernelFlags&^rtmFCloned|uint32(NexthopOnlink))
	msg := raw(h, attr(rtaMultipath, append(hop(0xff), hop(NexthopDead)...)...), attr(rtaCacheinfo, make([]byte, 32)...))
	var in Interner
	r, err := in.ParseRoute(msg)
	if err != nil {
		t.Fatal(err)
	}
	if r.Body.Flags != uint32(NexthopOnlink) || r.Body.Nexthops[0].Flags != 0xff || r.Body.Nexthops[1].Flags != NexthopDead {
		t.Errorf("decoded %+v", r.Body)
	}
	out := must(EncodeRoute(r))(t)
	got, err := in.ParseRoute(out)
	if err != nil {
		t.Fatal(err)
	}
	if f := binary.NativeEndian.Uint32(out[8:]); f != uint32(NexthopOnlink) {
		t.Errorf("route flags %#x", f)
	}
	if n := got.Body.Nexthops; n[0].Flags != 0xff&^nexthopKernelFlags || n[1].Flags != 0 {
		t.Errorf("nexthop flags %+v", n)
	}
	if !Equal(r.Body, got.Body) || !SameNexthops(r.Body, got.Body) {
		t.Error("not equal but for the kernel's flags")
	}
}

func TestBodiesThatDiffer(t *testing.T) {
	var in Interner
	parse := func(attributes ...[]byte) *Body {
		h := make([]byte, rtmsgLen)
		h[0], h[7] = byte(IPv4), byte(Unicast)
		r, err := in.ParseRoute(raw(h, attributes...))
		if err != nil {
			t.Fatal(err)
		}
		return r.Body
	}
	gw, oif := attr(rtaGateway, 10, 0, 0, 1), attr32(rtaOif, 3)
	mtu := attr(rtaMetrics, attr32(rtaxMTU, 1400)...)
	a := parse(gw, oif)
	for name, c := range map[string]struct {
		b                  *Body
		equal, butMTU, hop bool
	}{
		"itself":             {a, true, true, true},
		"another order":      {parse(oif, gw), true, true, true},
		"an MTU":             {parse(gw, oif, mtu), false, true, true},
		"another gateway":    {parse(attr(rtaGateway, 10, 0, 0, 2), oif), false, false, false},
		"a nexthop object":   {parse(gw, oif, attr32(rtaNHID, 1)), false, false, false},
		"a preferred source": {parse(gw, oif, attr(rtaPrefsrc, 1, 2, 3, 4)), false, false, true},
		"none":               {nil, false, false, false},
	} {
		if Equal(a, c.b) != c.equal || EqualButMTU(a, c.b) != c.butMTU || SameNexthops(a, c.b) != c.hop {
			t.Errorf("%s: Equal %t, EqualButMTU %t, SameNexthops %t", name, Equal(a, c.b), EqualButMTU(a, c.b), SameNexthops(a, c.b))
		}
	}
}

func TestEncodeRefusesWhatItCannotSay(t *testing.T) {
	v4, v6 := netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")
	r := Route{Dst: v4, Body: NewBody(Body{Family: IPv4})}
	for name, err := range map[string]error{
		"no raw attributes":     second(EncodeRoute(r)),
		"no body":               second(EncodeLock(Route{Dst: v4}, MTUMetric{})),
		"another family":        second(EncodeClone(r, v6, 1, 1, MTUMetric{}, 0, 0)),
		"a throw of another":    second(EncodeThrow(IPv4, v6, 1, 1, 0)),
		"a throw to nowhere":    second(EncodeThrow(IPv4, netip.Prefix{}, 1, 1, 0)),
		"an unknown rule":       second(EncodeRule(Rule{Family: IPv4, Unknown: true})),
		"a rule of two kinds":   second(EncodeRule(Rule{Family: IPv4, Src: v6})),
		"a rule of no family":   second(EncodeRule(Rule{})),
		"a lookup of two kinds": second(Query{Dst: v4.Addr(), Src: v6.Addr()}.encode()),
		"a lookup of nothing":   second(Query{}.encode()),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func second[T any](_ T, err error) error { return err }
