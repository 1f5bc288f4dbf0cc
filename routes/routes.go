// Package routes knows the kernel's routing: links, addresses, rules, nexthop objects and
// routes of all tables. It mirrors them from rtnetlink, answers which routes a whole prefix
// uses, and locks route MTUs.
//
// The values and the lookups are pure. Kernel I/O lives in watch_linux.go and table_linux.go.
package routes

import (
	"fmt"
	"net/netip"
)

// Family is an address family, AF_INET or AF_INET6.
type Family uint8

// The address families of rules and routes.
const (
	IPv4 Family = 2  // AF_INET
	IPv6 Family = 10 // AF_INET6
)

// FamilyOf returns the family of an address.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Any is the prefix that contains every address of the family.
func (f Family) Any() netip.Prefix {
	if f == IPv4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// Bits is the length of an address of the family in bits.
func (f Family) Bits() int {
	if f == IPv4 {
		return 32
	}
	return 128
}

// String returns "ipv4" or "ipv6".
func (f Family) String() string {
	switch f {
	case IPv4:
		return "ipv4"
	case IPv6:
		return "ipv6"
	}
	return fmt.Sprintf("family %d", uint8(f))
}

// Ifindex is the kernel's number of a network device in its namespace, 0 for none.
type Ifindex int32

// TableID is the number of a routing table (RTA_TABLE).
type TableID uint32

// The tables that the kernel itself knows (linux/rtnetlink.h).
const (
	TableDefault TableID = 253
	TableMain    TableID = 254
	TableLocal   TableID = 255
)

// Protocol says who installed a route or a rule (RTPROT_*).
type Protocol uint8

// Route protocols whose routes are never locked in place, and our own.
const (
	ProtoRedirect Protocol = 1
	ProtoKernel   Protocol = 2
	ProtoBoot     Protocol = 3
	ProtoStatic   Protocol = 4
	ProtoRA       Protocol = 9
	// ProtoTSOAgent marks the routes and rules that tsoagent owns.
	ProtoTSOAgent Protocol = 84
)

// Type is a route's type (RTN_*).
type Type uint8

// Route types (linux/rtnetlink.h).
const (
	Unicast     Type = 1
	Local       Type = 2
	Broadcast   Type = 3
	Anycast     Type = 4
	Multicast   Type = 5
	Blackhole   Type = 6
	Unreachable Type = 7
	Prohibit    Type = 8
	Throw       Type = 9
	NAT         Type = 10
)

// Place is a device in another namespace than the one that tells of it.
type Place struct {
	Index Ifindex // its index there (IFLA_NEW_IFINDEX), 0 for no place
	// Netnsid is how the namespace that tells of it numbers the other one (IFLA_NEW_NETNSID, `ip netns list-id`).
	Netnsid int32
}

// fails reports whether a lookup that finds such a route ends with an error.
func (t Type) fails() bool { return t == Blackhole || t == Unreachable || t == Prohibit }

// Link is a network device. A Link is immutable once it was handed out.
type Link struct {
	Index     Ifindex
	Name      string
	Kind      string // IFLA_INFO_KIND, empty for physical devices
	SlaveKind string // IFLA_INFO_SLAVE_KIND
	Type      uint16 // ARPHRD_*
	MTU       int    // bytes
	MTU6      int    // IPv6's own MTU in bytes where it is smaller (conf/DEV/mtu, router advertisements), else 0
	Up        bool   // IFF_UP
	Running   bool   // IFF_LOWER_UP
	Master    Ifindex
	Parent    Ifindex // IFLA_LINK
	// ParentElsewhere says that Parent is an index of another namespace (IFLA_LINK_NETNSID).
	ParentElsewhere bool
	HardwareAddr    string // IFLA_ADDRESS, colon-separated
	PermAddr        string // IFLA_PERM_ADDRESS
	// IfID is an xfrm interface's if_id (IFLA_XFRM_IF_ID), 0 with External.
	IfID     uint32
	External bool    // an xfrm interface in collect_md mode
	VRFTable TableID // the table of a VRF device
	// Encap is how the device wraps what it sends, the zero value where it doesn't.
	Encap Encap
	// Backup says that the device is a bond's port by which the bond does not send now
	// (IFLA_BOND_SLAVE_STATE).
	Backup bool
}

// Encap is how a tunnel device wraps what it sends: the flow of the outer packets as the kernel
// looks up its route and its policy (ip_tunnel_xmit, ip6_tnl_xmit, udp_tunnel_dst_lookup). It is
// comparable, and the zero value means that the device wraps nothing or that nothing is known.
type Encap struct {
	// Family is that of the outer packets, 0 where they can be of both (VXLAN and Geneve with External).
	Family Family
	// Proto is the protocol of the outer lookup: 4 (IPv4 in IP), 41 (IPv6 in IP), 47 (GRE), 17 (VXLAN,
	// Geneve, L2TP over UDP), 115 (L2TP over IP). With FOU and GUE it stays 4, 41 or 47, without
	// ports, although UDP leaves (KERNEL.md 45). 0 says that it differs by packet (4 and 41 of an
	// ip6tnl in any mode), or that the inner packet's policy counts (vti).
	Proto uint8
	// Local and Remote are invalid where any address can be: a wildcard tunnel, or External.
	Local, Remote netip.Addr
	// Sport and Dport are the outer UDP ports, the zero value where they differ by packet.
	Sport, Dport PortRange
	// Key is the GRE key (or a vti's okey, which is the mark of its policy lookup).
	Key    uint32
	HasKey bool
	// Mark is what the outer lookups have as their mark. With AnyMark it is that of each packet.
	Mark    uint32
	AnyMark bool
	// Link is the device that the outer packets are bound to, 0 for none.
	Link Ifindex
	// LinkElsewhere says that the outer packets leave in another namespace (IFLA_LINK_NETNSID).
	LinkElsewhere bool
	// Others says that the device also sends to other addresses than Remote (VXLAN's forwarding
	// entries). Only a Watcher knows.
	Others bool
	// Header is how many bytes the tunnel adds to an inner packet, the outer IP header included,
	// the inner Ethernet header too where there is one.
	Header int
	// External says that each packet brings its own outer addresses (collect_md).
	External bool
}

// MTUFor is the device's MTU for packets of a family, in bytes: IPv6 can have a smaller one of
// its own.
func (l *Link) MTUFor(f Family) int {
	if f == IPv6 && l.MTU6 != 0 {
		return min(l.MTU, l.MTU6)
	}
	return l.MTU
}

// Tunnel reports whether the device is one that encapsulates. A nil Link is none.
func (l *Link) Tunnel() bool {
	if l == nil {
		return false
	}
	switch l.Kind {
	case "xfrm", "vti", "vti6", "gre", "gretap", "ip6gre", "ip6gretap", "erspan", "ip6erspan", "ipip", "sit", "ip6tnl",
		"vxlan", "geneve", "bareudp", "gtp", "wireguard":
		return true
	}
	return false
}

// Neighbours reports whether next hops on the device have link-layer addresses that must be
// resolved: on all but tunnels that carry IP itself. A nil Link is taken for one that has.
func (l *Link) Neighbours() bool { return !l.Tunnel() || l.Type == arphrdEther }

const arphrdEther = 1 // ARPHRD_ETHER, linux/if_arp.h

// Addr is an address of a device.
type Addr struct {
	Ifindex Ifindex
	Prefix  netip.Prefix // the address itself with its prefix length, not masked
}

// PortRange is a range of ports, both ends included; the zero value matches all.
type PortRange struct{ Lo, Hi uint16 }

// Any reports whether the range matches all ports.
func (p PortRange) Any() bool { return p == PortRange{} }

// Rule actions (FR_ACT_*, linux/fib_rules.h).
const (
	RuleToTable     uint8 = 1
	RuleGoto        uint8 = 2
	RuleNop         uint8 = 3
	RuleBlackhole   uint8 = 6
	RuleUnreachable uint8 = 7
	RuleProhibit    uint8 = 8
)

// Rule is a FIB rule. Src and Dst are invalid prefixes where the rule has none. A Rule is
// immutable once it was handed out. Rules are comparable with ==.
type Rule struct {
	Family   Family
	Priority uint32
	Action   uint8
	Table    TableID
	Src, Dst netip.Prefix
	Mark     uint32
	Mask     uint32
	IPProto  uint8
	Sport    PortRange
	Dport    PortRange
	Iif, Oif string
	TOS      uint8
	DSCP     uint8 // value+1 of FRA_DSCP, 0 for none
	// UID is the range of FRA_UID_RANGE; HasUID tells whether there is one.
	UIDLo, UIDHi uint32
	HasUID       bool
	Invert       bool // FIB_RULE_INVERT
	L3mdev       bool
	TunID        uint64
	Goto         uint32
	// SuppressPrefixLen is FRA_SUPPRESS_PREFIXLEN, -1 for none.
	SuppressPrefixLen int32
	// SuppressIfgroup is FRA_SUPPRESS_IFGROUP, -1 for none.
	SuppressIfgroup int32
	Protocol        Protocol
	// Unknown says that the rule has an attribute that this version does not know, so that
	// which packets it matches can't be said.
	Unknown bool
}

// Nexthop is one way out of a route. Gateway is invalid for a directly connected one; its
// family can differ from the route's (RTA_VIA).
type Nexthop struct {
	Oif     Ifindex
	Gateway netip.Addr
	Weight  uint8 // RTNH hops, 0 means 1
	Flags   uint8 // RTNH_F_*
	Encap   bool  // has a lightweight tunnel (RTA_ENCAP)
	// IfID is the if_id of a lightweight tunnel of type xfrm (`encap xfrm if_id N`), 0 for others.
	IfID uint32
}

// Nexthop flags that the kernel sets by itself (linux/rtnetlink.h).
const (
	NexthopDead     uint8 = 1
	NexthopOnlink   uint8 = 4
	NexthopOffload  uint8 = 8
	NexthopLinkdown uint8 = 16
	NexthopTrap     uint8 = 64
)

// NexthopObject is a nexthop object or group (RTM_NEWNEXTHOP).
type NexthopObject struct {
	ID        uint32
	Family    Family
	Protocol  Protocol
	Oif       Ifindex
	Gateway   netip.Addr
	Flags     uint32
	Blackhole bool
	FDB       bool
	Encap     bool
	Group     []GroupMember
	// Resilient says that the group keeps flows by a table of buckets (NEXTHOP_GRP_TYPE_RES).
	Resilient bool
}

// GroupMember is one member of a nexthop group; Weight is one less than what `ip` shows.
type GroupMember struct {
	ID     uint32
	Weight uint16
}

// Metrics are the route metrics that the agent looks at (RTA_METRICS). All others are kept as
// they came, in the Body's raw attributes.
type Metrics struct {
	MTU    uint32 // RTAX_MTU in bytes, 0 for none
	AdvMSS uint32 // RTAX_ADVMSS in bytes, 0 for none
	Lock   uint32 // RTAX_LOCK, a bit for each locked metric
}

// MTULocked reports whether the MTU metric is locked.
func (m Metrics) MTULocked() bool { return m.Lock&(1<<rtaxMTU) != 0 }

// RTAX_* numbers (linux/rtnetlink.h).
const (
	rtaxLock   = 1
	rtaxMTU    = 2
	rtaxAdvMSS = 8
)

// Body is all of a route but its destination. Routes that differ in nothing else share one
// Body, so a full table costs a prefix and a pointer a route. A Body is immutable.
type Body struct {
	Family   Family
	Table    TableID
	TOS      uint8
	Type     Type
	Protocol Protocol
	Scope    uint8
	Flags    uint32       // RTM_F_*, without the ones that the kernel sets by itself
	Src      netip.Prefix // IPv6 source-specific routes; invalid for none
	Priority uint32       // RTA_PRIORITY, the metric of `ip route`
	PrefSrc  netip.Addr
	// Nexthops are the ways out, also those of a nexthop object (the kernel sends both).
	Nexthops []Nexthop
	// NHID is the nexthop object, 0 for none.
	NHID    uint32
	Metrics Metrics
	// Expires says that the route has a lifetime (router advertisements, `expires`).
	Expires bool
	// Raw holds the rtmsg header with a zero destination length and all attributes as they
	// came, but RTA_DST and RTA_CACHEINFO. It is what a write starts from.
	Raw string

	paths *Paths
}

// Route is a destination with its Body.
type Route struct {
	Dst  netip.Prefix
	Body *Body
}

// Key identifies a route for the kernel: a replace hits the first route with this key.
type Key struct {
	Family   Family
	Table    TableID
	Dst      netip.Prefix
	Src      netip.Prefix
	TOS      uint8
	Priority uint32
}

// Key returns the key of the route.
func (r Route) Key() Key {
	return Key{Family: r.Body.Family, Table: r.Body.Table, Dst: r.Dst, Src: r.Body.Src, TOS: r.Body.TOS, Priority: r.Body.Priority}
}

func (k Key) String() string {
	s := k.Dst.String()
	if k.Src.IsValid() {
		s += " from " + k.Src.String()
	}
	if k.TOS != 0 {
		s += fmt.Sprintf(" tos %#x", k.TOS)
	}
	if k.Table != TableMain {
		s += fmt.Sprintf(" table %d", k.Table)
	}
	if k.Priority != 0 {
		s += fmt.Sprintf(" metric %d", k.Priority)
	}
	return s
}

// Origin says who caused a notification: the netlink port and sequence number of the request,
// 0 for the kernel itself. Our own writes are recognised by it.
type Origin struct{ Port, Seq uint32 }

// Scope says what a resync covers.
type Scope struct {
	// RoutesOnly limits the dump to routes; otherwise links, addresses, rules, nexthop objects
	// and routes are dumped.
	RoutesOnly bool
	Family     Family  // 0 for both
	Oif        Ifindex // 0 for all; else only routes with a nexthop on this device
}

// Event is what the kernel told or what a dump found. The items of a dump stand between
// ResyncBegin and ResyncEnd; within the scope, an item that does not appear there is gone.
type Event interface{ routeEvent() }

type (
	// Lost says that events were lost: what is known is stale until the next full ResyncEnd.
	Lost struct{ Err error }
	// ResyncBegin opens a dump of the scope.
	ResyncBegin struct{ Scope Scope }
	// ResyncEnd closes it.
	ResyncEnd struct{ Scope Scope }
	// LinkSet is a device that is new, changed or found by a dump.
	LinkSet struct {
		Link *Link
		// Features says that it was told because the device's features changed (IFLA_EVENT_FEATURES).
		Features bool
	}
	// LinkGone is a device that was deleted or left the namespace.
	LinkGone struct {
		Index Ifindex
		// Link is the device as it was then, nil if that is not known: where events were lost, another one can have been known by the index.
		Link *Link
		// To is where it was moved, the zero value if it was deleted or the kernel doesn't tell.
		To Place
	}
	// AddrSet is an address of a device.
	AddrSet struct{ Addr Addr }
	// AddrGone is an address that was removed.
	AddrGone struct{ Addr Addr }
	// RuleSet is a rule that was added or found by a dump.
	RuleSet struct{ Rule *Rule }
	// RuleGone is a rule that was removed.
	RuleGone struct{ Rule *Rule }
	// NexthopSet is a nexthop object.
	NexthopSet struct{ Nexthop *NexthopObject }
	// NexthopGone is a nexthop object that was removed.
	NexthopGone struct{ ID uint32 }
	// RouteSet is a route that was added, replaced, appended to or found by a dump. Replace
	// and Append are the flags of the message (NLM_F_REPLACE, NLM_F_APPEND).
	RouteSet struct {
		Route           Route
		Replace, Append bool
		Origin          Origin
	}
	// RoutesFound are routes that the first dump found: as a RouteSet of each, with Append. It comes alone.
	// Who has taken them gives them back (Done).
	RoutesFound struct{ Routes []Route }
	// Calm comes directly ahead of the end of a full dump during which no event came.
	Calm struct{}
	// RouteGone is a route that was removed.
	RouteGone struct {
		Route  Route
		Origin Origin
	}
)

func (Lost) routeEvent()        {}
func (ResyncBegin) routeEvent() {}
func (ResyncEnd) routeEvent()   {}
func (LinkSet) routeEvent()     {}
func (LinkGone) routeEvent()    {}
func (AddrSet) routeEvent()     {}
func (AddrGone) routeEvent()    {}
func (RuleSet) routeEvent()     {}
func (RuleGone) routeEvent()    {}
func (NexthopSet) routeEvent()  {}
func (NexthopGone) routeEvent() {}
func (RouteSet) routeEvent()    {}
func (Calm) routeEvent()        {}
func (RoutesFound) routeEvent() {}
func (RouteGone) routeEvent()   {}
