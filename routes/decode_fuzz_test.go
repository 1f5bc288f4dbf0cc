package routes

import (
	"bytes"
	"net/netip"
	"testing"
)

// FuzzFDB gives a VXLAN device entries of its forwarding database: what is remembered of them is bounded, and gone once the device is.
func FuzzFDB(f *testing.F) {
	head := make([]byte, ndmsgLen)
	head[0], head[4], head[ndmFlagsByte] = afBridge, 7, ntfSelf
	f.Add(raw(head, attr(ndaLLAddr, 2, 0, 0, 0, 0, 1), attr(ndaDst, 10, 0, 0, 3)), false)
	f.Add(raw(head, attr(ndaLLAddr, 2, 0, 0, 0, 0, 1), attr32(ndaNHID, 9)), true)
	f.Add(raw(head, attr(ndaDst, netip.MustParseAddr("fd00::9").AsSlice()...), attr(ndaPort, 0x12, 0xb5), attr32(ndaIfindex, 3)), false)
	f.Fuzz(func(t *testing.T, data []byte, gone bool) {
		h := Header{Type: rtmNewNeigh}
		if gone {
			h.Type = rtmDelNeigh
		}
		before := bytes.Clone(data)
		e, ok, err := decodeFDB(h, data)
		if !bytes.Equal(data, before) {
			t.Error("the decoder changed its input")
		}
		if ok && err != nil || ok && e.gone != gone || !ok && e.key != (fdbKey{}) && err == nil {
			t.Errorf("%+v, %t, %v", e, ok, err)
		}
		if !ok {
			return
		}
		db := newFDBs()
		link := &Link{Index: e.index, Kind: "vxlan", Encap: Encap{Remote: netip.MustParseAddr("10.0.0.2")}}
		db.set(link)
		for i := range maxOthers + 2 {
			one := e
			one.key.addr, one.gone = string(rune('a'+i))+e.key.addr, false
			db.told(one)
		}
		db.told(e)
		if n := len(db.devices[e.index].others); n > maxOthers {
			t.Errorf("%d entries are remembered", n)
		}
		if e.gone && db.devices[e.index].others[e.key] != struct{}{} {
			t.Error("an entry that is gone is remembered")
		}
		if db.gone(e.index); len(db.devices)+len(db.due) > 0 {
			t.Error("a device that is gone is remembered")
		}
	})
}

// FuzzAnswer decodes what the kernel answers when it is asked where a packet goes. What it answers for the route itself is that route as a dump
// has it.
func FuzzAnswer(f *testing.F) {
	for _, m := range captured(f) {
		if m.typ == rtmNewRoute {
			f.Add(m.data, false)
			f.Add(m.data, true)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, match bool) {
		var a Answer
		var in, dump Interner
		given := bytes.Clone(data)
		if a.decode(&in, data, match) != nil {
			return
		}
		if a.Gateway.IsValid() && a.Gateway.Zone() != "" || a.PMTU != 0 && (a.Expires == 0 || a.MTU != 0) {
			t.Errorf("%+v", a)
		}
		if !match {
			if !bytes.Equal(data, given) {
				t.Error("the decoder changed its input")
			}
			return
		}
		given[8], given[9] = data[8], data[9] // the mark of a cached answer is taken away
		want, err := dump.ParseRoute(given)
		if err != nil || !EqualButMTU(want.Body, a.Route.Body) {
			t.Errorf("%+v, and in a dump %+v, %v", a.Route, want, err)
		}
	})
}
