// Package sockbpf reads the truth of TCP sockets from the kernel by BPF: an Iter lists what the kernel's own socket says of each
// connection, and a Hook tells when a TCP-MD5 or TCP-AO key is set or deleted, of which the kernel sends no event, and when a socket
// that holds one begins to listen or to connect. docs/bpf.md tells what is loaded and with which capabilities. No key is ever read.
//
// The files without _linux in their names are pure.
package sockbpf

import (
	"errors"
	"net/netip"

	"tsoagent/sockopt"
)

// ErrUnsupported says that the kernel lacks something that the programs need; the error that wraps it says what, in one line.
var ErrUnsupported = errors.New("not supported by this kernel")

// Op is what happened to a key.
type Op uint8

// The operations.
const (
	Added     Op = 1 // set, or set anew with another secret
	Deleted   Op = 2
	Inherited Op = 3 // a connection was accepted and has its listener's key (kernels before 6.2 call this Added)
	Cleared   Op = 4 // a socket that held keys is gone, or in no table any more, and all of its keys with it
	Lost      Op = 5 // events are missing: the keys are to be listed again
	Started   Op = 6 // a socket that holds keys begins to listen or to connect: its keys can be listed a moment later
	Connected Op = 7 // one that began to connect is established
)

// String is the operation in a word.
func (o Op) String() string {
	switch o {
	case Added:
		return "added"
	case Deleted:
		return "deleted"
	case Inherited:
		return "inherited"
	case Cleared:
		return "cleared"
	case Lost:
		return "lost"
	case Started:
		return "started"
	case Connected:
		return "connected"
	}
	return "unknown"
}

// KeyEvent is what the kernel did with a key: after it did it, and only if it succeeded. Or it is what a socket with keys does. It is a comparable value and holds no secret.
type KeyEvent struct {
	Op   Op
	Kind sockopt.Kind // not of Lost
	// Netns is the inode number of the socket's network namespace, as stat(2) has it of /proc/PID/ns/net.
	Netns uint32
	// Cookie is the socket's (sk_cookie), 0 if nobody has asked for it yet.
	Cookie uint64
	// Peer is the key's peer or prefix of peers, as in sockopt.Key. It is invalid if the kernel doesn't tell: when a socket's state changed,
	// or it is gone, and for TCP-AO keys that are deleted.
	Peer netip.Prefix
	// Ifindex is the VRF that the key is bound to, 0 for none (l3index).
	Ifindex int32
	// Port is the socket's local port, 0 if it isn't bound yet.
	Port uint16
	// Missing is the number of events that are missing, with Lost.
	Missing uint64
}
