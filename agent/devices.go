package agent

import (
	"cmp"
	"context"
	"log/slog"
	"slices"

	"tsoagent/agent/api"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
)

// shownFeatures are the features that are ever held off, and gso, in the order of a table.
var shownFeatures = [...]ethtool.Feature{
	ethtool.TCPSegmentation, ethtool.TCP6Segmentation, ethtool.TCPECNSegmentation, ethtool.UDPSegmentation, ethtool.GenericSegm,
	ethtool.ESPHWOffload, ethtool.ESPSegmentation, ethtool.ESPTxCsum,
}

// deviceList are the devices that concern the agent, or all. The hardware is asked outside of the loop: its driver
// answers when it likes.
func (a *Agent) deviceList(ctx context.Context, call caller, all bool) (*api.DeviceList, error) {
	out := &api.DeviceList{Version: api.Version, Netns: a.name, Live: !a.once, Devices: []api.DeviceReport{}}
	o, err := a.observe(ctx)
	if err == nil {
		err = call(ctx, func() { out.Devices = a.deviceReports(o.report, all) })
	}
	if err != nil {
		return nil, err
	}
	err = a.in(func() error {
		for i := range out.Devices {
			d := &out.Devices[i]
			if info, err := ethtool.ReadInfo(d.Device); err == nil { // one that is gone by now has none
				d.Driver, d.Bus, d.Firmware = info.Driver, info.Bus, info.Firmware
				d.PermAddr = cmp.Or(info.PermAddr, d.PermAddr)
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		return nil
	})
	return out, err
}

// DevicesIn reads the kernel once, without an agent: the devices in a namespace that would concern one, or all.
func DevicesIn(ctx context.Context, spec string, cfg Config, log *slog.Logger, version string, all bool) (*api.DeviceList, error) {
	var out *api.DeviceList
	_, err := lookIn(ctx, spec, cfg, log, version, func(ctx context.Context, a *Agent) (err error) {
		out, err = a.deviceList(ctx, atOnce, all)
		return err
	})
	return out, err
}

// deviceReports joins what is known of devices with the newest report.
func (a *Agent) deviceReports(r *Report, all bool) []api.DeviceReport {
	found := map[string]*api.DeviceReport{} // those that concern the agent
	at := func(name string) *api.DeviceReport {
		if found[name] == nil {
			found[name] = &api.DeviceReport{Carries: []string{}, Features: []api.FeatureReport{}}
		}
		return found[name]
	}
	for i := range r.Coverages {
		for _, name := range r.Coverages[i].Carriers {
			at(name).Carries = append(at(name).Carries, coverageName(&r.Coverages[i]))
		}
	}
	holds := map[plan.HoldKey]HoldReport{}
	for _, h := range r.Holds {
		at(h.Device)
		holds[plan.HoldKey{Index: ethtool.Ifindex(h.Index), Feature: ethtool.Feature(h.Feature)}] = h
	}
	for _, l := range r.Locks {
		for _, name := range l.Devices {
			at(name).Locks++
		}
	}
	for _, c := range r.Clones {
		if c.Copy {
			continue
		}
		for _, name := range c.Devices {
			at(name).Clones++
		}
	}
	for _, l := range r.Lanes {
		at(l.Device).Lane, at(l.Device).LaneState = l.IFB, l.State
	}
	for _, m := range r.DeviceMTUs {
		if at(m.Device); m.State == StateInPlace {
			at(m.Device).WasMTU = m.Was
		}
	}
	out := []api.DeviceReport{}
	for _, l := range a.st.fib.Links() {
		d := found[l.Name]
		switch {
		case d != nil:
		case all:
			d = at(l.Name)
		default:
			continue
		}
		d.Device, d.Index, d.Kind, d.Up, d.MTU, d.PermAddr = l.Name, int32(l.Index), l.Kind, l.Up, l.MTU, l.PermAddr
		for _, name := range shownFeatures {
			s, ok := a.st.features[l.Index].Get(name)
			if !ok {
				continue
			}
			h := holds[plan.HoldKey{Index: ethtool.Ifindex(l.Index), Feature: name}]
			d.Features = append(d.Features, api.FeatureReport{
				Feature: string(name), Active: s.Active, Wanted: s.Wanted, Fixed: !s.Changeable, Hold: h.State, Why: h.Why, Because: h.Because,
			})
		}
		out = append(out, *d)
	}
	slices.SortFunc(out, func(a, b api.DeviceReport) int { return cmp.Compare(a.Device, b.Device) })
	return out
}
