package scenario

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// watch is a parsed `wire` line.
type watch struct {
	namespace, device string
	time              time.Duration
	packets           int // data packets to see
	super, single     bool
	filter            filter
}

const wireUsage = "wire namespace device [--for 2s] [--min-packets 20] [--super|--single] filter…"

// parseWatch parses the words behind `wire`. Flags may stand before or behind the filter.
func parseWatch(args []string) (*watch, error) {
	if len(args) < 2 {
		return nil, usage(wireUsage)
	}
	w := &watch{namespace: args[0], device: args[1], time: 2 * time.Second * patience(), packets: 20}
	var words []string
	for rest := args[2:]; len(rest) > 0; rest = rest[1:] {
		var err error
		switch rest[0] {
		case "--super":
			w.super = true
		case "--single":
			w.single = true
		case "--for", "--min-packets":
			if len(rest) < 2 {
				return nil, usage(wireUsage)
			}
			if rest[0] == "--for" {
				w.time, err = parsePatience(rest[1])
			} else {
				w.packets, err = strconv.Atoi(rest[1])
			}
			rest = rest[1:]
		default:
			words = append(words, rest[0])
		}
		if err != nil {
			return nil, usage(err.Error())
		}
	}
	if w.super && w.single {
		return nil, usage(wireUsage)
	}
	var err error
	w.filter, err = parseFilter(words)
	return w, err
}

// sighting counts what was seen of the packets that the filter matches.
type sighting struct {
	packets int // with data
	super   int // of these, those that the device is to cut
	largest int // length of the largest of them at the network layer
	gsoSize int // largest segment size that a super-packet asked for
}

func (s sighting) String() string {
	return fmt.Sprintf("packets=%d super=%d largest=%d gso_size=%d", s.packets, s.super, s.largest, s.gsoSize)
}

// add counts one packet.
func (s *sighting) add(h vnetHeader, length int) {
	s.packets++
	s.largest = max(s.largest, length)
	if h.gsoType != unix.VIRTIO_NET_HDR_GSO_NONE {
		s.super++
		s.gsoSize = max(s.gsoSize, h.gsoSize)
	}
}

// judge says whether the sighting is what was asked for, with the device's MTU in bytes.
func (w *watch) judge(s sighting, mtu int) error {
	switch {
	case s.packets < w.packets:
		return fmt.Errorf("only %d of %d data packets within %v: %s", s.packets, w.packets, w.time, s)
	case w.super && s.super == 0:
		return fmt.Errorf("no super-packet: %s", s)
	case w.single && s.super > 0:
		return fmt.Errorf("super-packets: %s", s)
	case w.single && s.largest > mtu:
		return fmt.Errorf("packets larger than the device's MTU of %d: %s", mtu, s)
	}
	return nil
}

// vnetHeader is the part of struct virtio_net_hdr (linux/virtio_net.h) that counts here.
type vnetHeader struct {
	gsoType byte
	gsoSize int
}

// vnetHeaderSize is the size of struct virtio_net_hdr.
const vnetHeaderSize = 10

// parseFrame takes a frame of a raw packet socket with PACKET_VNET_HDR apart: its header, and where in it the network layer begins.
func parseFrame(frame []byte, hatype uint16) (vnetHeader, int, error) {
	if len(frame) < vnetHeaderSize {
		return vnetHeader{}, 0, errShort
	}
	// ECN is a flag on top of the type.
	h := vnetHeader{
		gsoType: frame[1] &^ unix.VIRTIO_NET_HDR_GSO_ECN,
		gsoSize: int(binary.NativeEndian.Uint16(frame[4:])),
	}
	data := frame[vnetHeaderSize:]
	offset := 0
	switch hatype {
	case unix.ARPHRD_ETHER, unix.ARPHRD_LOOPBACK:
		offset = 14
		// A VLAN tag may stand in the frame, too.
		for len(data) >= offset && offset < 22 {
			kind := binary.BigEndian.Uint16(data[offset-2:])
			if kind != unix.ETH_P_8021Q && kind != unix.ETH_P_8021AD {
				break
			}
			offset += 4
		}
	case unix.ARPHRD_IPGRE, unix.ARPHRD_IP6GRE:
		// These devices count the outer header as theirs (header_ops).
		outer, err := parsePacket(data, len(data))
		if err == nil && outer.proto == unix.IPPROTO_GRE {
			offset = len(data) - outer.payload
			if len(data) < offset+4 {
				return h, 0, errShort
			}
			flags := data[offset]
			offset += 4
			for _, flag := range []byte{0x80, 0x20, 0x10} { // checksum, key, sequence
				if flags&flag != 0 {
					offset += 4
				}
			}
		}
	}
	if len(data) < offset {
		return h, 0, errShort
	}
	return h, vnetHeaderSize + offset, nil
}

// wire watches what leaves by a device. It sees packets as the driver gets them: behind the kernel's own segmentation, ahead of the
// device's.
func (s *session) wire(ctx context.Context, _ *testscript.TestScript, args []string) (string, error) {
	w, err := parseWatch(args)
	if err != nil {
		return "", err
	}
	var seen sighting
	var mtu int
	err = inNamespace(w.namespace, func() (err error) {
		seen, mtu, err = w.run(ctx)
		return err
	})
	if err != nil {
		return "", err
	}
	return seen.String() + "\n", w.judge(seen, mtu)
}

// run watches until enough was seen or the time is over.
func (w *watch) run(ctx context.Context) (sighting, int, error) {
	var seen sighting
	device, err := net.InterfaceByName(w.device)
	if err != nil {
		return seen, 0, fmt.Errorf("device %s: %w", w.device, err)
	}
	// Protocol 0 until the socket is bound: else it would receive from all devices in between.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return seen, 0, fmt.Errorf("packet socket: %w", err)
	}
	defer unix.Close(fd)
	poll := unix.NsecToTimeval(int64(pollInterval))
	for _, err := range []error{
		// Must precede the bind (af_packet.c).
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &poll),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ALL), Ifindex: device.Index}),
	} {
		if err != nil {
			return seen, 0, fmt.Errorf("packet socket on %s: %w", w.device, err)
		}
	}

	// Headers suffice: with MSG_TRUNC the kernel returns the length of the whole.
	buffer := make([]byte, 512)
	for deadline := time.Now().Add(w.time); seen.packets < w.packets && time.Now().Before(deadline) && ctx.Err() == nil; {
		n, from, err := unix.Recvfrom(fd, buffer, unix.MSG_TRUNC)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return seen, 0, fmt.Errorf("receive from %s: %w", w.device, err)
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if !ok || link.Pkttype != unix.PACKET_OUTGOING {
			continue
		}
		frame := buffer[:min(n, len(buffer))]
		header, offset, err := parseFrame(frame, link.Hatype)
		if err != nil {
			continue
		}
		p, err := parsePacket(frame[offset:], n-offset)
		if err != nil || !w.filter.matches(p) || !p.isData() {
			continue
		}
		seen.add(header, n-offset)
	}
	return seen, device.MTU, nil
}

// bigEndian returns a 16-bit number in network byte order.
func bigEndian(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}
