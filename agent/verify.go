package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"

	"tsoagent/agent/plan"
	"tsoagent/agent/verify"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// mostAsked is how many routes are asked for to find the devices that covered flows leave by.
const mostAsked = 64

// verifyWorld is a snapshot of what packets are sorted by. The loop only copies: policies and SAs are immutable,
// and are turned into what a client reads outside of it.
func (a *Agent) verifyWorld(ctx context.Context, call caller) (*verify.World, error) {
	w := &verify.World{Version: verify.Version, Netns: a.name, Live: !a.once, Carriers: []string{}}
	var policies []*xfrmwatch.Policy
	var covers []xfrmwatch.Coverage
	ready := false
	err := call(ctx, func() {
		if a.lastP == nil {
			return
		}
		ready, covers = true, a.lastP.Complete().Current
		policies = make([]*xfrmwatch.Policy, 0, a.st.db.PolicyCount())
		policies = slices.AppendSeq(policies, a.st.db.Policies())
		w.Stale, w.Keys = len(a.staleSources()) > 0, len(a.lastIn.Keys)
		w.Devices, w.Carriers = a.verifyDevices(), a.verifyCarriers()
	})
	if err == nil && !ready {
		err = errNotReady
	}
	if err != nil {
		return nil, err
	}
	for _, p := range policies {
		if p.Dir == xfrmwatch.Out && !p.Sub {
			w.Policies = append(w.Policies, verify.PolicyOf(p))
		}
	}
	w.SAs = verify.SAsOf(covers)
	if scope, err := a.scope(); err == nil {
		w.Cookie = scope.NetnsCookie
	}
	return w, nil
}

// verifyDevices are the namespace's devices with what decides about the packets that leave by them.
func (a *Agent) verifyDevices() []verify.Device {
	links := a.st.fib.Links()
	out := make([]verify.Device, 0, len(links))
	passing := map[routes.Ifindex]bool{}
	for _, l := range links {
		switch l.Kind {
		case "macvlan", "macvtap", "ipvlan", "ipvtap":
			passing[l.Parent] = passing[l.Parent] || !l.ParentElsewhere
		}
	}
	planned := map[plan.HoldKey]bool{}
	for _, h := range a.lastP.Holds {
		planned[plan.HoldKey{Index: h.Device.Index, Feature: h.Feature}] = true
	}
	for _, l := range links {
		offload := func(f ethtool.Feature) verify.Offload {
			s := a.offload(l.Index, f)
			return verify.Offload{Active: s.Active, Fixed: s.Fixed, Held: s.Held, Planned: planned[plan.HoldKey{Index: ethtool.Ifindex(l.Index), Feature: f}]}
		}
		d := verify.Device{
			Index: int32(l.Index), Name: l.Name, Kind: l.Kind, IfID: l.IfID, External: l.External,
			Passing:   passing[l.Index] || l.Kind == "vrf" || l.SlaveKind == "bridge" || l.SlaveKind == "openvswitch",
			SharedOff: a.cfg.Plan.SharedMode(l.Name) == plan.SharedOff,
			TSO4:      offload(ethtool.TCPSegmentation), TSO6: offload(ethtool.TCP6Segmentation), UDP: offload(ethtool.UDPSegmentation),
		}
		switch l.Kind {
		case "vti", "vti6":
			d.VTI, d.Mark, d.Elsewhere = true, l.Encap.Key, l.Encap.LinkElsewhere
		case "xfrm":
			d.Elsewhere = l.ParentElsewhere // its policies are where it was made
		case "bond", "team", "bridge": // they offer what their ports can't do (KERNEL.md 14)
		default:
			d.CutsESP = a.offload(l.Index, ethtool.ESPSegmentation).Active
		}
		out = append(out, d)
	}
	for _, t := range a.lastP.Tunnels {
		i := slices.IndexFunc(out, func(d verify.Device) bool { return d.Index == int32(t.Index) })
		if i < 0 {
			continue
		}
		out[i].Covered = true
		if len(t.Own) > 0 {
			out[i].Policy = uint32(t.Own[0].Policy)
			if p, ok := a.st.db.Policy(t.Own[0].Policy); ok {
				_, maybe := p.Covers()
				out[i].Covered = !maybe
			}
		}
	}
	return out
}

// verifyCarriers are the devices that covered and signed flows leave by, as themselves or as ESP.
func (a *Agent) verifyCarriers() []string {
	found := map[routes.Ifindex]bool{}
	names := map[string]bool{}
	asked := 0
	ask := func(dst, src netip.Addr) {
		if !dst.IsValid() || dst.IsUnspecified() || asked >= mostAsked {
			return
		}
		asked++
		if _, ans, err := a.lookup(Question{Dst: dst, From: src}); err == nil {
			found[ans.Oif] = true
		}
	}
	for _, v := range a.lastP.Complete().Verdicts {
		for _, name := range v.Carriers {
			names[name] = true
		}
		if v.Key != nil {
			ask(v.Key.Peer.Addr(), netip.Addr{})
		}
	}
	for _, c := range a.lastP.Complete().Current {
		if n := len(c.Policy.Templates); len(c.Steps) == 0 && n > 0 { // no SA yet
			t := c.Policy.Templates[n-1]
			if path, ok := a.lastIn.Peers.Path(plan.Peer{Addr: t.Dst, Src: t.Src}); ok {
				found[path.Oif] = true
			}
		}
		for _, step := range c.Steps {
			for _, sa := range step.SAs {
				if path, ok := a.lastIn.Peers.Path(plan.PeerOf(sa)); ok {
					found[path.Oif] = true
				} else if asked < mostAsked {
					ask(sa.Dst, sa.Src)
				}
			}
		}
	}
	out := []string{}
	for _, l := range a.st.fib.Links() { // in the order of their indexes
		if found[l.Index] || names[l.Name] {
			out = append(out, l.Name)
		}
	}
	return out
}

// VerifyWorldIn reads the kernel once, without an agent, and returns what packets in a namespace are sorted by.
func VerifyWorldIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string) (*verify.World, error) {
	var out *verify.World
	_, err := lookIn(ctx, spec, cfg, log, version, func(ctx context.Context, a *Agent) (err error) {
		out, err = a.verifyWorld(ctx, atOnce)
		return err
	})
	return out, err
}
