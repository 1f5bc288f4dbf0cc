package routes

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

func TestNexthopGroupDecodes(t *testing.T) {
	member := func(id uint32, weight, high byte) []byte {
		return append(binary.NativeEndian.AppendUint32(nil, id), weight, high, 0, 0)
	}
	for name, c := range map[string]struct {
		attributes []byte
		want       GroupMember
		resilient  bool
	}{
		"by hash":     {attr(nhaGroupType, 0, 0), GroupMember{7, 2}, false},
		"resilient":   {attr(nhaGroupType, binary.NativeEndian.AppendUint16(nil, 1)...), GroupMember{7, 2}, true},
		"wide weight": {nil, GroupMember{7, 0x102}, false},
	} {
		high := byte(c.want.Weight >> 8)
		msg := raw(make([]byte, nhmsgLen), attr32(nhaID, 10), attr(nhaGroup, member(7, 2, high)...), c.attributes)
		n, err := decodeNexthop(msg)
		if err != nil || len(n.Group) != 1 || n.Group[0] != c.want || n.Resilient != c.resilient {
			t.Errorf("%s: %+v, %v", name, n, err)
		}
	}
}

func TestObjectWays(t *testing.T) {
	f := NewFIB()
	gw := netip.MustParseAddr("192.0.2.1")
	for _, n := range []*NexthopObject{
		{ID: 1, Oif: 2, Gateway: gw}, {ID: 2, Oif: 3},
		{ID: 10, Group: []GroupMember{{1, 4}, {2, 0}}},
		{ID: 11, Group: []GroupMember{{1, 0}, {9, 0}}},
		{ID: 12, Group: []GroupMember{{1, 0x100}}},
	} {
		f.Apply(NexthopSet{Nexthop: n})
	}
	if ways, ok := f.ObjectWays(10); !ok || len(ways) != 2 || ways[0] != (Nexthop{Oif: 2, Gateway: gw, Weight: 4}) || ways[1] != (Nexthop{Oif: 3}) {
		t.Errorf("group: %+v, %t", ways, ok)
	}
	for _, id := range []uint32{11, 12, 13} {
		if ways, ok := f.ObjectWays(id); ok {
			t.Errorf("%d: %+v, although a member, its weight or the object can't be told", id, ways)
		}
	}
}

// The order of several ways decides which flow takes which.
func TestSameWays(t *testing.T) {
	var in Interner
	body := func(nhid uint32, hops ...byte) *Body {
		var all []byte
		for _, h := range hops {
			m := make([]byte, rtnexthopLen)
			m[0], m[2], m[3], m[4] = rtnexthopLen, h&0xf0>>4, h>>7, h&0xf
			all = append(all, m...)
		}
		head := make([]byte, rtmsgLen)
		head[0], head[7] = byte(IPv4), byte(Unicast)
		parts := [][]byte{attr(rtaMultipath, all...)}
		if nhid != 0 {
			parts = append(parts, attr32(rtaNHID, nhid))
		}
		r, err := in.ParseRoute(raw(head, parts...))
		if err != nil {
			t.Fatal(err)
		}
		return r.Body
	}
	for name, c := range map[string]struct {
		a, b *Body
		want bool
	}{
		"the same":              {body(0, 2, 3), body(0, 2, 3), true},
		"another order":         {body(0, 2, 3), body(0, 3, 2), false},
		"another weight":        {body(0, 2, 3), body(0, 0x82, 3), false},
		"one of another weight": {body(0, 2), body(0, 0x82), true},
		"an object":             {body(5, 2, 3), body(0, 2, 3), true},
		"onlink":                {body(0, 2, 3), body(0, 0x42, 3), true},
	} {
		if got := SameWays(c.a, c.b); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}
