package routes

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// Attributes and flags of links (linux/if_link.h, linux/if.h).
const (
	iflaAddress     = 1
	iflaIfname      = 3
	iflaMTU         = 4
	iflaLink        = 5
	iflaMaster      = 10
	iflaWireless    = 11
	iflaLinkInfo    = 18
	iflaAFSpec      = 26
	iflaLinkNetnsid = 37
	iflaEvent       = 44
	iflaNewNetnsid  = 45
	iflaNewIfindex  = 49
	iflaPermAddress = 54
	iflaExtMask     = 29

	iflaInfoKind      = 1
	iflaInfoData      = 2
	iflaInfoSlaveKind = 4
	iflaInfoSlaveData = 5

	iflaXfrmIfID            = 2
	iflaXfrmCollectMetadata = 3
	iflaVRFTable            = 1
	iflaBondSlaveState      = 1

	iflaInet6Conf = 2 // in IFLA_AF_SPEC's AF_INET6: an array of 32-bit values
	devconfMTU6   = 2 // DEVCONF_MTU6, linux/ipv6.h

	iffUp      = 1 << 0
	iffRunning = 1 << 6
	iffLowerUp = 1 << 16

	ifinfomsgLen = 16
)

// decodeLink decodes a struct ifinfomsg and its attributes. It returns nil for a message that
// is not about the device itself: those of AF_BRIDGE tell of a bridge port (its RTM_DELLINK
// means that the port left the bridge, not that the device is gone), those of other families
// of their settings, and wireless events carry next to no attributes.
func decodeLink(data []byte) (*Link, error) {
	l, _, err := decodeLinkEvent(data)
	return l, err
}

// eventFeatures is IFLA_EVENT_FEATURES (linux/if_link.h): the features of the device changed.
const eventFeatures = 2

// decodeLinkEvent also returns why the kernel tells of the device (IFLA_EVENT), 0 where it does not say.
func decodeLinkEvent(data []byte) (_ *Link, event uint32, err error) {
	if len(data) < ifinfomsgLen {
		return nil, 0, errShort
	}
	if data[0] != 0 { // AF_UNSPEC
		return nil, 0, nil
	}
	flags := binary.NativeEndian.Uint32(data[8:])
	l := &Link{
		Type:    binary.NativeEndian.Uint16(data[2:]),
		Index:   Ifindex(binary.NativeEndian.Uint32(data[4:])),
		Up:      flags&iffUp != 0,
		Running: flags&iffLowerUp != 0,
	}
	if l.Index <= 0 {
		return nil, 0, errAttribute
	}
	a := attrs{b: data[ifinfomsgLen:]}
	for a.next() {
		switch a.typ {
		case iflaWireless:
			return nil, 0, a.err
		case iflaEvent:
			event = a.u32()
		case iflaIfname:
			l.Name = a.str()
		case iflaMTU:
			l.MTU = int(a.u32())
		case iflaLink:
			l.Parent = Ifindex(a.u32())
		case iflaLinkNetnsid:
			l.ParentElsewhere = true
		case iflaMaster:
			l.Master = Ifindex(a.u32())
		case iflaAddress:
			l.HardwareAddr = net.HardwareAddr(a.val).String()
		case iflaPermAddress:
			l.PermAddr = net.HardwareAddr(a.val).String()
		case iflaLinkInfo:
			a.err = l.decodeInfo(a.val)
		case iflaAFSpec:
			a.err = l.decodeSpec(a.val)
		}
	}
	if a.err == nil && l.Name == "" {
		a.err = errAttribute
	}
	if a.err != nil {
		return nil, 0, a.err
	}
	// A tunnel that was moved sends in the namespace that it was made in, and IFLA_LINK_NETNSID
	// names that one (rtnl_fill_link_netnsid, net/core/rtnetlink.c).
	l.Encap.LinkElsewhere = l.ParentElsewhere && l.Encap != Encap{}
	if l.MTU6 >= l.MTU { // the first events of a device come before IPv6 is on it
		l.MTU6 = 0
	}
	return l, event, nil
}

// decodePlace is where a device went that left the namespace (dev_change_net_namespace,
// net/core/dev.c). One that is deleted has no such attributes.
func decodePlace(data []byte) (Place, error) {
	var p Place
	known := false
	a := attrs{b: data[ifinfomsgLen:]}
	for a.next() {
		switch a.typ {
		case iflaNewNetnsid:
			p.Netnsid, known = int32(a.u32()), true
		case iflaNewIfindex:
			p.Index = Ifindex(a.u32())
		}
	}
	if a.err != nil || !known || p.Index <= 0 || p.Netnsid < 0 {
		return Place{}, a.err
	}
	return p, nil
}

// decodeSpec decodes the IPv6 MTU from IFLA_AF_SPEC (inet6_fill_link_af, net/ipv6/addrconf.c).
func (l *Link) decodeSpec(b []byte) error {
	a := attrs{b: b}
	for a.next() {
		if a.typ != uint16(IPv6) {
			continue
		}
		c := attrs{b: a.val}
		for c.next() {
			if at := 4 * devconfMTU6; c.typ == iflaInet6Conf && len(c.val) >= at+4 {
				l.MTU6 = int(binary.NativeEndian.Uint32(c.val[at:]))
			}
		}
		if c.err != nil {
			return c.err
		}
	}
	return a.err
}

// decodeInfo decodes IFLA_LINKINFO. The kind stands before its data on the wire, but nothing
// promises that, so the data is read last.
func (l *Link) decodeInfo(b []byte) error {
	var data, port []byte
	a := attrs{b: b}
	for a.next() {
		switch a.typ {
		case iflaInfoKind:
			l.Kind = a.str()
		case iflaInfoSlaveKind:
			l.SlaveKind = a.str()
		case iflaInfoData:
			data = a.val
		case iflaInfoSlaveData:
			port = a.val
		}
	}
	if a.err == nil && l.SlaveKind == "bond" {
		a.err = l.decodeBondPort(port)
	}
	if a.err != nil {
		return a.err
	}
	switch l.Kind {
	case "xfrm":
		d := attrs{b: data}
		for d.next() {
			switch d.typ {
			case iflaXfrmIfID:
				l.IfID = d.u32()
			case iflaXfrmCollectMetadata: // a flag
				l.External = true
			}
		}
		return d.err
	case "vrf":
		d := attrs{b: data}
		for d.next() {
			if d.typ == iflaVRFTable {
				l.VRFTable = TableID(d.u32())
			}
		}
		return d.err
	}
	return l.decodeEncap(data)
}

// decodeBondPort decodes IFLA_INFO_SLAVE_DATA of a bond's port (bond_fill_slave_info,
// drivers/net/bonding/bond_netlink.c).
func (l *Link) decodeBondPort(b []byte) error {
	a := attrs{b: b}
	for a.next() {
		if a.typ == iflaBondSlaveState {
			l.Backup = a.u8() == bondStateBackup
		}
	}
	return a.err
}

// bondStateBackup is BOND_STATE_BACKUP (linux/if_bonding.h).
const bondStateBackup = 1

// Attributes of addresses (linux/if_addr.h).
const (
	ifaAddress = 1
	ifaLocal   = 2

	ifaddrmsgLen = 8
)

// decodeAddr decodes a struct ifaddrmsg and its attributes. On a point-to-point device
// IFA_ADDRESS is the peer and IFA_LOCAL our own address; elsewhere they are the same, and IPv6
// sends IFA_LOCAL only where there is a peer.
func decodeAddr(data []byte) (Addr, bool, error) {
	if len(data) < ifaddrmsgLen {
		return Addr{}, false, errShort
	}
	if !knownFamily(data[0]) {
		return Addr{}, false, nil
	}
	f, bits := Family(data[0]), int(data[1])
	if bits > f.Bits() {
		return Addr{}, false, errPrefixLen
	}
	var local, address netip.Addr
	a := attrs{b: data[ifaddrmsgLen:]}
	for a.next() {
		switch a.typ {
		case ifaAddress:
			address = a.addr(f)
		case ifaLocal:
			local = a.addr(f)
		}
	}
	if !local.IsValid() {
		local = address
	}
	if a.err == nil && !local.IsValid() {
		a.err = errAttribute
	}
	if a.err != nil {
		return Addr{}, false, a.err
	}
	return Addr{
		Ifindex: Ifindex(binary.NativeEndian.Uint32(data[4:])),
		Prefix:  netip.PrefixFrom(local, bits),
	}, true, nil
}
