package plan

import (
	"fmt"
	"slices"

	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// espFeatures are the offloads that ESP packets alone use. The last two mean something only to SAs
// that are bound to the first.
var espFeatures = []ethtool.Feature{ethtool.ESPHWOffload, ethtool.ESPSegmentation, ethtool.ESPTxCsum}

// holdESP takes the esp-* features from devices that offer esp-hw-offload and send by a port that
// can't do it. A bond in mode active-backup offers all three whatever its ports are
// (bond_fix_features, drivers/net/bonding/bond_main.c); key exchange daemons look at the feature
// and then ask for an offload that is refused, lost at the next failover, or worse. It needs no
// coverage, as it has to be done before there are SAs: those keep what they were bound to when
// they were added.
//
// A device that offers tx-esp-segmentation alone, as every bridge does, is left alone: no SA can be
// bound to it (bridges have no xfrmdev_ops), and for the SAs of the kernel's own ESP the feature is
// without effect, on the wire as in throughput (KERNEL.md 54).
func (p *planner) holdESP() {
	for _, l := range p.FIB.Links() {
		if len(p.sending(l)) == 0 || !p.offers(l, ethtool.ESPHWOffload) || p.Config.dedicated(l.Name) == Keep {
			continue
		}
		for _, f := range espFeatures {
			// One that is off and not ours stays off, and is no hold.
			if why := p.lacks(l, f); why != "" && p.offers(l, f) {
				p.plan.Holds = append(p.plan.Holds, Hold{
					Device:  ethtool.Device{Index: ethtool.Ifindex(l.Index), Name: l.Name},
					Feature: f,
					Why:     why,
				})
			}
		}
	}
}

// sending are the ports by which a bond, team or bridge sends now, in the order of their indexes;
// none for other devices.
func (p *planner) sending(l *routes.Link) []*routes.Link {
	if p.senders == nil {
		p.findSenders()
	}
	return p.senders[l.Index]
}

// findSenders lists the ports of each bond, team and bridge by which it sends now: those of a bond
// that aren't backups, and those of the others that are up and running. If there are none, it is
// all of them: one of them will be next.
func (p *planner) findSenders() {
	p.senders = map[routes.Ifindex][]*routes.Link{}
	idle := map[routes.Ifindex][]*routes.Link{}
	for _, l := range p.FIB.Links() {
		m := p.FIB.Link(l.Master)
		if m == nil {
			continue
		}
		var sends bool
		switch m.Kind {
		case "bond":
			sends = !l.Backup
		case "team", "bridge":
			sends = l.Up && l.Running
		default:
			continue // a VRF sends nothing itself
		}
		if sends {
			p.senders[m.Index] = append(p.senders[m.Index], l)
		} else {
			idle[m.Index] = append(idle[m.Index], l)
		}
	}
	for i, ls := range idle {
		if len(p.senders[i]) == 0 {
			p.senders[i] = ls
		}
	}
}

// offers reports whether a feature of the device is wanted, or would be but for our hold.
func (p *planner) offers(l *routes.Link, f ethtool.Feature) bool {
	st, ok := p.Features[l.Index].Get(f)
	_, ours := p.Holds[HoldKey{ethtool.Ifindex(l.Index), f}]
	return ok && st.Changeable && (st.Wanted || ours)
}

// lacks says why a device can't keep what it offers: of the ports by which it sends, the first
// that can't do the feature. It is empty if all can. A port whose features are not read yet proves
// nothing: it neither begins a hold nor ends one.
func (p *planner) lacks(l *routes.Link, f ethtool.Feature) string {
	for _, port := range p.sending(l) {
		// Without the offload itself there are no segments and no checksums to take care of.
		for _, need := range []ethtool.Feature{f, ethtool.ESPHWOffload} {
			st, known := p.Features[port.Index].Get(need)
			switch {
			case !known:
				if _, ours := p.Holds[HoldKey{ethtool.Ifindex(l.Index), f}]; ours {
					return fmt.Sprintf("the features of its port %s are not known yet", port.Name)
				}
			case !st.Active:
				return fmt.Sprintf("its port %s has %s %s", port.Name, need, st)
			case port.Kind == "bond" && l.Kind == "bond":
				// bond_ipsec_add_sa binds nothing to a bond in a bond.
				return fmt.Sprintf("its port %s is a bond", port.Name)
			}
		}
	}
	return ""
}

// does reports whether a device really does a feature: it is active there, and on all ports by
// which the device sends.
func (p *planner) does(i routes.Ifindex, f ethtool.Feature) bool {
	st, ok := p.Features[i].Get(f)
	if !ok || !st.Active {
		return false
	}
	l := p.FIB.Link(i)
	return l == nil || p.lacks(l, f) == ""
}

// unbound says why an SA's offload is not done, or is empty.
func (p *planner) unbound(sa *xfrmwatch.SA) string {
	if sa.OffloadDev == 0 {
		return ""
	}
	dev := p.FIB.Link(routes.Ifindex(sa.OffloadDev))
	if dev == nil {
		return ""
	}
	bound := "is bound to the offload of " + dev.Name
	if why := p.lacks(dev, ethtool.ESPHWOffload); why != "" {
		return fmt.Sprintf("%s, but %s", bound, why)
	}
	if st, ok := p.Features[dev.Index].Get(ethtool.ESPHWOffload); ok && !st.Active {
		return fmt.Sprintf("%s, which has %s %s", bound, ethtool.ESPHWOffload, st)
	}
	if by := p.leavesBy(sa, dev); by != nil {
		return fmt.Sprintf("%s, but its packets leave by %s", bound, by.Name)
	}
	return ""
}

// leavesBy is the device that an SA's packets leave by where that is known and is not the one it
// is bound to: the kernel then encrypts them itself (xfrm_dev_offload_ok, net/xfrm/xfrm_device.c).
func (p *planner) leavesBy(sa *xfrmwatch.SA, dev *routes.Link) *routes.Link {
	if path := p.wayTo(PeerOf(sa)).path; path.Oif != 0 && path.Oif != dev.Index {
		return p.FIB.Link(path.Oif)
	}
	if m := p.FIB.Link(dev.Master); m != nil && slices.Contains([]string{"bond", "team", "bridge"}, m.Kind) {
		return m
	}
	return nil
}
