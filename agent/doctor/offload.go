package doctor

import (
	"fmt"
	"slices"
	"strings"

	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

var tsoFeatures = []ethtool.Feature{ethtool.TCPSegmentation, ethtool.TCP6Segmentation}

// dependencies are the features without which the kernel has no TSO (netdev_fix_features, net/core/dev.c).
var dependencies = []ethtool.Feature{"tx-scatter-gather", "tx-checksum-ip-generic", "tx-checksum-ipv4", "tx-checksum-ipv6"}

// tso finds devices whose segmentation offload somebody has switched off for nothing. A device that carries covered flows alone may need it
// off, and so may what is held: those are left out.
func (c *Checkup) tso(p *Patient) {
	dedicated := map[string]bool{}
	for _, v := range p.Plan.Verdicts {
		for _, name := range v.Carriers {
			dedicated[name] = true
		}
	}
	for _, l := range p.Input.FIB.Links() {
		tunnel := slices.ContainsFunc(p.Plan.Tunnels, func(t plan.Tunnel) bool { return t.Index == l.Index })
		if !l.Up || l.Type == arphrdLoopback || l.Kind == "ifb" || l.Tunnel() || tunnel || dedicated[l.Name] {
			continue
		}
		var off []string
		needs := map[string]bool{}
		for _, f := range tsoFeatures {
			st, known := p.Input.Features[l.Index].Get(f)
			if !known || st.Active || !st.Changeable || p.held(l.Index, f) {
				continue
			}
			off = append(off, string(f))
			if st.Wanted {
				needs[""] = true
				continue
			}
			needs[string(f)] = true
		}
		if len(off) == 0 {
			continue
		}
		c.tsoOff(p, l, off, needs)
	}
}

const arphrdLoopback = 772 // ARPHRD_LOOPBACK, linux/if_arp.h

// held reports whether a feature is ours to hold, or is wanted off by the plan.
func (p *Patient) held(i routes.Ifindex, f ethtool.Feature) bool {
	k := plan.HoldKey{Index: ethtool.Ifindex(i), Feature: f}
	_, ours := p.Input.Holds[k]
	return ours || slices.ContainsFunc(p.Plan.Holds, func(h plan.Hold) bool { return h.Device.Index == k.Index && h.Feature == f })
}

func (c *Checkup) tsoOff(p *Patient, l *routes.Link, off []string, needs map[string]bool) {
	text := fmt.Sprintf("%s has %s off", l.Name, strings.Join(off, " and "))
	var on []string
	for _, f := range off {
		if needs[f] {
			on = append(on, f+" on")
		}
	}
	if needs[""] {
		// It is wanted, and what it depends on is off.
		for _, f := range dependencies {
			if st, known := p.Input.Features[l.Index].Get(f); known && !st.Wanted && st.Changeable && !st.Active {
				on = append(on, string(f)+" on")
			}
		}
		if len(on) == 0 {
			return // the driver's own reasons
		}
		text += ", though it is wanted: what it depends on is off"
	}
	text += ": flows that are not covered leave it in single segments (1.5 to 2 times the throughput with it on, KERNEL.md 3)"
	if n := p.LostBy[l.Name]; n > 0 {
		text += fmt.Sprintf("; %s by it now", count(n, "connection suffers", "connections suffer"))
	}
	c.found(TSOOff, text, "ethtool -K "+word(l.Name)+" "+strings.Join(on, " "))
}

// lateOffload finds SAs that were added before the module that would offload them was loaded.
func (c *Checkup) lateOffload(p *Patient) {
	for _, m := range []struct {
		name   string
		family xfrmwatch.Family
	}{{"esp4_offload", xfrmwatch.IPv4}, {"esp6_offload", xfrmwatch.IPv6}} {
		mod, loaded := p.Modules[m.name]
		if !loaded || mod.Refs < 0 {
			continue
		}
		var sas []*xfrmwatch.SA
		for sa := range p.Input.XFRM.SAs() {
			if sa.Proto == xfrmwatch.ESP && sa.Family == m.family && !sa.Larval {
				sas = append(sas, sa)
			}
		}
		late := len(sas) - mod.Refs
		if late <= 0 {
			continue
		}
		slices.SortStableFunc(sas, func(a, b *xfrmwatch.SA) int { return int(int64(a.AddTime) - int64(b.AddTime)) })
		c.found(ESPOffloadLate, fmt.Sprintf("%s is loaded, and at least %s of %d older: the oldest is %s. Their flows are cut at the socket, those of later "+
			"SAs inside of ESP", m.name, count(late, "SA is", "SAs are"), len(sas), saText(sas[0])),
			"echo "+m.name+" >>/etc/modules-load.d/tsoagent.conf")
	}
}

// offers finds bonds and their kin that offer an offload of ESP that they can't do, where no agent holds it off.
func (c *Checkup) offers(p *Patient) {
	for _, l := range p.Input.FIB.Links() {
		var on []string
		why := ""
		for _, h := range p.Plan.Holds {
			st, _ := p.Input.Features[l.Index].Get(h.Feature)
			if routes.Ifindex(h.Device.Index) == l.Index && strings.Contains(string(h.Feature), "esp") && st.Wanted {
				on = append(on, string(h.Feature))
				why = h.Why
			}
		}
		if len(on) == 0 {
			continue
		}
		c.found(BondOffers, fmt.Sprintf("%s offers %s, but %s", l.Name, strings.Join(on, ", "), why),
			"ethtool -K "+word(l.Name)+" "+strings.Join(on, " off ")+" off")
	}
}

// unbound finds SAs that are bound to an offload that is not done.
func (c *Checkup) unbound(p *Patient) {
	for _, u := range plan.UnboundSAs(p.Input) {
		c.found(OffloadNotDone, fmt.Sprintf("SA %s %s", saText(u.SA), u.Why))
	}
}
