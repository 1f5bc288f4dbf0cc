package agent

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"tsoagent/agent/netns"
	"tsoagent/routes"
)

// A restorer gives back what was changed on devices that were moved to namespaces of the configuration, while no agent runs:
// one for the namespace takes the claims over, gives them back and ends, while the one that misses the device waits.
type restorer struct {
	ctx     context.Context // that of RestoreAll
	cfg     Config          // with its defaults
	log     *slog.Logger
	version string
	host    *netns.Namespace
	done    []*Restored
}

var _ others = (*restorer)(nil)

func (r *restorer) announce() {}

// carry looks for the namespace where a device is, and gives back there.
func (r *restorer) carry(from *Agent, x arrival) (c carried) {
	var spec string
	places := 0
	r.each(func(name string, ns *netns.Namespace, configured bool) {
		switch {
		case from.ns != nil && ns.ID() == from.ns.ID():
		case x.lost:
			l, err := findNIC(ns, x.dev.nicKey())
			switch {
			case err != nil:
				r.log.Warn("the NICs of a network namespace can't be read", "netns", name, "err", err)
			case l != nil && configured:
				spec, x.dev.To, places = name, routes.Place{Index: l.Index}, places+1
			case l != nil:
				c.where, c.name = name, l.Name
			}
		case from.ids != nil && configured:
			if id, err := from.ids.Of(ns); err == nil && id == x.dev.To.Netnsid {
				spec, places = name, 1
			}
		}
	})
	if places != 1 { // several NICs with one address can't be told apart
		return c
	}
	x.until = time.Now() // it is there now, or not at all
	out, err := restoreFrom(r.ctx, spec, r.cfg, r.log.With("netns", spec), r.version, false, func(a *Agent) error {
		a.others, a.st.arrivals = r, []arrival{x}
		return a.open()
	})
	if out != nil {
		r.done = append(r.done, out)
	}
	if err != nil {
		return carried{why: err.Error()}
	}
	return carried{offered: true}
}

// each calls fn with the namespaces of the configuration that are there, and with the host's in any case.
func (r *restorer) each(fn func(name string, ns *netns.Namespace, configured bool)) {
	seen := []netns.ID{r.host.ID()}
	host := r.cfg.Namespaces.host()
	for _, spec := range r.cfg.Namespaces.specs() {
		ns, err := netns.Open(netns.Path(spec))
		if err != nil {
			continue // it is not there
		}
		host = host || ns.ID() == r.host.ID()
		if !slices.Contains(seen, ns.ID()) {
			seen = append(seen, ns.ID())
			fn(spec, ns, true)
		}
		_ = ns.Close()
	}
	fn(netns.Host, r.host, host)
}

// buried looks for what is missed in a namespace that is gone, and removes its journal. It says what was not found.
func (r *restorer) buried(cookie uint64) ([]string, error) {
	g, err := raiseGhost(r.cfg, r.log, r.version, cookie, r)
	if g == nil || err != nil {
		return nil, err
	}
	g.offerAgain(true) // the only look
	g.hear()
	return g.movedFindings(), g.bury()
}
