package sockbpf

import (
	"fmt"
	"net/netip"

	"tsoagent/sockopt"
)

// The record of bpf/held.c: as there.
const heldSize = 80

// decodeHeld calls fn with each record at the start of b, and whether its socket has more keys than are told. It returns what is left of b. A
// record that isn't one of ours is an error, and none after it is looked at.
func decodeHeld(b []byte, fn func(h sockopt.Held, more bool)) (rest []byte, err error) {
	for len(b) >= heldSize {
		h, more, err := decodeOneHeld(b[:heldSize])
		if err != nil {
			return b, err
		}
		b = b[heldSize:]
		fn(h, more)
	}
	return b, nil
}

func decodeOneHeld(b []byte) (h sockopt.Held, more bool, err error) {
	family, state, kind, peerFamily, bits := b[66], b[67], b[68], b[69], int(b[70])
	switch size := hostOrder.Uint16(b[60:]); {
	case size != heldSize:
		return h, false, fmt.Errorf("sockbpf: a held key's record says that it has %d bytes, not %d", size, heldSize)
	case family != afInet && family != afInet6:
		return h, false, fmt.Errorf("sockbpf: a socket of family %d", family)
	case state == 0 || state > maxState:
		return h, false, fmt.Errorf("sockbpf: a TCP socket in state %d", state)
	case kind > uint8(sockopt.AO):
		return h, false, fmt.Errorf("sockbpf: a held key of the kind %d", kind)
	case kind == 0 && (sockopt.State(state) != sockopt.Listen || peerFamily != 0):
		return h, false, fmt.Errorf("sockbpf: a socket in state %d without a key", state)
	case b[76] > 1 || b[77] != 0 || b[78] != 0 || b[79] != 0:
		return h, false, fmt.Errorf("sockbpf: a held key's record ends in %d", b[76:80])
	case b[71] > 1 || kind == 0 && b[71] != 0:
		return h, false, fmt.Errorf("sockbpf: a held key's record says that there is more by %d", b[71])
	}
	h = sockopt.Held{
		State:   sockopt.State(state),
		Local:   netip.AddrPortFrom(address(b[:16], family), hostOrder.Uint16(b[62:])),
		Ifindex: int32(hostOrder.Uint32(b[56:])),
		Kind:    sockopt.Kind(kind),
		Owner:   sockopt.OwnerOf(hostOrder.Uint32(b[72:]), b[76] == 1),
	}
	if h.State != sockopt.Listen {
		h.Remote = netip.AddrPortFrom(address(b[16:32], family), hostOrder.Uint16(b[64:]))
	}
	if kind == 0 {
		return h, false, nil
	}
	if peerFamily != afInet && peerFamily != afInet6 {
		return h, false, fmt.Errorf("sockbpf: a held key for family %d", peerFamily)
	}
	peer := address(b[32:48], peerFamily)
	if peerFamily == afInet6 && peer.Is4() { // its length counts the bits ahead of the IPv4 address
		bits -= 96
	}
	if h.Peer, err = peer.Prefix(bits); err != nil {
		return sockopt.Held{}, false, fmt.Errorf("sockbpf: a held key with the prefix %s/%d", peer, bits)
	}
	return h, b[71] == 1, nil
}
