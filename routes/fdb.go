package routes

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
)

// The forwarding database of a VXLAN device leads its packets to other machines than its
// remote: entries that an admin appends, or that the device learns from what it receives. The
// kernel tells of them in the group of neighbours (vxlan_fdb_notify, drivers/net/vxlan).

// Messages, flags and attributes of neighbours (linux/rtnetlink.h, linux/neighbour.h).
const (
	rtmNewNeigh = 28
	rtmDelNeigh = 29
	rtmGetNeigh = 30

	afBridge = 7
	ntfSelf  = 2

	ndaDst     = 1
	ndaLLAddr  = 2
	ndaPort    = 6
	ndaIfindex = 8
	ndaNHID    = 13

	ndmsgLen     = 12
	ndmFlagsByte = 10
)

// fdbEntry is one destination in the forwarding database of a VXLAN device.
type fdbEntry struct {
	index Ifindex
	gone  bool
	key   fdbKey
}

// fdbKey names a destination of an entry.
type fdbKey struct {
	addr string // the inner link-layer address, all zero for what has no entry of its own
	dst  netip.Addr
	port uint16  // 0 for the device's
	via  Ifindex // 0 for the device's
	nhid uint32  // a nexthop group
}

// decodeFDB decodes an RTM_NEWNEIGH or RTM_DELNEIGH of AF_BRIDGE; ok is false for other
// neighbours and for what a bridge itself has learnt.
func decodeFDB(h Header, data []byte) (e fdbEntry, ok bool, err error) {
	if len(data) < ndmsgLen {
		return fdbEntry{}, false, errShort
	}
	if data[0] != afBridge || data[ndmFlagsByte]&ntfSelf == 0 {
		return fdbEntry{}, false, nil
	}
	e = fdbEntry{index: Ifindex(binary.NativeEndian.Uint32(data[4:])), gone: h.Type == rtmDelNeigh}
	a := attrs{b: data[ndmsgLen:]}
	for a.next() {
		switch a.typ {
		case ndaDst:
			e.key.dst = a.anyAddr()
		case ndaLLAddr:
			e.key.addr = string(a.val)
		case ndaPort:
			e.key.port = a.be16()
		case ndaIfindex:
			e.key.via = Ifindex(a.u32())
		case ndaNHID:
			e.key.nhid = a.u32()
		}
	}
	return e, a.err == nil, a.err
}

// maxOthers bounds how many entries that lead elsewhere are remembered of one device.
const maxOthers = 256

// fdbs remember which entries of VXLAN devices with a remote lead elsewhere. The kernel sends
// the port and the device of an entry only where they are not those of the device itself.
type fdbs struct {
	devices map[Ifindex]*fdb
	// due are devices whose database is to be dumped.
	due map[Ifindex]struct{}
}

type fdb struct {
	link   *Link // as it was told last
	others map[fdbKey]struct{}
	many   bool // more than are remembered
}

func newFDBs() fdbs {
	return fdbs{devices: map[Ifindex]*fdb{}, due: map[Ifindex]struct{}{}}
}

// set takes a device, and returns it with what is known of its entries. One that is new here, or
// whose remote changed, is due for a dump.
func (f *fdbs) set(l *Link) *Link {
	if l.Kind != "vxlan" || !l.Encap.Remote.IsValid() {
		f.gone(l.Index)
		return l
	}
	d := f.devices[l.Index]
	if d == nil || d.link.Encap.Remote != l.Encap.Remote || d.link.Encap.Link != l.Encap.Link {
		d = &fdb{others: map[fdbKey]struct{}{}}
		f.devices[l.Index] = d
		f.due[l.Index] = struct{}{}
	}
	d.link = d.apply(l)
	return d.link
}

// stamp is a device with what is known of its entries now.
func (f *fdbs) stamp(l *Link) *Link {
	if d := f.devices[l.Index]; d != nil && l.Encap.Remote.IsValid() {
		return d.apply(l)
	}
	return l
}

func (f *fdbs) gone(i Ifindex) {
	delete(f.devices, i)
	delete(f.due, i)
}

// told takes an entry that was added or removed. It returns the device if that changed it.
func (f *fdbs) told(e fdbEntry) *Link {
	d := f.devices[e.index]
	if d == nil || !d.elsewhere(e.key) {
		return nil
	}
	if e.gone {
		delete(d.others, e.key)
	} else if d.others[e.key] = struct{}{}; len(d.others) > maxOthers {
		d.many = true
		clear(d.others)
	}
	return d.update()
}

// elsewhere reports whether an entry leads to another place than the device's own remote.
func (d *fdb) elsewhere(k fdbKey) bool {
	e := &d.link.Encap
	return k.nhid != 0 || k.dst.IsValid() && k.dst != e.Remote || k.port != 0 || k.via != 0 && k.via != e.Link
}

// update returns the device if what is known of its entries changed it, else nil.
func (d *fdb) update() *Link {
	l := d.apply(d.link)
	if l == d.link {
		return nil
	}
	d.link = l
	return l
}

// apply is the link with Encap.Others as it is to be. Links are immutable: it is a copy if that
// makes a difference.
func (d *fdb) apply(l *Link) *Link {
	others := d.many || len(d.others) > 0
	if l.Encap.Others == others {
		return l
	}
	changed := *l
	changed.Encap.Others = others
	return &changed
}

// fill replaces what is known of a device by a dump.
func (f *fdbs) fill(i Ifindex, entries []fdbEntry) *Link {
	d := f.devices[i]
	if d == nil {
		return nil
	}
	clear(d.others)
	d.many = false
	for _, e := range entries {
		if e.index == i && d.elsewhere(e.key) {
			d.others[e.key] = struct{}{}
		}
	}
	if d.many = len(d.others) > maxOthers; d.many {
		clear(d.others)
	}
	return d.update()
}

// take empties due, in order.
func (f *fdbs) take() []Ifindex {
	out := slices.Sorted(maps.Keys(f.due))
	clear(f.due)
	return out
}

// fdbRequest asks for the database of one device.
func fdbRequest(i Ifindex) []byte {
	b := genHeader(afBridge, ndmsgLen)
	binary.NativeEndian.PutUint32(b[4:], uint32(i))
	return b
}
