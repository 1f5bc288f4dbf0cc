// Package sockopt knows the TCP-MD5 and TCP-AO keys that sockets hold: for which peers, never
// the secret itself.
//
// The values and the decoding are pure. Kernel I/O lives in the _linux.go files.
package sockopt

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
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

// Key says which packets of this host are signed. It is a comparable value and holds no secret.
//
// A listener signs what it exchanges with its peers from its own port, on all connections that it
// accepts. A client signs what it sends to the peer's port; its own port is another one each time,
// and is left out. One of Port and PeerPort is 0.
type Key struct {
	Kind Kind
	// Peer is the peer's address, or a prefix of peers (TCP_MD5SIG_FLAG_PREFIX) of a listener. It is
	// masked, and IPv4-mapped addresses are unmapped. Of a connection it is always the other end.
	Peer netip.Prefix
	// Ifindex is the device that the socket is bound to (SO_BINDTODEVICE, or the VRF that a
	// connection was accepted in), 0 for none. The VRF that TCP_MD5SIG_FLAG_IFINDEX binds a key to
	// is not in what the kernel shows (struct tcp_diag_md5sig, net/ipv4/tcp_diag.c).
	Ifindex int32
	// Local is the address that the socket is bound to, the zero value for any.
	Local netip.Addr
	// Port is the socket's local port, 0 for a client's; Listener tells whether the socket listens
	// there.
	Port     uint16
	Listener bool
	// PeerPort is the peer's port where the socket is a client's, else 0.
	PeerPort uint16
}

// Compare orders keys, for stable reports.
func (k Key) Compare(o Key) int {
	return cmp.Or(
		k.Peer.Addr().Compare(o.Peer.Addr()),
		cmp.Compare(k.Peer.Bits(), o.Peer.Bits()),
		cmp.Compare(k.Kind, o.Kind),
		cmp.Compare(k.Port, o.Port),
		cmp.Compare(k.PeerPort, o.PeerPort),
		cmp.Compare(k.Ifindex, o.Ifindex),
		k.Local.Compare(o.Local),
		boolCompare(k.Listener, o.Listener),
	)
}

// String names a key in a line of text: "tcp-md5 key for 192.0.2.9 on port 179".
func (k Key) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s key for %s", k.Kind, peerText(k.Peer))
	if k.PeerPort != 0 {
		fmt.Fprintf(&b, " port %d", k.PeerPort)
	}
	if k.Port != 0 {
		fmt.Fprintf(&b, " on port %d", k.Port)
	}
	if k.Local.IsValid() {
		fmt.Fprintf(&b, " of %s", k.Local)
	}
	return b.String()
}

func peerText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// covers reports whether all that o says is signed is what k says is signed.
func (k Key) covers(o Key) bool {
	return k.Kind == o.Kind && k.Ifindex == o.Ifindex && k.Port == o.Port && k.PeerPort == o.PeerPort &&
		(!k.Local.IsValid() || k.Local == o.Local) &&
		k.Peer.Bits() <= o.Peer.Bits() && k.Peer.Contains(o.Peer.Addr())
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

// Event is what is known to have changed. The kernel does not tell of keys: a poll sends the whole
// set.
type Event interface{ sockoptEvent() }

type (
	// Lost says that the keys could not be read: what is known is stale until the next KeysSet.
	Lost struct{ Err error }
	// KeysSet replaces all known keys, in the order of Key.Compare.
	KeysSet struct {
		Keys []Key
		// Hidden counts the sockets whose keys the kernel can't show, because they are too many for
		// one attribute. While there is one, keys that were known stay.
		Hidden int
	}
)

func (Lost) sockoptEvent()    {}
func (KeysSet) sockoptEvent() {}
