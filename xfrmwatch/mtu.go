package xfrmwatch

import (
	"errors"
	"fmt"
)

// ErrUnknownMTU is the reason why an SA has no inner MTU that this package can tell; the error
// that wraps it names the algorithm or the mode.
var ErrUnknownMTU = errors.New("xfrmwatch: inner mtu unknown")

// ErrLarval says that an SA has no algorithms yet, so it says nothing about the MTU.
var ErrLarval = errors.New("xfrmwatch: larval sa has no mtu")

// Encapsulation types (UDP_ENCAP_*, linux/udp.h; TCP_ENCAP_ESPINTCP).
const (
	encapESPInUDPNonIKE = 1
	encapESPInUDP       = 2
	encapESPInTCP       = 7
)

// Cost is one line of what an SA adds to a packet, in bytes.
type Cost struct {
	Name  string `json:"name"`
	Bytes int    `json:"bytes"`
}

// InnerMTU is what the SA leaves of an MTU below it, in bytes, by the kernel's own formula
// (xfrm_state_mtu, net/xfrm/xfrm_state.c): 1 where nothing is left. ok is false where the SA is
// larval or an algorithm or mode is not known; Costs says why.
func (s *SA) InnerMTU(mtu int) (inner int, ok bool) {
	o, err := s.overhead()
	if err != nil {
		return 0, false
	}
	return o.inner(mtu), true
}

// Costs itemises what the SA takes from an MTU. The sum of all costs and inner is mtu, if
// anything is left at all; the padding is that of the largest packet that fits. The error wraps
// ErrLarval or ErrUnknownMTU.
func (s *SA) Costs(mtu int) (costs []Cost, inner int, err error) {
	o, err := s.overhead()
	if err != nil {
		return nil, 0, err
	}
	inner = o.inner(mtu)
	sum := 0
	for _, c := range o.lines {
		if c.Bytes != 0 {
			costs = append(costs, c)
			sum += c.Bytes
		}
	}
	if o.block > 0 {
		costs = append(costs, Cost{"ESP trailer", 2})
		if pad := mtu - inner - sum - 2; pad > 0 && inner > 1 {
			costs = append(costs, Cost{"padding", pad})
		}
	}
	return costs, inner, nil
}

// overhead is what goes into the kernel's formula.
type overhead struct {
	lines  []Cost
	header int // props.header_len
	icv    int
	adj    int // the IP header that is not encrypted, in transport and BEET mode
	block  int // what ESP pads to, 0 for AH and IPComp
}

func (o overhead) inner(mtu int) int {
	if o.block == 0 {
		return max(mtu-o.header, 1)
	}
	fixed := o.header + o.icv + o.adj
	if mtu <= fixed {
		return 1
	}
	payload := (mtu - fixed) / o.block * o.block
	if payload <= 2 {
		return 1
	}
	return payload + o.adj - 2
}

func (s *SA) ipHeader() (bytes int, err error) {
	switch s.Family {
	case IPv4:
		return 20, nil
	case IPv6:
		return 40, nil
	}
	return 0, fmt.Errorf("%w: address family %d", ErrUnknownMTU, s.Family)
}

func (s *SA) overhead() (overhead, error) {
	var o overhead
	ip, err := s.ipHeader()
	if err != nil {
		return o, err
	}
	switch s.Mode {
	case Transport, Tunnel, BEET:
	case IPTFS:
		return o, fmt.Errorf("%w: mode iptfs", ErrUnknownMTU)
	default:
		return o, fmt.Errorf("%w: mode %d", ErrUnknownMTU, s.Mode)
	}
	if s.Larval {
		return o, ErrLarval
	}
	add := func(name string, bytes int) {
		o.lines = append(o.lines, Cost{name, bytes})
		o.header += bytes
	}
	if s.Mode == Tunnel {
		add("outer IP header", ip)
	}
	switch s.Proto {
	case ESP:
		return o, s.espOverhead(&o, ip, add)
	case AH:
		return o, s.ahOverhead(&o, add)
	case Comp:
		// IPComp counts its tunnel header only: header_len is 0 or the outer IP header, and
		// xfrm_state_mtu subtracts just that (ipcomp4_init_state, net/ipv4/ipcomp.c).
		return o, nil
	}
	return o, fmt.Errorf("%w: protocol %d", ErrUnknownMTU, s.Proto)
}

// espOverhead follows esp_init_state (net/ipv4/esp4.c) and esp6_init_state (net/ipv6/esp6.c).
func (s *SA) espOverhead(o *overhead, ip int, add func(string, int)) error {
	var c cipher
	var known bool
	switch {
	case s.AEAD.Name != "":
		if c, known = aeads[s.AEAD.Name]; !known {
			return fmt.Errorf("%w: aead %q", ErrUnknownMTU, s.AEAD.Name)
		}
		o.icv = s.AEAD.ICVBits / 8
	case s.Enc.Name != "":
		if c, known = ciphers[s.Enc.Name]; !known {
			return fmt.Errorf("%w: cipher %q", ErrUnknownMTU, s.Enc.Name)
		}
		if o.icv, known = s.Auth.icv(); !known {
			return fmt.Errorf("%w: authentication %q", ErrUnknownMTU, s.Auth.Name)
		}
	default:
		return ErrLarval
	}
	o.block = max(c.block, 4)
	switch s.Encap.Type {
	case 0:
	case encapESPInUDP:
		add("UDP header", 8)
	case encapESPInUDPNonIKE: // until 6.7: two words of non-IKE marker follow the header
		add("UDP header and non-IKE marker", 16)
	case encapESPInTCP: // only the length field; TCP's own header is the socket's
		add("ESP-in-TCP length", 2)
	default:
		return fmt.Errorf("%w: encapsulation type %d", ErrUnknownMTU, s.Encap.Type)
	}
	if s.Mode == BEET && (!s.HasSelector || s.Selector.Family != IPv6) {
		add("BEET pseudo header", 8)
		if s.Family == IPv6 {
			add("larger outer IP header", 20)
		}
	}
	add("ESP header", 8)
	add("IV", c.iv)
	o.lines = append(o.lines, Cost{"ICV", o.icv})
	if s.Mode != Tunnel {
		o.adj = ip
	}
	return nil
}

// ahOverhead follows ah_init_state (net/ipv4/ah4.c) and ah6_init_state (net/ipv6/ah6.c): the
// header with its ICV is padded to 8 bytes, on IPv4 to 4 where the SA has the align4 flag.
func (s *SA) ahOverhead(o *overhead, add func(string, int)) error {
	if s.Auth.Name == "" {
		return ErrLarval
	}
	icv, known := s.Auth.icv()
	if !known {
		return fmt.Errorf("%w: authentication %q", ErrUnknownMTU, s.Auth.Name)
	}
	const header, flagAlign4 = 12, 64 // XFRM_STATE_ALIGN4
	align := 8
	if s.Family == IPv4 && s.Flags&flagAlign4 != 0 {
		align = 4
	}
	total := (header + icv + align - 1) / align * align
	add("AH header", header)
	add("ICV", icv)
	add("AH padding", total-header-icv)
	return nil
}

// icv is the length of the ICV in bytes that an SA with this authentication has. No
// authentication at all is digest_null.
func (a Algorithm) icv() (bytes int, known bool) {
	if a.Name == "" {
		return 0, true
	}
	if a.ICVBits > 0 {
		return a.ICVBits / 8, true
	}
	bits, known := authICVBits[a.Name]
	return bits / 8, known
}
