package probe

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	vnl "github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// external is the variant of an xfrmi that takes its if_id from the route.
const external = "external"

// UDP ports of the tunnels (IANA).
const (
	vxlanPort  = 4789
	genevePort = 6081
	l2tpPort   = 1701
)

// options are what makes a kernel know each kind.
var options = map[string]string{
	"gre": "CONFIG_NET_IPGRE, module ip_gre", "gretap": "CONFIG_NET_IPGRE, module ip_gre",
	"ip6gre": "CONFIG_IPV6_GRE, module ip6_gre", "ip6gretap": "CONFIG_IPV6_GRE, module ip6_gre",
	"ipip": "CONFIG_NET_IPIP, module ipip", "sit": "CONFIG_IPV6_SIT, module sit", "ip6tnl": "CONFIG_IPV6_TUNNEL, module ip6_tunnel",
	"vxlan": "CONFIG_VXLAN, module vxlan", "geneve": "CONFIG_GENEVE, module geneve",
	"l2tp": "CONFIG_L2TP_V3, CONFIG_L2TP_ETH, CONFIG_L2TP_IP, modules l2tp_eth, l2tp_ip, l2tp_ip6", "xfrm": "CONFIG_XFRM_INTERFACE, module xfrm_interface",
}

// addTunnel adds the tunnel's device at end i, as `ip link add` does without further options.
func (l *lab) addTunnel(i int) error {
	var err error
	switch local, remote := l.outer(i); {
	case l.shape.kind == "l2tp":
		err = l.addL2TP(i, local, remote)
	case l.shape.variant == external:
		err = addExternal()
	default:
		err = vnl.LinkAdd(l.link(i, local, remote))
	}
	if err != nil {
		err = fmt.Errorf("device %s %s: %w", l.shape.kind, l.shape.variant, err)
		return missing(err, fmt.Sprintf("%s devices (%s)", l.shape.kind, options[l.shape.kind]))
	}
	return nil
}

// link is the device for the library.
func (l *lab) link(i int, local, remote net.IP) vnl.Link {
	a := vnl.NewLinkAttrs()
	a.Name = tunnelName
	switch l.shape.kind {
	case "gre", "ip6gre":
		return &vnl.Gretun{LinkAttrs: a, Local: local, Remote: remote, PMtuDisc: 1, Ttl: 64}
	case "gretap", "ip6gretap":
		return &vnl.Gretap{LinkAttrs: a, Local: local, Remote: remote, PMtuDisc: 1, Ttl: 64}
	case "ipip":
		return &vnl.Iptun{LinkAttrs: a, Local: local, Remote: remote, PMtuDisc: 1, Ttl: 64}
	case "sit":
		return &vnl.Sittun{LinkAttrs: a, Local: local, Remote: remote, PMtuDisc: 1, Ttl: 64}
	case "ip6tnl":
		return &vnl.Ip6tnl{LinkAttrs: a, Local: local, Remote: remote, Ttl: 64, EncapLimit: 4, Proto: uint8(l.shape.proto)}
	case "vxlan":
		return &vnl.Vxlan{LinkAttrs: a, VxlanId: 1, SrcAddr: local, Group: remote, Port: vxlanPort, Learning: true}
	case "geneve":
		return &vnl.Geneve{LinkAttrs: a, ID: 1, Remote: remote, Dport: genevePort}
	}
	a.ParentIndex = l.nic[i]
	return &vnl.Xfrmi{LinkAttrs: a, Ifid: ifID}
}

// From linux/if_link.h and linux/lwtunnel.h; the library lacks them.
const (
	iflaXfrmCollectMetadata = 3
	lwtunnelEncapXfrm       = 10
	lwtXfrmIfID             = 1
)

// addExternal adds an xfrmi in external mode. A kernel before 6.1 doesn't know it, says EINVAL
// and makes none.
func addExternal() error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(tunnelName)))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("xfrm"))
	info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(iflaXfrmCollectMetadata, nil)
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("external mode (Linux 6.1 or newer): %w", errors.Join(unix.EOPNOTSUPP, err))
	}
	return err
}

// externalRoute routes an address into an xfrmi in external mode: `encap xfrm if_id 1`. The
// kernel wants RTA_ENCAP flagged as nested (xfrmi_build_state), which the library doesn't do.
func externalRoute(link vnl.Link, to netip.Addr) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	msg := nl.NewRtMsg()
	msg.Scope, msg.Dst_len = unix.RT_SCOPE_LINK, uint8(to.BitLen())
	msg.Family = unix.AF_INET6
	if to.Is4() {
		msg.Family = unix.AF_INET
	}
	encap := nl.NewRtAttr(unix.RTA_ENCAP|unix.NLA_F_NESTED, nil)
	encap.AddRtAttr(lwtXfrmIfID, nl.Uint32Attr(ifID))
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.RTA_DST, to.AsSlice()))
	req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(link.Attrs().Index))))
	req.AddData(nl.NewRtAttr(unix.RTA_ENCAP_TYPE, nl.Uint16Attr(lwtunnelEncapXfrm)))
	req.AddData(encap)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return missing(fmt.Errorf("route with encap xfrm: %w", err), "routes with encap xfrm (CONFIG_LWTUNNEL)")
	}
	return nil
}
