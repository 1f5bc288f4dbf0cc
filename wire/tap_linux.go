package wire

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// snaplen is how much of a packet is kept, in bytes: Ethernet with two tags, or the outer headers that some
	// tunnels count as the link's, IPv6 with some extension headers, TCP with all its options.
	snaplen = 256
	// blockSize is that of a block of a ring, in bytes. A block is handed over when it is full, or retire after its
	// first packet.
	blockSize = 128 << 10
	retire    = 20 * time.Millisecond
	// memory is what the rings of all taps may take together, in bytes, and fewest how many blocks a ring has at
	// least.
	memory = 16 << 20
	fewest = 4
	// niceness is that of the thread that reads: those who send go first.
	niceness = 10
)

// MostTaps is how many taps fit into the memory that there is for their rings.
const MostTaps = memory / (fewest * blockSize)

// Stats counts what a tap did not see.
type Stats struct {
	// Dropped are the packets that found the ring full.
	Dropped uint64
	// Untold are super-packets of a kind that the kernel has no words for: not TCP, and not UDP on 6.2 and later.
	Untold uint64
	// Down says that the device went down, or away, while it was looked at.
	Down bool
}

// Tap sees what leaves by one device. It is not safe for concurrent use.
type Tap struct {
	fd    int
	ring  []byte
	next  int // the block that is handed over next
	stats Stats
}

// Open opens a tap on a device of the calling thread's network namespace, where it stays. It is one of of taps,
// which share the memory that there is. The error is os.ErrPermission without CAP_NET_RAW there.
func Open(ifindex, of int) (_ *Tap, err error) {
	// Protocol 0 until the socket is bound: else it would receive from all devices in between.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("wire: packet socket: %w", err)
	}
	t := &Tap{fd: fd}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	blocks := max(memory/blockSize/max(of, 1), fewest)
	const frame = 2048 // of no meaning in this version, but it has to divide the block
	ring := unix.TpacketReq3{
		Block_size: blockSize, Block_nr: uint32(blocks), Frame_size: frame, Frame_nr: uint32(blocks * blockSize / frame),
		Retire_blk_tov: uint32(retire / time.Millisecond),
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		// What was received is not ours to count, and is not copied.
		{"filter", func() error { return attach(fd, outgoing) }},
		{"PACKET_VERSION", func() error { return unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V3) }},
		{"PACKET_VNET_HDR", func() error { return unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1) }}, // ahead of the ring
		{"PACKET_RX_RING", func() error { return unix.SetsockoptTpacketReq3(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &ring) }},
		{"mmap", func() (err error) {
			t.ring, err = unix.Mmap(fd, 0, blocks*blockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			return err
		}},
		{"bind", func() error {
			return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ALL), Ifindex: ifindex})
		}},
	} {
		if err := step.do(); err != nil {
			return nil, fmt.Errorf("wire: packet socket: %s: %w", step.what, err)
		}
	}
	return t, nil
}

// Close lets go of the socket and its ring.
func (t *Tap) Close() error {
	var err error
	if t.ring != nil {
		err = unix.Munmap(t.ring)
		t.ring = nil
	}
	return errors.Join(err, unix.Close(t.fd))
}

// outgoing is a filter that keeps the front of what leaves, and nothing of the rest; nothing is one that keeps
// nothing.
var (
	outgoing = []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 0xfffff000 + 4}, // SKF_AD_OFF + SKF_AD_PKTTYPE
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.PACKET_OUTGOING},
		{Code: unix.BPF_RET | unix.BPF_K, K: snaplen},
		{Code: unix.BPF_RET | unix.BPF_K},
	}
	nothing = []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
)

func attach(fd int, filter []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}

// drain calls fn for each packet of the blocks that were handed over, and gives them back. No more of them are looked
// at than the ring has: whoever sends faster than that waits for the next turn.
func (t *Tap) drain(fn func(*Frame)) {
	for range len(t.ring) / blockSize {
		block := t.ring[t.next*blockSize : (t.next+1)*blockSize]
		status := (*uint32)(unsafe.Pointer(&block[blockStatus]))
		if atomic.LoadUint32(status)&statusUser == 0 {
			return
		}
		t.stats.Untold += uint64(eachFrame(block, fn))
		atomic.StoreUint32(status, 0) // TP_STATUS_KERNEL
		t.next = (t.next + 1) % (len(t.ring) / blockSize)
	}
}

// Stats are what the tap did not see so far. They are complete when Look has ended.
func (t *Tap) Stats() Stats { return t.stats }

// count reads the kernel's statistics, which reading sets back.
func (t *Tap) count() error {
	s, err := unix.GetsockoptTpacketStatsV3(t.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return fmt.Errorf("wire: PACKET_STATISTICS: %w", err)
	}
	// Those that it had no words for are among its drops.
	t.stats.Dropped += uint64(s.Drops)
	return nil
}

// Look calls fn for each packet that leaves by the devices of the taps, with the tap's place, for as long as it is told
// to, or until the context ends; and tick now and then, if it is not nil. The taps see nothing any more then.
func Look(ctx context.Context, taps []*Tap, d time.Duration, fn func(i int, f *Frame), tick func()) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and its niceness with it
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, niceness)
		done <- look(ctx, taps, d, fn, tick)
	}()
	return <-done
}

func look(ctx context.Context, taps []*Tap, d time.Duration, fn func(i int, f *Frame), tick func()) error {
	const turn = 50 * time.Millisecond // so long a context that has ended is not seen
	end := time.Now().Add(d)
	for ctx.Err() == nil {
		left := time.Until(end)
		if left <= 0 {
			break
		}
		if _, err := turnOf(taps, min(left, turn), fn); err != nil {
			return err
		}
		if tick != nil {
			tick()
		}
	}
	// From now on nothing is added, and what is there comes within the time in which a block is handed over.
	for _, t := range taps {
		if err := attach(t.fd, nothing); err != nil {
			return fmt.Errorf("wire: filter: %w", err)
		}
	}
	for range 4 * MostTaps { // as a rule one or two turns: each hands over all that there is
		some, err := turnOf(taps, 3*retire, fn)
		if err != nil {
			return err
		}
		if !some {
			break
		}
	}
	for _, t := range taps {
		if err := t.count(); err != nil {
			return err
		}
		t.stats.Dropped -= min(t.stats.Untold, t.stats.Dropped)
	}
	return nil
}

// turnOf waits for packets, and takes those that are there. It is false if there were none in time.
func turnOf(taps []*Tap, d time.Duration, fn func(i int, f *Frame)) (bool, error) {
	fds := make([]unix.PollFd, len(taps))
	for i, t := range taps {
		fds[i] = unix.PollFd{Fd: int32(t.fd), Events: unix.POLLIN}
	}
	timeout := unix.NsecToTimespec(int64(d))
	n, err := unix.Ppoll(fds, &timeout, nil)
	if errors.Is(err, unix.EINTR) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("wire: poll: %w", err)
	}
	for i, t := range taps {
		if fds[i].Revents&unix.POLLERR != 0 {
			// Reading the error takes it away: a device that comes up again is seen again.
			if no, err := unix.GetsockoptInt(t.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && no != 0 {
				t.stats.Down = true
			}
		}
		t.drain(func(f *Frame) { fn(i, f) })
	}
	return n > 0, nil
}

// bigEndian is a 16-bit number in network byte order.
func bigEndian(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}
