package verify

import (
	"errors"
	"net/netip"

	"tsoagent/agent/flows"
	"tsoagent/wire"
	"tsoagent/xfrmwatch"
)

// The classes of packets.
const (
	Covered   = "covered"
	Signed    = "signed"       // by TCP-MD5 or TCP-AO
	Uncovered = "not covered"  // by any policy, nor signed
	Clear     = "in the clear" // although a policy covers them
	Other     = "other"        // about which there is nothing to say: not IP, IKE, neighbour discovery, somebody else's ESP
)

// class is what packets are sorted into.
type class struct {
	class  string
	policy uint32 // 0 where it isn't known
	more   int    // policies that share what is counted here
	as     string // "esp" or "ah" for what IPsec has made of covered packets
	ipv6   bool
}

// tally counts the packets of one class.
type tally struct {
	packets, bytes uint64
	tcp, super     uint64 // super-packets of TCP, and all
	large          uint64 // single packets that fill half of the MTU or more
	// bulk are those of them that are TCP from the host's own addresses, and not the last of what was written (PSH): more was to follow, and so
	// the socket could have sent a super-packet. An answer that fits a single segment is none, however often it is given.
	bulk    uint64
	largest int // bytes, at the network layer
	segment int // the largest segment size that a super-packet asked for, in bytes of payload
}

// Port is what is looked at: a device as it is now.
type Port struct {
	Index int32
	Name  string
	MTU   int // bytes
	// NoXFRM says that IPv4 packets leave there as they are (disable_xfrm).
	NoXFRM bool
}

// The bounds of what a Sorter keeps.
const (
	mostClasses = 128  // of a device; further policies are counted together
	mostFlows   = 8192 // whose class is remembered
)

// Sorter sorts packets and counts them. It is not safe for concurrent use.
type Sorter struct {
	world    *World
	local    map[netip.Addr]bool
	policies *flows.Policies
	unmarked *flows.Policies // the same without their marks, nil if none has one
	sas      map[saKey]*SA
	pairs    map[pair]*SA
	ifIDs    []uint32
	encap    bool // some SA is ESP in UDP
	devices  []*device
}

type saKey struct {
	dst   netip.Addr
	spi   uint32
	proto uint8
}

type pair struct{ src, dst netip.Addr }

// device is a Port with what was counted there.
type device struct {
	Device
	at      Port
	known   bool // the world has it
	flows   map[flow]class
	tallies map[class]*tally
	bad     uint64 // packets whose headers could not be read
}

// flow is what decides about a packet's class.
type flow struct {
	src, dst     netip.Addr
	proto        uint8
	sport, dport uint16
	spi          uint32
	signed       bool
	fragment     bool
}

// NewSorter starts to count what leaves by the ports. local are the host's own addresses.
func NewSorter(w *World, ports []Port, local []netip.Addr) *Sorter {
	s := &Sorter{world: w, local: map[netip.Addr]bool{}, sas: map[saKey]*SA{}, pairs: map[pair]*SA{}}
	for _, a := range local {
		s.local[a.Unmap()] = true
	}
	list, unmarked := make([]*xfrmwatch.Policy, 0, len(w.Policies)), make([]*xfrmwatch.Policy, 0, len(w.Policies))
	marks, ids := false, map[uint32]bool{}
	for i := range w.Policies {
		p := w.Policies[i].policy()
		list = append(list, p)
		bare := *p
		bare.Mark = xfrmwatch.Mark{}
		unmarked = append(unmarked, &bare)
		marks = marks || p.Mark != xfrmwatch.Mark{}
		if p.IfID != 0 && !ids[p.IfID] {
			ids[p.IfID] = true
			s.ifIDs = append(s.ifIDs, p.IfID)
		}
	}
	s.policies = flows.NewPolicies(list)
	if marks {
		s.unmarked = flows.NewPolicies(unmarked)
	}
	for i := range w.SAs {
		sa := &w.SAs[i]
		s.sas[saKey{sa.Dst, sa.SPI, sa.Proto}] = sa
		between := pair{sa.Src, sa.Dst}
		if one, have := s.pairs[between]; !have {
			s.pairs[between] = sa
		} else if one.Policy != sa.Policy { // whose a younger one is, is not known
			s.pairs[between] = &SA{Encap: one.Encap || sa.Encap}
		}
		s.encap = s.encap || sa.Encap
	}
	for _, p := range ports {
		d := &device{at: p, flows: map[flow]class{}, tallies: map[class]*tally{}}
		for _, known := range w.Devices {
			if known.Index == p.Index {
				d.Device, d.known = known, true
			}
		}
		d.Index, d.Name = p.Index, p.Name
		s.devices = append(s.devices, d)
	}
	return s
}

// Add counts a packet that leaves by a port, which is known by its place.
func (s *Sorter) Add(i int, f *wire.Frame) {
	d := s.devices[i]
	p, err := f.Packet()
	switch {
	case errors.Is(err, wire.ErrNotIP):
		p.Length = f.Length - max(f.Network, 0)
		d.count(class{class: Other}, f, &p, false)
	case err != nil:
		d.bad++
	default:
		d.count(s.class(d, &p), f, &p, s.local[p.Src])
	}
}

func (d *device) count(c class, f *wire.Frame, p *wire.Packet, local bool) {
	t := d.tallies[c]
	if t == nil {
		if len(d.tallies) >= mostClasses {
			c.policy, c.more, c.as = 0, 0, ""
			t = d.tallies[c] // one of a few that there can be then
		}
		if t == nil {
			t = new(tally)
			d.tallies[c] = t
		}
	}
	t.packets++
	t.bytes += uint64(max(p.Length, 0))
	t.largest = max(t.largest, p.Length)
	switch {
	case f.GSO != wire.NoGSO:
		t.super++
		t.segment = max(t.segment, f.Segment)
		if f.GSO.TCP() {
			t.tcp++
		}
	case p.Length > d.at.MTU && c.class != Other:
		t.super++ // the device has to do something about it
	case 2*p.Length >= d.at.MTU:
		t.large++
		if local && p.Proto == tcp && !p.Push {
			t.bulk++
		}
	}
}

// The protocols and ports that are told apart.
const (
	igmp, tcp, udp, esp, ah, icmpv6 = 2, 6, 17, 50, 51, 58
	ike, natt                       = 500, 4500
)

// class is the class of a packet that leaves by a device.
func (s *Sorter) class(d *device, p *wire.Packet) class {
	// The first word of what UDP carries is an SPI only where it is one: not one of a flow's own.
	if p.Proto == udp && (p.SPI != 0 || p.Fragment) && !d.carrier() {
		if c, ok := s.encapsulated(p); ok {
			return c
		}
	}
	k := flow{src: p.Src, dst: p.Dst, proto: p.Proto, sport: p.Sport, dport: p.Dport, signed: p.Signature != 0, fragment: p.Fragment}
	if p.Proto == esp || p.Proto == ah {
		k.spi = p.SPI
	}
	c, have := d.flows[k]
	if !have {
		c = s.sort(d, p)
		c.ipv6 = p.Src.Is6() && c.class != Other
		if len(d.flows) >= mostFlows {
			clear(d.flows)
		}
		d.flows[k] = c
	}
	return c
}

// carrier says that packets leave there ahead of IPsec.
func (d *device) carrier() bool {
	return d.Covered || d.IfID != 0 || d.External || d.VTI || d.Elsewhere
}

func (s *Sorter) sort(d *device, p *wire.Packet) class {
	switch {
	case d.Elsewhere:
		return class{class: Other}
	case d.Covered:
		return class{class: Covered, policy: d.Policy}
	case d.carrier():
		return s.inner(d, p)
	case p.Proto == esp || p.Proto == ah:
		return s.transformed(p)
	case control(p):
		return class{class: Other}
	}
	if policy := s.inTheClear(d, p); policy != 0 {
		return class{class: Clear, policy: policy}
	}
	if p.Signature != 0 {
		return class{class: Signed}
	}
	return class{class: Uncovered}
}

// inner sorts what leaves by an xfrm interface or a vti, which drop what no policy covers.
func (s *Sorter) inner(d *device, p *wire.Packet) class {
	f := flowOf(d, p)
	f.Mark = d.Mark
	ids := []uint32{d.IfID}
	if d.External {
		ids = s.ifIDs
	}
	for _, f.IfID = range ids {
		if win := s.policies.Lookup(f); win != nil {
			if covers, _ := win.Covers(); covers {
				return class{class: Covered, policy: uint32(win.Index)}
			}
		}
	}
	return class{class: Other}
}

func flowOf(d *device, p *wire.Packet) xfrmwatch.Flow {
	return xfrmwatch.Flow{Src: p.Src, Dst: p.Dst, Proto: xfrmwatch.Proto(p.Proto), Sport: p.Sport, Dport: p.Dport, Oif: d.Index}
}

// transformed sorts ESP and AH: those of an SA that is known, or of a younger one between the same hosts, are
// covered flows.
func (s *Sorter) transformed(p *wire.Packet) class {
	as := "esp"
	if p.Proto == ah {
		as = "ah"
	}
	sa := s.sas[saKey{p.Dst, p.SPI, p.Proto}]
	if sa == nil {
		sa = s.pairs[pair{p.Src, p.Dst}]
	}
	if sa == nil {
		return class{class: Other}
	}
	return class{class: Covered, policy: sa.Policy, more: sa.More, as: as}
}

// encapsulated sorts ESP in UDP.
func (s *Sorter) encapsulated(p *wire.Packet) (class, bool) {
	if !s.encap {
		return class{}, false
	}
	sa := s.sas[saKey{p.Dst, p.SPI, esp}]
	// Of a fragment behind the first nothing but the hosts is known.
	if sa == nil && (p.Fragment || (p.Sport == natt || p.Dport == natt) && p.Payload > 8) {
		sa = s.pairs[pair{p.Src, p.Dst}]
	}
	if sa == nil || !sa.Encap {
		return class{}, false
	}
	return class{class: Covered, policy: sa.Policy, more: sa.More, as: "esp", ipv6: p.Src.Is6()}, true
}

// control says that a packet is the network's own: IKE, whose sockets have policies of their own, neighbour and
// listener discovery.
func control(p *wire.Packet) bool {
	switch p.Proto {
	case udp:
		return p.Sport == ike || p.Dport == ike || p.Sport == natt || p.Dport == natt
	case icmpv6:
		const listeners, listenersDone, routers, redirect, listeners2 = 130, 132, 133, 137, 143
		return p.Sport >= listeners && p.Sport <= listenersDone || p.Sport >= routers && p.Sport <= redirect || p.Sport == listeners2
	case igmp:
		return true
	}
	return false
}

// inTheClear is the policy that covers a packet which leaves as it is, 0 for none. Where a mark could have made the
// difference, which is not seen here, it is none.
func (s *Sorter) inTheClear(d *device, p *wire.Packet) uint32 {
	if d.Passing || !d.known || d.at.NoXFRM && p.Src.Is4() || !ordinary(p.Src) || !ordinary(p.Dst) || p.Fragment {
		return 0
	}
	f := flowOf(d, p)
	win := s.policies.Lookup(f)
	if win == nil {
		return 0
	}
	if covers, maybe := win.Covers(); !covers || maybe {
		return 0
	}
	if s.unmarked != nil {
		if other := s.unmarked.Lookup(f); other == nil || other.Index != win.Index {
			return 0
		}
	}
	return uint32(win.Index)
}

// ordinary says that an address is one host's, anywhere.
func ordinary(a netip.Addr) bool {
	return !a.IsMulticast() && !a.IsLinkLocalUnicast() && !a.IsLoopback() && !a.IsUnspecified() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}
