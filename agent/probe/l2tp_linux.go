package probe

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// From linux/l2tp.h.
const (
	l2tpCmdTunnelCreate  = 1
	l2tpCmdSessionCreate = 5

	l2tpAttrPWType      = 1
	l2tpAttrEncapType   = 2
	l2tpAttrProtoVer    = 7
	l2tpAttrIfname      = 8
	l2tpAttrConnID      = 9
	l2tpAttrPeerConnID  = 10
	l2tpAttrSessionID   = 11
	l2tpAttrPeerSession = 12
	l2tpAttrIPSaddr     = 24
	l2tpAttrIPDaddr     = 25
	l2tpAttrUDPSport    = 26
	l2tpAttrUDPDport    = 27
	l2tpAttrIP6Saddr    = 31
	l2tpAttrIP6Daddr    = 32

	l2tpPWEth = 5
)

// addL2TP adds an unmanaged L2TPv3 tunnel, whose socket is the kernel's, with one Ethernet
// session, as `ip l2tp add tunnel` and `add session` do. The library doesn't know them.
func (l *lab) addL2TP(i int, local, remote net.IP) error {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	family, err := conn.GetFamily("l2tp")
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("generic netlink family l2tp: %w", unix.EOPNOTSUPP)
	}
	if err != nil {
		return err
	}
	// Each end's id is 1 plus its index.
	own, peer := uint32(i+1), uint32(2-i)
	create := func(command uint8, fill func(*netlink.AttributeEncoder)) error {
		ae := netlink.NewAttributeEncoder()
		ae.Uint32(l2tpAttrConnID, own)
		fill(ae)
		data, err := ae.Encode()
		if err != nil {
			return err
		}
		_, err = conn.Execute(genetlink.Message{
			Header: genetlink.Header{Command: command, Version: family.Version}, Data: data,
		}, family.ID, netlink.Request|netlink.Acknowledge)
		return err
	}
	err = create(l2tpCmdTunnelCreate, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(l2tpAttrPeerConnID, peer)
		ae.Uint8(l2tpAttrProtoVer, 3)
		ae.Uint16(l2tpAttrEncapType, l.l2tpEncap())
		saddr, daddr := uint16(l2tpAttrIPSaddr), uint16(l2tpAttrIPDaddr)
		if l.shape.outer == IPv6 {
			saddr, daddr = l2tpAttrIP6Saddr, l2tpAttrIP6Daddr
		}
		ae.Bytes(saddr, local)
		ae.Bytes(daddr, remote)
		if l.shape.variant == "udp" {
			ae.Uint16(l2tpAttrUDPSport, l2tpPort)
			ae.Uint16(l2tpAttrUDPDport, l2tpPort)
		}
	})
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	err = create(l2tpCmdSessionCreate, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(l2tpAttrPeerConnID, peer)
		ae.Uint32(l2tpAttrSessionID, own)
		ae.Uint32(l2tpAttrPeerSession, peer)
		ae.Uint16(l2tpAttrPWType, l2tpPWEth)
		ae.String(l2tpAttrIfname, tunnelName)
	})
	if err != nil {
		return fmt.Errorf("session: %w", err)
	}
	return nil
}

// l2tpEncap is L2TP_ENCAPTYPE_UDP or L2TP_ENCAPTYPE_IP.
func (l *lab) l2tpEncap() uint16 {
	if l.shape.variant == "udp" {
		return 0
	}
	return 1
}
