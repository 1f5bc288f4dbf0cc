package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/journal"
	"tsoagent/agent/netns"
	"tsoagent/agent/verify"
	"tsoagent/wire"
)

// The time for which verify looks.
const (
	leastLook = 100 * time.Millisecond
	mostLook  = time.Hour
)

func verifyCommand() *cli.Command {
	return &cli.Command{
		Name: "verify", Usage: "what really leaves by devices: are covered flows cut, and others not? exit 1 if not; works without an agent", ArgsUsage: "[DEV…]",
		OnUsageError: usage, Action: runVerify,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "for", Value: 5 * time.Second, Usage: "look for this `TIME`, as in 500ms, 10s or 2m"},
		},
	}
}

func runVerify(c *cli.Context) error {
	cfg, ns, err := call(c)
	if err != nil {
		return err
	}
	d := c.Duration("for")
	if d < leastLook || d > mostLook {
		return cli.Exit(fmt.Sprintf("--for: %v is not between %v and %v", d, leastLook, mostLook), exitUsage)
	}
	w, err := verifyWorld(c.Context, cfg, ns)
	if err != nil {
		return err
	}
	r, err := verified(c.Context, w, ns, c.Args().Slice(), d)
	if err != nil {
		return err
	}
	if !r.OK {
		// What was wrong can be what has changed meanwhile.
		if now, err := verifyWorld(context.WithoutCancel(c.Context), cfg, ns); err == nil && !reflect.DeepEqual(now, w) {
			r.Changed = true
			r.Notes = append(r.Notes, "policies, SAs, keys or devices have changed meanwhile: look again before you believe it")
		}
	}
	if err := show(c, r, func(p page) { verifyTable(p, r) }); err != nil {
		return err
	}
	if !r.OK {
		return cli.Exit("", exitFailed)
	}
	return nil
}

// verifyWorld asks the agent what packets are sorted by, or reads the kernel where none runs.
func verifyWorld(ctx context.Context, cfg agent.Config, ns string) (*verify.World, error) {
	w, err := client.New(cfg.RunDir).WorldIn(ctx, ns)
	if errors.Is(err, client.ErrNoAgent) {
		return agent.VerifyWorldIn(ctx, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version())
	}
	return w, err
}

// inNetns runs fn on a thread that is in a namespace, "" for the caller's own.
func inNetns(ns string, fn func() error) error {
	path := netns.Path(cmp.Or(ns, netns.Host))
	if path == "" {
		return fn()
	}
	n, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer n.Close()
	return n.Do(fn)
}

// nothingToLookAt is said where no device is named and none is known.
const nothingToLookAt = "nothing is covered, or no way leads there: nothing to look at; with the name of a device it is looked at all the same"

// verified looks at devices, or where none is named at those that covered flows leave by.
func verified(ctx context.Context, w *verify.World, ns string, names []string, d time.Duration) (*verify.Result, error) {
	var notes []string
	named := len(names) > 0
	if !named {
		names = w.Carriers
	}
	names = once(names)
	if len(names) == 0 {
		return nothingSeen(w, nothingToLookAt), nil
	}
	if len(names) > wire.MostTaps {
		notes = append(notes, fmt.Sprintf("looked at %d of %d devices: name others to look at those", wire.MostTaps, len(names)))
		names = names[:wire.MostTaps]
	}
	var taps []*wire.Tap
	defer func() {
		for _, t := range taps {
			_ = t.Close()
		}
	}()
	var ports []verify.Port
	var local []netip.Addr
	err := inNetns(ns, func() (err error) {
		if err := sameNetns(w.Cookie); err != nil {
			return err
		}
		if local, err = localAddresses(); err != nil {
			return err
		}
		for _, name := range names {
			port, tap, err := openPort(name, len(names))
			switch {
			case errors.Is(err, errNoDevice) && named:
				return cli.Exit(err.Error(), exitUsage)
			case errors.Is(err, errNoDevice):
				notes = append(notes, name+" went away before it could be looked at")
				continue
			case err != nil:
				return err
			}
			ports, taps = append(ports, port), append(taps, tap)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(taps) == 0 {
		r := nothingSeen(w, "what covered flows left by has gone: look again")
		r.Notes = notes
		return r, nil
	}
	sorter := verify.NewSorter(w, ports, local)
	bar := progressOn(os.Stderr)
	start := time.Now()
	packets := 0
	err = wire.Look(ctx, taps, d, func(i int, f *wire.Frame) {
		packets++
		sorter.Add(i, f)
	}, func() {
		bar.look(min(time.Since(start), d), d, packets)
	})
	took := min(time.Since(start), d)
	bar.end()
	if err != nil {
		return nil, err
	}
	stats := make([]wire.Stats, len(taps))
	for i, t := range taps {
		stats[i] = t.Stats()
	}
	r := sorter.Result(took.Seconds(), stats)
	r.Notes = append(notes, r.Notes...)
	return r, nil
}

// nothingSeen is a result where nothing could be looked at.
func nothingSeen(w *verify.World, says string) *verify.Result {
	return &verify.Result{
		Version: verify.Version, Netns: w.Netns, Live: w.Live, Stale: w.Stale, OK: true, Devices: []verify.DeviceResult{}, Says: says,
	}
}

// once leaves out what was there before.
func once(names []string) []string {
	var out []string
	for _, n := range names {
		if !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

// sameNetns says whether the calling thread is where the agent's answer is true.
func sameNetns(cookie uint64) error {
	scope, err := journal.ReadScope()
	if err == nil && cookie != 0 && scope.NetnsCookie != cookie {
		return errors.New("the agent answers for another network namespace than this one: name one with --netns, or run it where the agent was started")
	}
	return nil
}

// localAddresses are those of the calling thread's namespace.
func localAddresses() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("the addresses of this host: %w", err)
	}
	var out []netip.Addr
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				out = append(out, addr.Unmap())
			}
		}
	}
	return out, nil
}

// errNoDevice is a device that isn't there: wrong usage where it was named, else one that went away.
var errNoDevice = errors.New("there is no device")

// openPort opens a tap on a device of the calling thread's namespace, one of of.
func openPort(name string, of int) (verify.Port, *wire.Tap, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return verify.Port{}, nil, fmt.Errorf("%w %q", errNoDevice, name)
	}
	tap, err := wire.Open(link.Index, of)
	if errors.Is(err, unix.ENODEV) {
		return verify.Port{}, nil, fmt.Errorf("%w %q any more", errNoDevice, name)
	}
	if errors.Is(err, os.ErrPermission) {
		return verify.Port{}, nil, fmt.Errorf("CAP_NET_RAW is missing: run it as root: %w", err)
	}
	if err != nil {
		return verify.Port{}, nil, fmt.Errorf("look at %s: %w", name, err)
	}
	port := verify.Port{Index: int32(link.Index), Name: name, MTU: link.MTU}
	for _, which := range []string{name, "all"} { // either will do (IN_DEV_ORCONF, include/linux/inetdevice.h)
		if b, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + which + "/disable_xfrm"); err == nil {
			port.NoXFRM = port.NoXFRM || strings.TrimSpace(string(b)) != "0"
		}
	}
	return port, tap, nil
}

// verifyTable has a line for each class of packets, and one that says what to think of all.
func verifyTable(p page, r *verify.Result) {
	if r.Netns != "" {
		p.text(0, "network namespace %s", r.Netns)
	}
	if !r.Live {
		p.text(0, "no agent runs; what is covered was read from the kernel")
	}
	rows := [][]string{{"DEVICE", "CLASS", "PACKETS", "BYTES", "SUPER", "LARGEST", "VERDICT"}}
	more := 0
	for _, d := range r.Devices {
		for i := range d.Classes {
			if len(rows) > screenOfClasses {
				more++
				continue
			}
			rows = append(rows, verifyRow(d.Device, &d.Classes[i]))
		}
	}
	if len(rows) > 1 {
		p.text(0, "what left in %s", verify.Period(r.Seconds))
		p.table(rows)
		fmt.Fprintln(p)
	}
	if more > 0 {
		p.text(0, "%s in -o json", count(more, "more class is", "more classes are"))
	}
	shown := 0
	for _, d := range r.Devices {
		for i := range d.Classes {
			c := &d.Classes[i]
			shown++
			switch {
			case c.Wrong:
				p.text(0, "! %s, %s: %s", d.Device, className(c), c.Says)
			case c.Class != verify.Other && c.Says != verdictWord(c) && shown <= screenOfClasses:
				p.text(0, "- %s, %s: %s", d.Device, className(c), c.Says)
			}
		}
	}
	for _, n := range r.Notes {
		p.text(0, "! %s", n)
	}
	if r.Stale {
		p.text(0, "! the agent lost events and is reading them again: what is covered may be wrong")
	}
	p.text(0, "%s", r.Says)
}

// screenOfClasses is how many classes are shown to a person.
const screenOfClasses = 40

func verifyRow(device string, c *verify.ClassResult) []string {
	if c.State == verify.StateNothing {
		return []string{device, className(c), "0", "-", "-", "-", verdictWord(c)}
	}
	return []string{device, className(c), fmt.Sprint(c.Packets), size(c.Bytes), fmt.Sprint(c.SuperPackets), fmt.Sprint(c.Largest), verdictWord(c)}
}

// className is what a person calls a class.
func className(c *verify.ClassResult) string {
	name := c.Class
	if c.Class == verify.Covered && c.Policy != 0 {
		name = fmt.Sprintf("policy %d", c.Policy)
		if c.MorePolicies > 0 {
			name += fmt.Sprintf(" +%d", c.MorePolicies)
		}
	}
	if c.Class == verify.Clear && c.Policy != 0 {
		name = fmt.Sprintf("policy %d, in clear", c.Policy)
	}
	if c.As != "" {
		name += ", " + strings.ToUpper(c.As)
	}
	if c.Family == "ipv6" {
		name += ", IPv6"
	}
	return name
}

// verdictWord is a verdict in the room that a table has for it.
func verdictWord(c *verify.ClassResult) string {
	switch {
	case c.State == verify.StateNothing:
		return "nothing seen"
	case c.Wrong && c.Class == verify.Uncovered:
		return "CUT"
	case c.Wrong && c.Class == verify.Clear:
		return "NOT COVERED"
	case c.Wrong:
		return "NOT cut"
	case c.State == verify.StateWhole:
		return "super-packets"
	case c.State == verify.StateSmall:
		return "too small to tell"
	case c.State == verify.StateSeen:
		return "-"
	}
	return c.State
}

// size is a number of bytes for people.
func size(n uint64) string {
	const kilo = 1000
	units := []string{"B", "kB", "MB", "GB", "TB", "PB", "EB"}
	v, u := float64(n), 0
	for v >= kilo-0.5 && u < len(units)-1 {
		v, u = v/kilo, u+1
	}
	if u == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.3g %s", v, units[u])
}
