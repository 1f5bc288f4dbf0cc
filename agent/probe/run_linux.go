package probe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"tsoagent/ethtool"
)

// Config says what to probe. The zero value is the default: every kind, DefaultSA, quickly.
type Config struct {
	// Kinds are those to probe (Kinds), none for all.
	Kinds []string
	// SAs are named by SANames or by SAName; none for DefaultSA.
	SAs []string
	// Thorough takes five times as long for each run, and more of them.
	Thorough bool
	// LoadedOnly leaves out the kinds whose module would have to be loaded. Loading some of them
	// adds fallback devices (gre0, tunl0, sit0 …) to every network namespace, the machine's own
	// among them.
	LoadedOnly bool
	// Progress is told of each case that was measured. Nil for nothing.
	Progress func(Progress)
}

// Progress tells how far the probe is.
type Progress struct {
	// Done of Total cases are measured.
	Done, Total int
	// Case is the latest one, nil at the beginning.
	Case *Case
	// Next names the one that begins, "" at the end.
	Next string
}

// Validate says whether all kinds and SAs are known.
func (c Config) Validate() error {
	_, err := tasksFor(c.Kinds, c.SAs)
	return err
}

// Run measures. It needs CAP_SYS_ADMIN for the network namespaces that it makes and
// CAP_NET_ADMIN in them, and touches no other. What the kernel can't do is a verdict and no
// error. When the context ends, everything is gone, and so is the result.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	tasks, err := tasksFor(cfg.Kinds, cfg.SAs)
	if err != nil {
		return nil, fmt.Errorf("probe: %w", err)
	}
	before, err := ReadIdentity()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	r := &Result{Version: Version}
	tell := func(done int, c *Case) {
		p := Progress{Done: done, Total: len(tasks), Case: c}
		if done < len(tasks) {
			p.Next = tasks[done].String()
		}
		if cfg.Progress != nil {
			cfg.Progress(p)
		}
	}
	tell(0, nil)
	for i, t := range tasks {
		c := Case{Kind: t.kind, Outer: t.outer, Mode: t.mode, SA: t.suite.name()}
		if name := notLoaded(t.kind, before); cfg.LoadedOnly && name != "" {
			c.Verdict, c.Why = Impossible, fmt.Sprintf("module %s is not loaded, and was not to be", name)
		} else if err := c.probe(ctx, before, t, cfg); err != nil {
			return nil, fmt.Errorf("probe: %s: %w", t, err)
		}
		r.Cases = append(r.Cases, c)
		tell(i+1, &c)
	}
	// Read again: the first SA and the first device of a kind load their modules.
	if r.Kernel, err = ReadIdentity(); err != nil {
		return nil, err
	}
	r.Loaded = loadedSince(before, r.Kernel)
	r.Time = time.Now().UTC().Truncate(time.Second)
	r.Seconds = float64(time.Since(start).Milliseconds()) / 1000
	return r, nil
}

// notLoaded names the module of a kind that would have to be loaded.
func notLoaded(kind string, id Identity) string {
	for _, name := range kindModules[kind] {
		if id.Modules[name] == Available {
			return name
		}
	}
	return ""
}

// probe measures a case in all its shapes.
func (c *Case) probe(ctx context.Context, k Identity, t task, cfg Config) error {
	b := quick
	if cfg.Thorough {
		b = thorough
	}
	for _, s := range t.shapes {
		paths, err := probeShape(ctx, k, s, t.mode, t.suite, b)
		if err != nil {
			return err
		}
		c.Paths = append(c.Paths, paths...)
	}
	c.Verdict, c.Why = judgeCase(c.Paths)
	return nil
}

// probeShape sets a tunnel up and measures it for each inner family. Errors of the context and
// of permissions end the probe; others are the path's verdict.
func probeShape(ctx context.Context, k Identity, s shape, mode string, u suite, b bounds) ([]Path, error) {
	l, err := newLab(ctx, k, s, mode, u)
	if err == nil {
		defer l.close()
	}
	var paths []Path
	for _, f := range s.inner {
		p := Path{Variant: s.variant, Inner: f}
		if err == nil {
			p.tell(l.measure(ctx, &p, b))
		} else {
			p.tell(err)
		}
		if fatal := errors.Join(ctx.Err(), permission(err)); fatal != nil {
			return nil, fatal
		}
		paths = append(paths, p)
	}
	return paths, nil
}

// permission is err if it is one of permissions.
func permission(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return err
	}
	return nil
}

// tell makes a verdict out of an error.
func (p *Path) tell(err error) {
	if err == nil {
		return
	}
	p.Verdict, p.Why = Unclear, oneLine(err)
	if im := (*impossibleError)(nil); errors.As(err, &im) {
		p.Verdict = Impossible
	}
}

// oneLine is the text of errors that were joined.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// measure compares TCP with TSO on and off, and then UDP_SEGMENT.
func (l *lab) measure(ctx context.Context, p *Path, b bounds) error {
	for pair := 0; pair < b.pairs || pair < b.morePairs && undecided(p.TSOOn, p.TSOOff); pair++ {
		// Alternating, and the other way round each time, so that drift cancels.
		first, second := true, false
		if pair%2 == 1 {
			first, second = second, first
		}
		for _, on := range []bool{first, second} {
			if err := l.tcpRun(ctx, p, on, b); err != nil {
				return err
			}
		}
	}
	p.Verdict, p.Why = judgeTCP(p.TSOOn, p.TSOOff)
	p.UDP = l.measureUDP(ctx, p.Inner)
	return nil
}

// tcpRun adds one run with TSO on or off.
func (l *lab) tcpRun(ctx context.Context, p *Path, on bool, b bounds) error {
	feature := ethtool.TCPSegmentation
	if p.Inner == IPv6 {
		feature = ethtool.TCP6Segmentation
	}
	err := l.set(feature, on, ethtool.TCPSegmentation, ethtool.TCP6Segmentation, ethtool.TCPECNSegmentation)
	if err != nil {
		return err
	}
	run, err := l.tcp(ctx, p.Inner, on, b)
	if err != nil {
		return fmt.Errorf("TSO %s: %w", onOff(on), err)
	}
	if on {
		p.TSOOn.add(run)
	} else {
		p.TSOOff.add(run)
	}
	return nil
}

// measureUDP compares UDP_SEGMENT with tx-udp-segmentation on and off, TSO being on.
func (l *lab) measureUDP(ctx context.Context, inner Family) *UDP {
	u := &UDP{}
	for _, on := range []bool{true, false} {
		burst, err := Burst{}, l.set(ethtool.UDPSegmentation, on, ethtool.UDPSegmentation)
		if err == nil {
			burst, err = l.udpBurst(ctx, inner)
		}
		if err != nil {
			p := Path{}
			p.tell(fmt.Errorf("tx-udp-segmentation %s: %w", onOff(on), err))
			u.Verdict, u.Why = p.Verdict, p.Why
			return u
		}
		if on {
			u.On = burst
		} else {
			u.Off = burst
		}
	}
	u.Verdict, u.Why = judgeUDP(u.On, u.Off)
	return u
}

// set switches features of the sender's tunnel device. The one that matters must be as wanted
// afterwards.
func (l *lab) set(matters ethtool.Feature, on bool, features ...ethtool.Feature) error {
	want := map[ethtool.Feature]bool{}
	for _, f := range features {
		want[f] = on
	}
	dev := ethtool.Device{Index: ethtool.Ifindex(l.tunnel[sender]), Name: tunnelName}
	f, err := l.features.Set(dev, want)
	if refused := (*ethtool.RefusedError)(nil); err != nil && !errors.As(err, &refused) {
		return err
	}
	state, known := f.Get(matters)
	switch {
	case known && state.Active == on:
		return nil
	case !known:
		return &impossibleError{fmt.Sprintf("this kernel has no feature %s", matters), err}
	case !state.Changeable:
		return &impossibleError{fmt.Sprintf("nothing to switch: %s is %s on such a device", matters, state), err}
	}
	return errors.Join(fmt.Errorf("%s is %s", matters, state), err)
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}
