// Package sockopt knows the TCP-MD5 and TCP-AO keys that sockets hold: for which peers, never
// the secret itself.
package sockopt

import (
	"cmp"
	"net/netip"
)

// Kind is the kind of a key.
type Kind uint8

// The kinds of TCP signatures that Linux knows.
const (
	MD5 Kind = 1 // RFC 2385
	AO  Kind = 2 // RFC 5925
)

// String returns "tcp-md5" or "tcp-ao".
func (k Kind) String() string {
	if k == AO {
		return "tcp-ao"
	}
	return "tcp-md5"
}

// Key says that the sockets on a local port sign what they exchange with a peer. It is a
// comparable value and holds no secret.
type Key struct {
	Kind Kind
	// Peer is the peer's address, or a prefix of peers (TCP_MD5SIG_FLAG_PREFIX). IPv4-mapped
	// addresses are unmapped.
	Peer netip.Prefix
	// Ifindex is the VRF that the key is bound to (TCP_MD5SIG_FLAG_IFINDEX), 0 for any.
	Ifindex int32
	// Port is the socket's local port; Listener tells whether the socket listens there.
	Port     uint16
	Listener bool
}

// Compare orders keys, for stable reports.
func (k Key) Compare(o Key) int {
	return cmp.Or(
		k.Peer.Addr().Compare(o.Peer.Addr()),
		cmp.Compare(k.Peer.Bits(), o.Peer.Bits()),
		cmp.Compare(k.Kind, o.Kind),
		cmp.Compare(k.Port, o.Port),
		cmp.Compare(k.Ifindex, o.Ifindex),
		boolCompare(k.Listener, o.Listener),
	)
}

func boolCompare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// Event is what is known to have changed. Where the kernel does not tell of keys, a poll sends
// the whole set.
type Event interface{ sockoptEvent() }

// KeysSet replaces all known keys, in the order of Key.Compare.
type KeysSet struct{ Keys []Key }

func (KeysSet) sockoptEvent() {}
