package doctor

import (
	"fmt"
	"net/netip"

	"tsoagent/routes"
)

// tunnels finds tunnels, and xfrm interfaces, by which packets are sent that are larger than what IPsec leaves.
func (c *Checkup) tunnels(p *Patient) {
	left := map[routes.Ifindex]int{}
	for _, t := range p.Plan.Tunnels {
		left[t.Index] = t.MTU
	}
	for _, v := range p.Plan.Verdicts {
		if v.IfID == 0 || v.MTU == 0 || v.Gone {
			continue
		}
		for _, l := range p.Input.FIB.Links() {
			if have := left[l.Index]; l.Kind == "xfrm" && l.IfID == v.IfID && (have == 0 || v.MTU < have) {
				left[l.Index] = v.MTU
			}
		}
	}
	for _, l := range p.Input.FIB.Links() {
		mtu := left[l.Index]
		if mtu == 0 || !l.Up || l.MTU <= mtu {
			continue
		}
		dst, ok := p.unlocked(l, mtu)
		if !ok {
			continue
		}
		text := fmt.Sprintf("%s has an MTU of %d, and IPsec leaves %d of it: larger packets to %s are lost, or sent in pieces", l.Name, l.MTU, mtu, dst)
		if mtu < 1280 { // IPV6_MIN_MTU: below it the device has no IPv6
			c.found(TunnelMTU, text+"; below 1280 the device would lose IPv6, so lock its routes instead")
			continue
		}
		c.found(TunnelMTU, text, fmt.Sprintf("ip link set dev %s mtu %d", word(l.Name), mtu))
	}
}

// unlocked is a destination that a device leads to with more than the MTU. The kernel's own routes to the net that the device is in count where
// there are no others: nobody can lock them in place.
func (p *Patient) unlocked(l *routes.Link, mtu int) (netip.Prefix, bool) {
	keys, n := p.Input.FIB.DeviceRoutes(l.Index)
	if n > 0 && len(keys) == 0 {
		return netip.Prefix{}, false // too many to look at
	}
	var own netip.Prefix
	others := false
	for _, k := range keys {
		r, ok := p.Input.FIB.Get(k)
		if ok == 0 || r.Body.Type != routes.Unicast || r.Dst.Addr().IsLinkLocalUnicast() || r.Dst.Addr().IsMulticast() {
			continue
		}
		small := r.Body.Metrics.MTU != 0 && int(r.Body.Metrics.MTU) <= mtu
		if r.Body.Protocol == routes.ProtoKernel {
			if !small && !own.IsValid() {
				own = r.Dst
			}
			continue
		}
		others = true
		if !small {
			return r.Dst, true
		}
	}
	return own, own.IsValid() && !others
}
