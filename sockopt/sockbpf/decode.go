package sockbpf

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"tsoagent/sockopt"
)

// The records of bpf/conns.c and bpf/keys.c: as there.
const (
	connSize = 120
	keySize  = 40

	afInet  = 2  // AF_INET
	afInet6 = 10 // AF_INET6
)

// The bits of struct conn's flags.
const (
	connGSODisabled = 1 << iota
	connRoute
	connXFRM
	connXFRMOffloadOK
	connXFRMDevice
	connV6Only
	connKnown = 1<<iota - 1
)

// Numbers of include/linux/netdev_features.h. TestFeatureBits compares them with the running kernel's.
const (
	gsoShift  = 16      // NETIF_F_GSO_SHIFT: a bit of SKB_GSO_* is a feature's, moved by it
	gsoESPBit = 31      // NETIF_F_GSO_ESP_BIT: tx-esp-segmentation
	maxState  = 13      // TCP_BOUND_INACTIVE, the last one (include/net/tcp_states.h)
	maxGSO    = 1 << 20 // no kernel has that many kinds of segmentation
)

// hostOrder is the order of the programs' numbers.
var hostOrder = binary.NativeEndian

// decodeConns calls fn with the socket of each record at the start of b, until there is no whole record or fn returns false. It
// returns what is left of b, and whether fn wants more. A record that isn't one of ours is an error, and none after it is looked at.
func decodeConns(b []byte, fn func(sockopt.Conn) bool) (rest []byte, more bool, err error) {
	for len(b) >= connSize {
		c, err := decodeConn(b[:connSize])
		if err != nil {
			return b, false, err
		}
		b = b[connSize:]
		if !fn(c) {
			return b, false, nil
		}
	}
	return b, true, nil
}

func decodeConn(b []byte) (sockopt.Conn, error) {
	family, state, flags := b[66], b[67], hostOrder.Uint32(b[68:])
	gsoType := hostOrder.Uint32(b[84:])
	switch size := hostOrder.Uint16(b[64:]); {
	case size != connSize:
		return sockopt.Conn{}, fmt.Errorf("sockbpf: a socket's record says that it has %d bytes, not %d", size, connSize)
	case family != afInet && family != afInet6:
		return sockopt.Conn{}, fmt.Errorf("sockbpf: a socket of family %d", family)
	case state == 0 || state > maxState:
		return sockopt.Conn{}, fmt.Errorf("sockbpf: a TCP socket in state %d", state)
	case flags&^connKnown != 0:
		return sockopt.Conn{}, fmt.Errorf("sockbpf: a socket with the flags %#x", flags)
	case gsoType >= maxGSO:
		return sockopt.Conn{}, fmt.Errorf("sockbpf: a socket with sk_gso_type %#x", gsoType)
	}
	c := sockopt.Conn{
		Inode: hostOrder.Uint64(b[0:]), Cookie: hostOrder.Uint64(b[8:]),
		Local:       netip.AddrPortFrom(address(b[32:48], family), hostOrder.Uint16(b[104:])),
		State:       sockopt.State(state),
		UID:         hostOrder.Uint32(b[72:]),
		Mark:        hostOrder.Uint32(b[76:]),
		BoundDev:    int32(hostOrder.Uint32(b[80:])),
		V6Only:      flags&connV6Only != 0,
		MD5Keys:     hostOrder.Uint16(b[108:]),
		AOKeys:      hostOrder.Uint16(b[110:]),
		GSO:         gsoType != 0 && features(hostOrder.Uint64(b[16:])).canGSO(gsoType),
		GSODisabled: flags&connGSODisabled != 0,
		GSOMaxSegs:  hostOrder.Uint16(b[112:]),
		GSOMaxSize:  hostOrder.Uint32(b[88:]),
		MSS:         hostOrder.Uint32(b[100:]),
	}
	if c.State != sockopt.Listen {
		c.Remote = netip.AddrPortFrom(address(b[48:64], family), hostOrder.Uint16(b[106:]))
	}
	if flags&connRoute != 0 {
		dev := features(hostOrder.Uint64(b[24:]))
		c.Route = sockopt.ConnRoute{
			Dev:        int32(hostOrder.Uint32(b[96:])),
			TSO:        gsoType != 0 && dev.canGSO(gsoType),
			GSOMaxSegs: hostOrder.Uint32(b[92:]),
			HeaderLen:  hostOrder.Uint16(b[114:]),
			XFRM:       flags&connXFRM != 0,
			Offload:    flags&connXFRMOffloadOK != 0,
			DeviceESP:  flags&connXFRMDevice != 0 && dev&(1<<gsoESPBit) != 0,
		}
	}
	return c, nil
}

// features are a netdev_features_t.
type features uint64

// canGSO is net_gso_ok (include/linux/netdevice.h).
func (f features) canGSO(gsoType uint32) bool {
	want := features(gsoType) << gsoShift
	return f&want == want
}

// address takes 16 bytes, of which the first four count with IPv4.
func address(b []byte, family uint8) netip.Addr {
	if family == afInet {
		return netip.AddrFrom4([4]byte(b))
	}
	return netip.AddrFrom16([16]byte(b)).Unmap()
}

// decodeKey takes a record of the ring. A record that isn't one of ours is an error.
func decodeKey(b []byte) (KeyEvent, error) {
	// The ring rounds up to eight bytes, which the record has.
	if len(b) != keySize {
		return KeyEvent{}, fmt.Errorf("sockbpf: a key's record has %d bytes, not %d", len(b), keySize)
	}
	e := KeyEvent{
		Op: Op(b[34]), Kind: sockopt.Kind(b[35]),
		Cookie:  hostOrder.Uint64(b[16:]),
		Netns:   hostOrder.Uint32(b[24:]),
		Ifindex: int32(hostOrder.Uint32(b[28:])),
		Port:    hostOrder.Uint16(b[32:]),
	}
	family, bits := b[36], int(b[37])
	switch {
	case e.Op < Added || e.Op > Connected || e.Op == Lost:
		return KeyEvent{}, fmt.Errorf("sockbpf: a key's record with the operation %d", e.Op)
	case e.Kind != sockopt.MD5 && e.Kind != sockopt.AO:
		return KeyEvent{}, fmt.Errorf("sockbpf: a key's record of the kind %d", e.Kind)
	case family == 0:
		return e, nil // the peer isn't known
	case family != afInet && family != afInet6:
		return KeyEvent{}, fmt.Errorf("sockbpf: a key's record of family %d", family)
	}
	addr := address(b[:16], family)
	// The prefix length of an IPv4-mapped peer is IPv4's (tcp_v6_parse_md5_keys).
	if bits > addr.BitLen() {
		return KeyEvent{}, fmt.Errorf("sockbpf: a key's record with the prefix %s/%d", addr, bits)
	}
	e.Peer = netip.PrefixFrom(addr, bits)
	return e, nil
}
