package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"tsoagent/agent/api"
	"tsoagent/ethtool"
	"tsoagent/l2tp"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// What happens is told with its cause: what the kernel told right before the round that did it.
//
//	batch ── noteCause ──> causes ──┐            did, failed, notice
//	                                └─ round ──> api.Event ──> ring ──> GET /v1/events
//
// Of a batch the first few changes are kept as they came, and the rest is counted: a storm costs the loop nothing
// but that. They are put into words only where something is done.

// A cause is one thing that the kernel told. It is put into words late.
type cause struct {
	event any    // of a watcher
	verb  string // what it did
	at    time.Time
	quiet bool // one of those that a storm has a million of: routes, addresses, nexthops
	told  bool // an earlier round has done something for it

	about, text string // in words, empty before they are needed
}

// maxCauses is how many things of a batch are kept, maxTold how many an event names, and maxOfRound how many
// events of a sort the rounds of one cause make: the rest is counted.
const (
	maxCauses  = 32
	maxTold    = 3
	maxOfRound = 100
)

// triggers are what led to a round. It belongs to the loop.
type triggers struct {
	kept  []cause
	more  int    // beyond those that are kept
	order string // what goes before all that the kernel tells: a start, a stop, what a person asked for; else empty

	made map[alike]int // how many events were made of them, or only counted
}

// alike is what the same events have in common.
type alike struct{ kind, what string }

func (c *triggers) add(event any, verb string, at time.Time, quiet bool) {
	if len(c.kept) == maxCauses {
		c.more++
		return
	}
	c.kept = append(c.kept, cause{event: event, verb: verb, at: at, quiet: quiet})
}

// settle ends a round. What it has written is looked at again, and what follows from that has the same causes.
func (c *triggers) settle(goesOn, ordered bool) {
	if !ordered && !goesOn {
		c.order = ""
	}
	if goesOn {
		for i := range c.kept {
			c.kept[i].told = true
		}
		return
	}
	clear(c.kept)
	clear(c.made)
	c.kept, c.more = c.kept[:0], 0
}

// noteXFRM, noteRoute and noteFeatures note what a watcher tells, before the mirror takes it: not what a dump
// repeats, and not our own writes.
func (a *Agent) noteXFRM(ev xfrmwatch.Event, at time.Time) {
	c := &a.st.causes
	switch ev := ev.(type) {
	case xfrmwatch.PolicySet:
		if ev.Dumped || ev.Policy.Dir != xfrmwatch.Out {
			return
		}
		verb := "added"
		if _, known := a.st.db.Policy(ev.Policy.Index); known {
			verb = "changed"
		}
		c.add(ev, verb, at, false)
	case xfrmwatch.PolicyGone:
		if _, known := a.st.db.Policy(ev.Index); known {
			c.add(ev, "gone", at, false)
		}
	case xfrmwatch.SASet:
		if ev.Dumped {
			return
		}
		verb := "added"
		if ev.Update {
			verb = "changed"
		}
		c.add(ev, verb, at, false)
	case xfrmwatch.SAGone:
		c.add(ev, "gone", at, false)
	case xfrmwatch.SADying:
		c.add(ev, "soon to expire", at, false)
	case xfrmwatch.DefaultSet:
		c.add(ev, "changed", at, false)
	case xfrmwatch.Lost:
		c.add(ev, "lost", at, true)
	}
}

func (a *Agent) noteRoute(ev routes.Event, at time.Time) {
	c := &a.st.causes
	if l, ok := ev.(routes.Lost); ok {
		c.add(l, "lost", at, true)
	}
	if a.st.dumping {
		return
	}
	switch ev := ev.(type) {
	case routes.LinkSet:
		if verb := linkChange(a.st.fib.Link(ev.Link.Index), ev.Link); verb != "" {
			c.add(ev, verb, at, false)
		}
	case routes.LinkGone:
		if l := a.st.fib.Link(ev.Index); l != nil {
			c.add(routes.LinkSet{Link: l}, "gone", at, false)
		}
	case routes.AddrSet:
		c.add(ev, "added", at, true)
	case routes.AddrGone:
		c.add(ev, "gone", at, true)
	case routes.RuleSet:
		if !a.cfg.Plan.OwnRule(ev.Rule) {
			c.add(ev, "added", at, false)
		}
	case routes.RuleGone:
		if !a.cfg.Plan.OwnRule(ev.Rule) {
			c.add(ev, "gone", at, false)
		}
	case routes.NexthopSet:
		c.add(ev, "set", at, true)
	case routes.NexthopGone:
		c.add(ev, "gone", at, true)
	case routes.RouteSet:
		if a.ours(ev.Origin) {
			return
		}
		verb := "added"
		if ev.Replace {
			verb = "replaced"
		}
		c.add(ev, verb, at, true)
	case routes.RouteGone:
		if !a.ours(ev.Origin) {
			c.add(ev, "gone", at, true)
		}
	}
}

func (a *Agent) ours(o routes.Origin) bool {
	return a.rt != nil && o.Port != 0 && o.Port == a.rt.Port()
}

// linkChange says what is new about a device, as far as it matters here; empty if nothing is.
func linkChange(old, now *routes.Link) string {
	switch {
	case old == nil:
		return "appeared"
	case old.Name != now.Name:
		return "renamed from " + old.Name
	case old.Up != now.Up && now.Up:
		return "up"
	case old.Up != now.Up:
		return "down"
	case old.MTU != now.MTU:
		return fmt.Sprintf("mtu %d", now.MTU)
	case *old != *now:
		return "changed"
	}
	return ""
}

func (a *Agent) noteFeatures(ev ethtool.Event, at time.Time) {
	c := &a.st.causes
	switch ev := ev.(type) {
	case ethtool.Lost:
		c.add(ev, "lost", at, true)
	case ethtool.FeaturesSet:
		// What we set was taken from the answer already.
		if have := a.st.features[routes.Ifindex(ev.Features.Index)]; a.st.fresh == nil && have != nil && !have.Equal(ev.Features) {
			c.add(ev, featureChange(have, ev.Features), at, true)
		}
	}
}

// featureChange says what is new about a device's features.
func featureChange(old, now *ethtool.Features) string {
	first, more := "", 0
	for name, s := range now.All() {
		was, _ := old.Get(name)
		switch {
		case was == s:
		case first != "":
			more++
		case was.Wanted != s.Wanted:
			first = fmt.Sprintf("%s turned %s", name, onOff(s.Wanted))
		default:
			first = fmt.Sprintf("%s is %s", name, s)
		}
	}
	if more > 0 {
		first += fmt.Sprintf(" and %d more", more)
	}
	return cmp.Or(first, "features changed")
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// words are a cause as a person reads it, and what it is about, as an action names that.
func (a *Agent) words(c cause) (about, text string) {
	switch ev := c.event.(type) {
	case xfrmwatch.PolicySet:
		about = fmt.Sprintf("policy %d", ev.Policy.Index)
	case xfrmwatch.PolicyGone:
		about = fmt.Sprintf("policy %d", ev.Index)
	case xfrmwatch.SASet:
		about = saText(ev.SA.Key)
	case xfrmwatch.SAGone:
		about = saText(ev.Key)
	case xfrmwatch.SADying:
		about = saText(ev.Key)
	case xfrmwatch.DefaultSet:
		about = "the default policy"
	case xfrmwatch.Lost:
		return "", "events of xfrm were lost"
	case routes.Lost:
		return "", "events of routes were lost"
	case ethtool.Lost:
		return "", "events of ethtool were lost"
	case routes.LinkSet:
		about = ev.Link.Name
		return about, "link " + about + " " + c.verb
	case routes.AddrSet:
		about = fmt.Sprintf("address %s of %s", ev.Addr.Prefix, a.deviceName(ev.Addr.Ifindex))
	case routes.AddrGone:
		about = fmt.Sprintf("address %s of %s", ev.Addr.Prefix, a.deviceName(ev.Addr.Ifindex))
	case routes.RuleSet:
		about = fmt.Sprintf("rule %d: %s", ev.Rule.Priority, ruleText(*ev.Rule))
	case routes.RuleGone:
		about = fmt.Sprintf("rule %d: %s", ev.Rule.Priority, ruleText(*ev.Rule))
	case routes.NexthopSet:
		about = fmt.Sprintf("nexthop %d", ev.Nexthop.ID)
	case routes.NexthopGone:
		about = fmt.Sprintf("nexthop %d", ev.ID)
	case routes.RouteSet:
		about = ev.Route.Key().String()
		return about, "route " + about + " " + c.verb
	case routes.RouteGone:
		about = ev.Route.Key().String()
		return about, "route " + about + " " + c.verb
	case ethtool.FeaturesSet:
		about = ev.Features.Name
		return about, about + ": " + c.verb
	case sockopt.KeysSet:
		return "", "TCP keys " + c.verb
	case l2tp.SessionsSet:
		return "", "L2TP sessions " + c.verb
	}
	return about, about + " " + c.verb
}

func saText(k xfrmwatch.SAKey) string { return fmt.Sprintf("SA %#x to %s", uint32(k.SPI), k.Dst) }

// because puts the causes of an action into words: those that are about its objects, else all. since is when the
// first of them came, zero without one.
func (a *Agent) because(attrs map[string]string) (text string, since time.Time) {
	c := &a.st.causes
	if c.order != "" {
		return c.order, time.Time{}
	}
	about := strings.Split(attrs["because"], ", ")
	for _, key := range []string{"route", "device"} {
		if v := attrs[key]; v != "" {
			about = append(about, v)
		}
	}
	type inWords struct {
		text string
		at   time.Time
	}
	var all, direct []inWords
	for i := range c.kept {
		one := &c.kept[i]
		if one.text == "" {
			one.about, one.text = a.words(*one)
		}
		of, text := one.about, one.text
		if slices.ContainsFunc(all, func(w inWords) bool { return w.text == text }) {
			continue
		}
		all = append(all, inWords{text, one.at})
		// An SA's coverage is called "policy 17 to PEER".
		if of != "" && slices.ContainsFunc(about, func(s string) bool { return s == of || strings.HasPrefix(s, of+" to ") }) {
			direct = append(direct, inWords{text, one.at})
		}
	}
	told, more := all, c.more
	if len(direct) > 0 {
		told, more = direct, 0
	}
	var names []string
	for i, w := range told {
		if since.IsZero() || w.at.Before(since) {
			since = w.at
		}
		if i < maxTold {
			names = append(names, w.text)
		} else {
			more++
		}
	}
	text = strings.Join(names, ", ")
	if more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text, since
}

// event keeps what happened. args are a log's keys and values.
func (a *Agent) event(kind, what string, args ...any) { a.eventAt(a.clock(), kind, what, args...) }

func (a *Agent) eventAt(at time.Time, kind, what string, args ...any) {
	c := &a.st.causes
	if kind == api.EventDone || kind == api.EventFailed {
		if c.made == nil {
			c.made = map[alike]int{}
		}
		if c.made[alike{kind, what}]++; c.made[alike{kind, what}] > maxOfRound {
			return
		}
	}
	e := api.Event{At: at, Kind: kind, What: what, Attrs: attrsOf(args)}
	e.Text = eventText(what, args)
	if kind == api.EventState {
		a.ring.add(e)
		return
	}
	var since time.Time
	if e.Cause, since = a.because(e.Attrs); !since.IsZero() {
		e.Seconds = max(e.At.Sub(since).Seconds(), 0)
	}
	if e.Cause == "" && kind == api.EventDone && slices.Contains(givenBack[:], what) {
		e.Cause = "its cause is gone, and it has been quiet"
	}
	if kind == api.EventNotice && what == eventsLost {
		e.Cause, e.Seconds = "", 0 // itself
	}
	a.ring.add(e)
}

const eventsLost = "events were lost, reading again"

// settleCauses ends a round. What it has written is looked at again, and that has the same causes.
func (a *Agent) settleCauses(goesOn bool) {
	c := &a.st.causes
	if !goesOn && len(c.made) > 0 {
		for _, s := range slices.SortedFunc(maps.Keys(c.made), func(a, b alike) int {
			return cmp.Or(strings.Compare(a.kind, b.kind), strings.Compare(a.what, b.what))
		}) {
			if n := c.made[s] - maxOfRound; n > 0 {
				delete(c.made, s)
				level := slog.LevelInfo
				if s.kind == api.EventFailed {
					level = slog.LevelWarn
				}
				a.log.Log(context.Background(), level, s.what, "more", n)
				a.event(s.kind, s.what, "more", n)
			}
		}
	}
	c.settle(goesOn, a.goal != protect)
}

// givenBack are the actions that wait until it has been quiet.
var givenBack = [...]string{
	"feature given back", "mtu given back", "rule deleted", "clone deleted", "lane taken away", "clamp deleted", "device mtu given back",
}

func attrsOf(args []any) map[string]string {
	if len(args) == 0 {
		return nil
	}
	out := make(map[string]string, len(args)/2)
	for i := 0; i+1 < len(args); i += 2 {
		out[fmt.Sprint(args[i])] = fmt.Sprint(args[i+1])
	}
	return out
}

// eventText is a line of a log as a person reads it: "mtu locked: route 10.2.0.0/16, mtu 1446". Why something was
// done is told as the cause, or is in the report.
func eventText(what string, args []any) string {
	var b strings.Builder
	sep := ": "
	for i := 0; i+1 < len(args); i += 2 {
		key, value := fmt.Sprint(args[i]), fmt.Sprint(args[i+1])
		if key == "because" || value == "" || key == "mtu" && value == "0" {
			continue
		}
		b.WriteString(sep)
		sep = ", "
		switch key {
		case "more":
			value += " more"
		case "err", "why":
		case "device", "route", "feature", "selectors":
			// What they are is seen.
		default:
			b.WriteString(strings.ReplaceAll(key, "_", " ") + " ")
		}
		b.WriteString(strings.ReplaceAll(value, "\n", "; "))
	}
	return what + b.String()
}

// notice logs what a person may want to look at, and keeps it.
func (a *Agent) notice(what string, args ...any) {
	a.tellDone()
	a.log.Warn(what, args...)
	a.event(api.EventNotice, what, args...)
}

// noted is notice for what is no reason to worry.
func (a *Agent) noted(what string, args ...any) {
	a.tellDone()
	a.log.Info(what, args...)
	a.event(api.EventNotice, what, args...)
}

// says logs what the agent itself is up to, and keeps it.
func (a *Agent) says(what string, args ...any) {
	a.tellDone()
	a.log.Info(what, args...)
	a.event(api.EventState, what, args...)
}

// seen keeps what the kernel told where a round had nothing to do for it. Routes and addresses alone are not worth
// a line: a storm has a million of them.
func (a *Agent) seen() {
	c := &a.st.causes
	if c.order != "" || !slices.ContainsFunc(c.kept, func(c cause) bool { return !c.quiet && !c.told }) {
		return
	}
	text := "nothing to do"
	switch {
	case a.st.paused != nil && a.goal == protect:
		text = "paused: nothing is done"
	case a.cfg.Mode == Observe:
		text = "only looking"
	case len(a.st.lingering)+len(a.st.release) > 0:
		text = "waiting until it has been quiet"
	}
	a.event(api.EventSeen, text)
}
