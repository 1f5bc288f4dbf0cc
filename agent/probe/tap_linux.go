package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// A tap sees what leaves by a device as its driver gets it: behind the segmentation that the
// kernel does for a device without the feature (validate_xmit_skb, net/core/dev.c).
type tap struct {
	fd   int
	vnet bool
	// nic says that the device is the one below ESP.
	nic bool
}

const (
	// dataSize is the length above which a packet is taken for one with data, in bytes: the
	// sender sends nothing else as large.
	dataSize = 600
	// mostSeen is how many packets are looked at. The tap costs throughput, so it is closed
	// before the measurement.
	mostSeen = 24
	// linkHeader is the most that a link layer adds to the device's MTU: Ethernet, or the outer
	// headers, which some tunnels count as theirs (header_ops of ip_gre.c).
	linkHeader = 100
	// headSize is how much of a packet is read: virtio_net_hdr, Ethernet, IPv6 with options.
	headSize = 160
	// vnetHeader is the size of struct virtio_net_hdr (linux/virtio_net.h).
	vnetHeader = 10
)

// openTap opens a tap on a device of the thread's namespace. With vnet, the kernel tells itself
// which packets are super-packets (PACKET_VNET_HDR); it can't for UDP before 6.2
// (virtio_net_hdr_from_skb), and drops those.
func openTap(ifindex int, vnet, nic bool) (_ *tap, err error) {
	// Protocol 0 until the socket is bound: else it would receive from all devices in between.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, missing(fmt.Errorf("packet socket: %w", err), "packet sockets (CONFIG_PACKET)")
	}
	header := 0
	if vnet {
		header = 1
	}
	for _, err := range []error{
		// Must precede the bind (af_packet.c).
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, header),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ALL), Ifindex: ifindex}),
	} {
		if err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("packet socket: %w", err)
		}
	}
	return &tap{fd, vnet, nic}, nil
}

func (t *tap) close() { unix.Close(t.fd) }

// watch counts packets with data until it has seen mostSeen of them. After d it is content with
// one super-packet, or with leastSeen without any: on a collapsed flow not many more come. It
// gives up after ten times d.
func (t *tap) watch(ctx context.Context, d time.Duration) (Wire, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*d)
	defer cancel()
	var seen Wire
	for start := time.Now(); seen.Packets < mostSeen; {
		more, err := t.next(&seen)
		if err != nil {
			return seen, err
		}
		if more {
			continue
		}
		enough := seen.Super > 0 || seen.Packets >= leastSeen
		if enough && time.Since(start) >= d || !pause(ctx, time.Millisecond) {
			break
		}
	}
	return seen, nil
}

// rest counts what was seen so far.
func (t *tap) rest() (seen Wire, err error) {
	for more := true; more && err == nil && seen.Packets < 64*mostSeen; {
		more, err = t.next(&seen)
	}
	return seen, err
}

// next counts the next packet, and returns false if there is none yet.
func (t *tap) next(seen *Wire) (bool, error) {
	var buf [headSize]byte
	// With MSG_TRUNC the kernel returns the length of the whole.
	n, from, err := unix.Recvfrom(t.fd, buf[:], unix.MSG_TRUNC)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false, nil
	case errors.Is(err, unix.EINTR):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("packet socket: %w", err)
	}
	if link, ok := from.(*unix.SockaddrLinklayer); ok && link.Pkttype == unix.PACKET_OUTGOING {
		seen.add(t.look(buf[:min(n, len(buf))], n))
	}
	return true, nil
}

// look takes a packet of length n apart, of which head was read.
func (t *tap) look(head []byte, n int) Wire {
	super := n > tunnelMTU+linkHeader
	if t.vnet && len(head) > vnetHeader {
		super = head[1]&^unix.VIRTIO_NET_HDR_GSO_ECN != unix.VIRTIO_NET_HDR_GSO_NONE
		head, n = head[vnetHeader:], n-vnetHeader
	}
	if n < dataSize {
		return Wire{}
	}
	w := Wire{Packets: 1, Largest: n}
	if super {
		w.Super = 1
	}
	if t.nic && !isESP(head) {
		w.Clear = 1
	}
	return w
}

// isESP says whether an Ethernet frame carries ESP.
func isESP(frame []byte) bool {
	const ethernet, ipv6 = 14, 40
	if len(frame) < ethernet+ipv6 {
		return false
	}
	if binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IP {
		return frame[ethernet+9] == unix.IPPROTO_ESP
	}
	next, at := frame[ethernet+6], ethernet+ipv6
	// ip6tnl and ip6gre say how deep tunnels may be nested in destination options (RFC 2473),
	// which ESP in transport mode leaves in front of it.
	for next == unix.IPPROTO_DSTOPTS && len(frame) > at+1 {
		next, at = frame[at], at+8*(int(frame[at+1])+1)
	}
	return next == unix.IPPROTO_ESP
}

// bigEndian returns a 16-bit number in network byte order.
func bigEndian(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}
