package agent

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// explain answers from the loop's state and the kernel's own route lookup.
func (a *Agent) explain(q Question) (*Explanation, error) {
	e := &Explanation{
		Version: ReportVersion, Dst: q.Dst.String(), Action: "none", Losers: []string{}, Costs: []StepCost{}, Notes: []string{},
		Live: !a.once, WouldChange: []string{},
	}
	rq, ans, err := a.lookup(q)
	if err != nil {
		return nil, noWay(rq, err)
	}
	src := q.From
	if !src.IsValid() {
		src = ans.PrefSrc
	}
	if src.IsValid() {
		e.From = src.String()
	}
	e.RouteMTU, e.RouteMTULocked, e.Table = ans.MTU, ans.MTULocked, uint32(ans.Table)
	if ans.PMTU != 0 {
		e.RouteMTU = ans.PMTU
		e.Notes = append(e.Notes, fmt.Sprintf("a path MTU of %d was learnt, for %s", ans.PMTU, plural(int(ans.Expires), "more second", "more seconds")))
	}
	if ans.Gateway.IsValid() {
		e.Gateway = ans.Gateway.String()
	}
	a.explainRoute(e, rq, ans)
	a.explainKeys(e, q)
	defer a.explainRest(e, q, ans.Oif)
	var ifID uint32
	if l := a.st.fib.Link(ans.Oif); l != nil {
		e.Device, e.DeviceMTU = l.Name, l.MTUFor(rq.Family)
		switch {
		case l.Kind == "xfrm" && l.External:
			e.AddNote(l.Name + " is in external mode: each packet, or its route, names the if_id of its policies")
		case l.Kind == "xfrm":
			ifID = l.IfID
		case l.Kind == "vti", l.Kind == "vti6":
			q.Mark = l.Encap.Key // vti_xmit looks up with its okey as mark
		}
	}
	if !src.IsValid() {
		e.Notes = append(e.Notes, "no source address is known: give one with --from")
		e.AddChange("a source address (--from): policies select by it")
		return e, nil
	}
	if a.loops(ans.Oif) && rq.Family == routes.IPv4 {
		e.AddNote("IPsec leaves alone what this host sends to itself by IPv4 (net.ipv4.conf.lo.disable_xfrm)")
		return e, nil
	}
	win, losers := a.st.db.Lookup(flowOf(q, src, ifID, int32(ans.Oif)), xfrmwatch.Out)
	for _, p := range losers {
		e.Losers = append(e.Losers, fmt.Sprintf("policy %d priority %d %s", p.Index, p.Priority, selectorText(p.Selector)))
	}
	if win == nil {
		if a.explainTunnel(e, ans.Oif) {
			return e, nil
		}
		if a.st.db.Default().Out == xfrmwatch.Block {
			e.Action = "block"
			e.AddNote("no policy matches, and the default action for output is block: the flow is dropped")
		}
		if ifID != 0 {
			e.Notes = append(e.Notes, fmt.Sprintf("no policy has if_id %#x and matches: %s drops the flow", ifID, e.Device))
		}
		return e, nil
	}
	a.explainPolicy(e, q, win)
	return e, nil
}

// loops reports whether a device is the loopback device.
func (a *Agent) loops(i routes.Ifindex) bool {
	l := a.st.fib.Link(i)
	return l != nil && l.Type == unix.ARPHRD_LOOPBACK
}

// noWay says in words what the kernel's error means: a route's type has its own (fib_props, net/ipv4/fib_semantics.c), a rule's action the same.
// What is forwarded is refused for more reasons.
func noWay(q routes.Query, err error) error {
	dst := q.Dst
	switch {
	case q.Iif != 0:
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("a blackhole route or rule drops what goes to %s: %w", dst, err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("a prohibit route or rule refuses what goes to %s: %w", dst, err)
	case errors.Is(err, unix.EHOSTUNREACH):
		return fmt.Errorf("an unreachable route refuses what goes to %s: %w", dst, err)
	}
	return fmt.Errorf("the kernel finds no route to %s: %w", dst, err)
}

// lookup asks the kernel for the route, and says how.
func (a *Agent) lookup(q Question) (routes.Query, routes.Answer, error) {
	rq := routes.Query{Family: routes.FamilyOf(q.Dst), Dst: q.Dst, Src: q.From, Mark: q.Mark}
	if q.Proto == protoTCP || q.Proto == protoUDP || q.Proto == 0 {
		// Others can't be asked for (rtm_getroute_parse_ip_proto, net/ipv4/netlink.c).
		rq.IPProto, rq.Dport = q.Proto, q.Port
	}
	ans, err := a.rt.Lookup(rq)
	if err == nil || !q.From.IsValid() {
		return rq, ans, err
	}
	// A source that is not ours comes in by the device that leads back to it.
	back, berr := a.rt.Lookup(routes.Query{Family: rq.Family, Dst: q.From})
	if berr != nil || back.Type == routes.Local {
		return rq, ans, err
	}
	rq.Iif = back.Oif
	if ans, berr = a.rt.Lookup(rq); berr != nil {
		return rq, ans, fmt.Errorf("%w (from %s it would have to be forwarded: %w)", err, q.From, berr)
	}
	return rq, ans, nil
}

func (a *Agent) explainPolicy(e *Explanation, q Question, p *xfrmwatch.Policy) {
	e.Policy, e.Selector = uint32(p.Index), selectorText(p.Selector)
	switch {
	case p.Action == xfrmwatch.Block:
		e.Action = "block"
		return
	case len(p.Templates) == 0:
		e.Action = "bypass"
		return
	}
	e.Action = "ipsec"
	if covers, _ := p.Covers(); !covers {
		e.AddNote(fmt.Sprintf("policy %d asks for neither ESP nor AH: what it does to the MTU is not known, and nothing is held off or locked for it", p.Index))
	}
	for _, c := range a.st.db.Coverage(p) {
		if !c.Selector.Dst.Contains(q.Dst) {
			continue
		}
		status := a.cost(e, c)
		a.changeSAs(e, c, status)
		if e.Coverage = a.verdictOf(c.ID); e.Coverage != nil {
			for _, n := range e.Coverage.Notes {
				e.AddNote(n)
			}
		}
		if e.Coverage == nil && status != xfrmwatch.MTUKnown {
			e.AddNote(status.String())
		}
		return
	}
}

// explainTunnel explains a flow that no policy takes itself, but whose tunnel's outer packets are
// covered. It is false if the device is no such tunnel.
func (a *Agent) explainTunnel(e *Explanation, oif routes.Ifindex) bool {
	i := slices.IndexFunc(a.lastP.Tunnels, func(t plan.Tunnel) bool { return t.Index == oif })
	if i < 0 {
		return false
	}
	t := a.lastP.Tunnels[i]
	e.Action = "ipsec"
	e.AddNote(fmt.Sprintf("%s wraps them: it is its outer packets that the policy takes", e.Device))
	for _, id := range t.Own {
		p, ok := a.st.db.Policy(id.Policy)
		if !ok {
			continue
		}
		e.Policy, e.Selector = uint32(p.Index), selectorText(p.Selector)
		e.Coverage = a.verdictOf(id)
		for _, c := range a.st.db.Coverage(p) {
			if c.ID == id {
				itemise(e, c, t.Path, plan.PathsOf(a.lastIn))
			}
		}
		break
	}
	if t.MTU > 0 {
		e.Costs = append([]StepCost{{
			Template: e.Device, SA: tunnelEnds(t.Encap), MTU: t.MTU + t.Encap.Header,
			Items: []CostItem{{Name: "outer headers", Bytes: t.Encap.Header}}, Inner: t.MTU,
		}}, e.Costs...)
		e.SetMTU(t.MTU, e.Dst)
	}
	return true
}

func tunnelEnds(e routes.Encap) string {
	ends := "any"
	if e.Remote.IsValid() {
		ends = e.Remote.String()
	}
	if e.Local.IsValid() {
		ends += " from " + e.Local.String()
	}
	return ends
}

// verdictOf is the report of a coverage, nil if the last plan has none.
func (a *Agent) verdictOf(id xfrmwatch.CoverageID) *CoverageReport {
	for i, v := range a.lastP.Complete().Verdicts {
		if v.ID == id && v.Key == nil {
			return &coverageReports(a.lastP.Complete().Verdicts[i:i+1], a.deviceName)[0]
		}
	}
	return nil
}

// cost itemises the coverage's transformations, and says what they leave of the route.
func (a *Agent) cost(e *Explanation, c xfrmwatch.Coverage) xfrmwatch.MTUStatus {
	paths := plan.PathsOf(a.lastIn)
	mtu, status := c.MTU(paths, e.PathMTU())
	if status == xfrmwatch.MTUKnown {
		e.SetMTU(mtu, e.Dst)
		itemise(e, c, e.PathMTU(), paths)
	}
	return status
}

// itemise adds what a coverage's transformations take from the path of the flow that the policy
// takes, with the SA that the kernel uses first.
func itemise(e *Explanation, c xfrmwatch.Coverage, path int, paths func(*xfrmwatch.SA) (int, bool)) {
	if len(c.Steps) == 0 {
		return
	}
	outer := path
	if last := c.Steps[len(c.Steps)-1]; last.Template.Mode == xfrmwatch.Tunnel {
		if m, ok := paths(last.SAs[0]); ok {
			outer = m
		}
	}
	for i := len(c.Steps) - 1; i >= 0; i-- {
		sa := c.Steps[i].SAs[0]
		items, inner, err := sa.Costs(outer)
		if err != nil {
			e.AddNote(err.Error())
			return
		}
		s := StepCost{
			Template: fmt.Sprintf("%s %s", protoName(sa.Proto), modeName(sa.Mode)),
			SA:       fmt.Sprintf("%s spi %#x reqid %d", sa.Dst, uint32(sa.SPI), sa.Reqid), MTU: outer, Inner: inner,
		}
		for _, it := range items {
			s.Items = append(s.Items, CostItem{Name: it.Name, Bytes: it.Bytes})
		}
		s.Losers = otherSAs(c.Steps[i].SAs, outer)
		e.Costs = append([]StepCost{s}, e.Costs...)
		outer = inner
	}
}

func selectorText(s xfrmwatch.Selector) string {
	t := fmt.Sprintf("src %s dst %s", s.Src, s.Dst)
	if s.Proto != 0 {
		t += fmt.Sprintf(" proto %d", s.Proto)
	}
	if s.Sport.Mask != 0 {
		t += fmt.Sprintf(" sport %d", s.Sport.Port)
	}
	if s.Dport.Mask != 0 {
		t += fmt.Sprintf(" dport %d", s.Dport.Port)
	}
	return t
}

func protoName(p xfrmwatch.Proto) string {
	switch p {
	case xfrmwatch.ESP:
		return "esp"
	case xfrmwatch.AH:
		return "ah"
	case xfrmwatch.Comp:
		return "comp"
	}
	return fmt.Sprintf("proto %d", p)
}

func modeName(m xfrmwatch.Mode) string {
	switch m {
	case xfrmwatch.Transport:
		return "transport"
	case xfrmwatch.Tunnel:
		return "tunnel"
	case xfrmwatch.BEET:
		return "beet"
	}
	return fmt.Sprintf("mode %d", m)
}
