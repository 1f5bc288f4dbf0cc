package sockopt

import "net/netip"

// Conn is one TCP socket as the kernel itself has it (struct sock, include/net/sock.h). It is a comparable value and holds no
// secret.
type Conn struct {
	// Local and Remote are unmapped; Remote is the zero value for a listener.
	Local, Remote netip.AddrPort
	State         State
	UID           uint32
	Inode         uint64 // of the socket's file, 0 if it has none (TIME_WAIT, or orphaned)
	Cookie        uint64 // sk_cookie, 0 if nobody has asked for it yet
	Mark          uint32
	BoundDev      int32 // sk_bound_dev_if, 0 for none
	V6Only        bool  // takes no IPv4: IPV6_V6ONLY, or bound to an IPv6 address

	// MD5Keys and AOKeys count the keys that the socket itself holds (md5sig_info, ao_info).
	MD5Keys, AOKeys uint16

	// GSO is whether the socket builds super-packets now (sk_can_gso: sk_route_caps has the bits of sk_gso_type). It is false for
	// a socket that has no sk_gso_type, as it never connected, although sk_can_gso says yes to nothing.
	GSO bool
	// GSODisabled is sk_gso_disabled: set with a key, or inherited from a listener, and never cleared (KERNEL.md 7).
	GSODisabled bool
	GSOMaxSegs  uint16 // sk_gso_max_segs
	GSOMaxSize  uint32 // sk_gso_max_size, bytes of payload: the headers' share is taken off already
	MSS         uint32 // mss_cache, bytes

	// Route is the cached route (sk_dst_cache), the zero value if the socket has none.
	Route ConnRoute
}

// ConnRoute is what a socket's cached route says. It is the route of the last segment that was sent: one that has become invalid
// since stays until the next one is.
type ConnRoute struct {
	Dev        int32  // ifindex of dst->dev, 0 for no route
	TSO        bool   // dst->dev->features has the segmentation offload of the socket's sk_gso_type: IPv4's for IPv4-mapped ones
	GSOMaxSegs uint32 // dst->dev->gso_max_segs: with 1, super-packets are cut ahead of the device (gso_features_check)
	HeaderLen  uint16 // dst->header_len, bytes that IPsec adds; not 0 for an XFRM bundle
	XFRM       bool   // dst->xfrm is set: an SA applies
	Offload    bool   // ESP takes super-packets, which it cuts just before the device, or the device does (xfrm_dst_offload_ok)
	DeviceESP  bool   // the device does: the SA is bound to Dev, which cuts ESP (offload_handle, NETIF_F_GSO_ESP)
}

// State is a TCP state (include/net/tcp_states.h).
type State uint8

// The TCP states that are named somewhere.
const (
	Established State = 1
	TimeWait    State = 6
	Listen      State = 10
	NewSynRecv  State = 12 // TCP_NEW_SYN_RECV: a request that isn't a connection yet; ss and /proc/net/tcp say SYN-RECV
)

// Segmentation is where a socket's segments are cut.
type Segmentation string

// The places.
const (
	SegOffload  Segmentation = "offload"  // super-packets down to a device that cuts them
	SegSoftware Segmentation = "software" // super-packets, which the kernel cuts ahead of the device
	SegNone     Segmentation = "none"     // the socket itself sends single segments
	SegUnknown  Segmentation = "unknown"  // it has no route yet, or sends nothing (a listener, TIME_WAIT)
)

// gsoMaxSizeDefault is no more than what is left of GSO_LEGACY_MAX_SIZE, 65536 bytes, without MAX_TCP_HEADER, which depends on the
// kernel's configuration. Less says that somebody lowered gso_max_size. With an MSS as large as the loopback's the default has no room for
// two segments either, and nothing is lost by that.
const gsoMaxSizeDefault = 65536 - 512

// Segmentation is where the kernel cuts what the socket sends now.
func (c Conn) Segmentation() Segmentation {
	switch {
	case c.State == Listen, c.State == TimeWait, c.State == NewSynRecv:
		return SegUnknown
	case c.GSODisabled:
		return SegNone
	case c.Route.Dev == 0:
		return SegUnknown
	case !c.GSO, c.GSOMaxSegs == 1, c.GSOMaxSize < min(2*c.MSS, gsoMaxSizeDefault):
		return SegNone
	case !c.Route.TSO, c.Route.GSOMaxSegs == 1, c.Route.XFRM && !c.Route.DeviceESP:
		return SegSoftware
	}
	return SegOffload
}
