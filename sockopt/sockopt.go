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
	// Owner is whose socket it is; of several that hold the same key, the most trusted (Options.Trust).
	Owner Owner
}

// Owner is the user of a socket: the one who made it, or accepted it (sk_uid, include/net/sock.h). It doesn't follow a socket that is handed
// to somebody else, as systemd does with those that it listens on for a service. The zero value is an owner who isn't known.
type Owner struct {
	// UID is the user in the user namespace of whoever reads it: the root of another one is the user that it is here. A user that is nobody
	// here shows as OverflowUID.
	UID   uint32
	Known bool
}

// OwnerOf is the owner of a socket with the uid that the kernel says, and with a file or without. Before Linux 6.17 one without, as it is closed
// already or not accepted yet, is said to be root's, whosever it is (sock_i_uid, net/core/sock.c): of root's the file has to be there.
func OwnerOf(uid uint32, file bool) Owner {
	if uid == 0 && !file {
		return Owner{}
	}
	return Owner{UID: uid, Known: true}
}

// OverflowUID stands for all users of other user namespaces that have no number in ours (from_kuid_munged, kernel/user_namespace.c;
// /proc/sys/kernel/overflowuid).
const OverflowUID = 65534

// Root is the owner that is always trusted.
var Root = Owner{Known: true}

// Compare orders keys, for stable reports: those that differ in their owner alone stand side by side.
func (k Key) Compare(o Key) int {
	return cmp.Or(
		k.compareFlows(o),
		-boolCompare(k.Owner.Known, o.Owner.Known),
		cmp.Compare(k.Owner.UID, o.Owner.UID),
	)
}

// compareFlows is Compare without the owner.
func (k Key) compareFlows(o Key) int {
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
		// Cut is the same for the keys of other kinds (Options.More): of these sockets not all are told.
		Cut int
		// Over says that there are more keys of trusted owners than MaxTrusted, OverOthers that there are more of
		// others than MaxOthers: those over that are left out. What was known goes ahead of what is new.
		Over, OverOthers bool
	}
)

// MaxTrusted and MaxOthers are how many keys a KeysSet has, of trusted owners and of others: anybody can set keys, and they must neither
// take memory without end nor the place of those that count.
const (
	MaxTrusted = 1 << 16
	MaxOthers  = 1 << 13
)

func (Lost) sockoptEvent()    {}
func (KeysSet) sockoptEvent() {}
