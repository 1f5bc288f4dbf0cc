package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/api"
	"tsoagent/agent/client"
	"tsoagent/agent/netns"
)

func devicesCommand() *cli.Command {
	return &cli.Command{
		Name: "devices", Usage: "network devices: features, who holds them off and why, driver; works without an agent", ArgsUsage: "[DEV]...",
		Description: "Shows the devices that covered flows leave by, and those with something held off or locked: for each segmentation\n" +
			"feature what the device does, what was asked of it, and the hold with its reason. With names it shows those.",
		OnUsageError: usage, Action: showDevices,
		Flags: []cli.Flag{&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "all devices of the namespace"}},
	}
}

func showDevices(c *cli.Context) error {
	cfg, ns, err := call(c)
	if err != nil {
		return err
	}
	names := c.Args().Slice()
	all := c.Bool("all") || len(names) > 0
	d, err := client.New(cfg.RunDir).DevicesIn(c.Context, ns, all)
	if errors.Is(err, client.ErrNoAgent) {
		d, err = agent.DevicesIn(c.Context, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version(), all)
	}
	if err != nil {
		return err
	}
	if len(names) > 0 {
		for _, name := range names {
			if !slices.ContainsFunc(d.Devices, func(d api.DeviceReport) bool { return d.Device == name }) {
				return cli.Exit(fmt.Sprintf("%v %q", errNoDevice, name), exitUsage)
			}
		}
		d.Devices = slices.DeleteFunc(d.Devices, func(d api.DeviceReport) bool { return !slices.Contains(names, d.Device) })
	}
	return show(c, d, func(p page) { devicesTable(p, d) })
}

// head says where a list comes from.
func head(p page, live bool, netns string) {
	if !live {
		p.text(0, "no agent runs; read from the kernel, this is what one would do")
	}
	if netns != "" {
		p.text(0, "network namespace %s", netns)
	}
}

func devicesTable(p page, d *api.DeviceList) {
	head(p, d.Live, d.Netns)
	if len(d.Devices) == 0 {
		p.text(0, "no device concerns the agent: no covered flow leaves by one, and nothing is held off; --all shows the others")
		return
	}
	heldOff := 0
	rows := [][]string{{"DEVICE", "KIND", "STATE", "MTU", "CARRIES", "HELD OFF", "LOCKED"}}
	features := [][]string{{"DEVICE", "FEATURE", "NOW", "HOLD", "BECAUSE"}}
	hardware := [][]string{{"DEVICE", "DRIVER", "BUS", "FIRMWARE", "PERMANENT ADDRESS"}}
	for i := range d.Devices {
		dev := &d.Devices[i]
		held := 0
		for _, f := range dev.Features {
			if f.Hold == api.StateInPlace || f.Hold == api.StateReleasing {
				held++
			}
			if f.Hold != "" || !f.Fixed {
				features = append(features, []string{dev.Device, f.Feature, nowText(f), cmp.Or(f.Hold, "-"), short(f.Because)})
			}
		}
		heldOff += held
		rows = append(rows, []string{
			dev.Device, cmp.Or(dev.Kind, "-"), upText(dev.Up), deviceMTU(dev), carriesText(dev.Carries), fmt.Sprint(held), fmt.Sprint(dev.Locks + dev.Clones),
		})
		if dev.Driver+dev.Bus+dev.Firmware+dev.PermAddr != "" {
			hardware = append(hardware, []string{dev.Device, cmp.Or(dev.Driver, "-"), cmp.Or(dev.Bus, "-"), cmp.Or(dev.Firmware, "-"), cmp.Or(dev.PermAddr, "-")})
		}
	}
	p.text(0, "%s, %s held off", count(len(d.Devices), "device", "devices"), count(heldOff, "feature", "features"))
	for _, table := range [][][]string{rows, features, hardware} {
		if len(table) > 1 {
			p.table(table)
		}
	}
	for i := range d.Devices {
		dev := &d.Devices[i]
		for _, f := range dev.Features {
			if f.Hold == api.StateContested || f.Hold == api.StateRefused {
				p.text(0, "! %s %s: %s", dev.Device, f.Feature, f.Why)
			}
		}
		if dev.Lane != "" {
			p.text(0, "%s: covered flows take the lane %s (%s)", dev.Device, dev.Lane, dev.LaneState)
		}
	}
}

// nowText is a feature's state as `ethtool -k` shows it.
func nowText(f api.FeatureReport) string {
	text := onOff(f.Active)
	switch {
	case f.Fixed:
		text += " [fixed]"
	case f.Active != f.Wanted:
		text += " [requested " + onOff(f.Wanted) + "]"
	}
	return text
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func upText(up bool) string {
	if up {
		return "up"
	}
	return "down"
}

func deviceMTU(d *api.DeviceReport) string {
	if d.WasMTU != 0 {
		return fmt.Sprintf("%d, was %d", d.MTU, d.WasMTU)
	}
	return fmt.Sprint(d.MTU)
}

func carriesText(names []string) string {
	switch len(names) {
	case 0:
		return "-"
	case 1:
		return names[0]
	}
	return fmt.Sprintf("%d coverages", len(names))
}
