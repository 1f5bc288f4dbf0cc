package bench

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The straight line is the floor of a policy event: what the agent has to ask of the kernel for one added policy, and nothing else, as
// `strace -f` shows it in a namespace with nothing in the tables:
//
//	recvfrom  XFRM_MSG_NEWPOLICY         the event, and that there is no other
//	pread64   twice                      whether the host forwards
//	sendto    RTM_GETROUTE  recvfrom     the path to the tunnel's other end
//	sendto    RTM_NEWROUTE  recvfrom     the clone with the locked MTU, acknowledged
//	sendto    RTM_GETROUTE  recvfrom     where the covered flows go now
//	write                                the line of the log, when all is done: neither has it in its time

// straightTable is a table that no rule leads to, nor to the 99 behind it, straightProto the protocol of routes there.
const (
	straightTable = 9900
	straightProto = 85
)

// Straight answers policy events in a straight line until the input ends, with a line for each: how many nanoseconds it took.
func Straight(in io.Reader, out io.Writer) error {
	events, err := dial(unix.NETLINK_XFRM, xfrmPolicyGroup)
	if err != nil {
		return err
	}
	routes, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	go func() { // whoever started this one ends it
		_, _ = io.Copy(io.Discard, in)
		unix.Exit(0)
	}()
	line := &straight{sock: routes, msg: make([]byte, 0, 4096)}
	for _, file := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} { // open until the process ends
		f, err := os.Open("/proc/sys/net/" + file)
		if err != nil {
			return err
		}
		line.forwarding = append(line.forwarding, f)
	}
	for {
		var p Policy
		added := false
		err := events.receive(func(h header, b []byte) bool {
			if added = h.typ == xfrmNewPolicy; added {
				p = policyOf(b)
			}
			return true
		})
		if err != nil {
			return err
		}
		if !added {
			continue
		}
		began := time.Now()
		if _, _, err := unix.Recvfrom(events.fd, events.buf, unix.MSG_DONTWAIT); !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("another event, or %w", err)
		}
		if err := line.answer(p); err != nil {
			return err
		}
		took := time.Since(began)
		fmt.Fprintf(os.Stderr, "level=INFO msg=\"route cloned with a locked mtu\" route=%s table=%d mtu=1400 because=\"a policy\"\n", p.Dst, straightTable)
		if _, err := fmt.Fprintln(out, took.Nanoseconds()); err != nil {
			return err
		}
	}
}

// policyOf reads what the straight line needs of an IPv4 policy: its selector, and where its template leads.
func policyOf(b []byte) Policy {
	const selector, info, header = 56, 168, unix.SizeofNlAttr
	p := Policy{
		Dst: netip.PrefixFrom(netip.AddrFrom4([4]byte(b[0:4])), int(b[42])),
		Src: netip.PrefixFrom(netip.AddrFrom4([4]byte(b[16:20])), int(b[43])),
	}
	if at := info + header; len(b) >= at+selector {
		p.Peer = netip.AddrFrom4([4]byte(b[at : at+4]))
	}
	return p
}

type straight struct {
	*sock
	msg        []byte
	forwarding []*os.File
}

func (s *straight) answer(p Policy) error {
	var bit [1]byte
	for _, f := range s.forwarding {
		if _, err := f.ReadAt(bit[:], 0); err != nil {
			return err
		}
	}
	if err := s.lookup(p.Peer, localEnd); err != nil {
		return err
	}
	err := s.ask(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, func(b []byte) []byte {
		b = append(b, unix.AF_INET, byte(p.Dst.Bits()), 0, 0, unix.RT_TABLE_COMPAT, straightProto, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0)
		b = attr32(b, unix.RTA_TABLE, straightTable)
		b = attr(b, unix.RTA_DST, p.Dst.Addr().AsSlice())
		gw, _ := gateway(0, false)
		b = attr(b, unix.RTA_GATEWAY, gw.AsSlice())
		return attr(b, unix.RTA_METRICS, attr32(attr32(nil, unix.RTAX_LOCK, 1<<unix.RTAX_MTU), unix.RTAX_MTU, 1400))
	})
	if err != nil {
		return fmt.Errorf("clone %s: %w", p.Dst, err)
	}
	return s.lookup(p.Dst.Addr(), netip.Addr{})
}

// lookup asks for the route to an address.
func (s *straight) lookup(dst, src netip.Addr) error {
	err := s.ask(unix.RTM_GETROUTE, 0, func(b []byte) []byte {
		bits := byte(0)
		if src.IsValid() {
			bits = 32
		}
		b = append(b, unix.AF_INET, 32, bits, 0, 0, 0, 0, 0, 0, 0x10, 0, 0) // RTM_F_LOOKUP_TABLE
		b = attr(b, unix.RTA_DST, dst.AsSlice())
		if src.IsValid() {
			b = attr(b, unix.RTA_SRC, src.AsSlice())
		}
		return b
	})
	if err != nil {
		return fmt.Errorf("lookup %s: %w", dst, err)
	}
	return nil
}

// ask makes one request and reads its one answer: an acknowledgement, where it asks for one, or a route.
func (s *straight) ask(typ, flags uint16, fill func([]byte) []byte) error {
	s.seq++
	s.msg = message(s.msg[:0], typ, flags, s.seq, fill)
	if err := unix.Sendto(s.fd, s.msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	var failed error
	err := s.receive(func(h header, b []byte) bool {
		if h.seq != s.seq {
			failed = fmt.Errorf("an answer to %d, not to %d", h.seq, s.seq)
		}
		if h.typ == unix.NLMSG_ERROR && len(b) >= 4 {
			if errno := int32(ne.Uint32(b)); errno != 0 {
				failed = unix.Errno(-errno)
			}
		}
		return true
	})
	return errors.Join(failed, err)
}
