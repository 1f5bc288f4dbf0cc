package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"tsoagent/agent"
	"tsoagent/agent/netns"
)

// Tables are plain text that fits 80 columns wherever the values allow it. On a terminal,
// sentences are wrapped to its width; elsewhere each stays on one line, so that it can be
// searched for.

// page is where tables are printed.
type page struct {
	io.Writer
	width int // in columns, 0 for no wrapping
}

// pageOf is the page for a command's output.
func pageOf(w io.Writer) page {
	const most = 100 // wider lines are hard to read
	if f, ok := w.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			if os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" {
				w = &painter{w: w}
			}
			return page{plain{w}, min(int(size.Col), most)}
		}
	}
	return page{plain{w}, 0}
}

// plain is a writer for text with names in it that others chose: a device's may have any byte but
// blanks, '/' and ':' (dev_valid_name, net/core/dev.c). A terminal gets none that it would obey.
type plain struct{ io.Writer }

// Write writes b with a question mark for each character that a terminal could obey.
func (w plain) Write(b []byte) (int, error) {
	if utf8.Valid(b) && !bytes.ContainsFunc(b, func(r rune) bool { return harmless(r) != r }) {
		return w.Writer.Write(b)
	}
	if _, err := w.Writer.Write(bytes.Map(harmless, b)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// harmless is the rune itself, or a question mark for one that can't be printed.
func harmless(r rune) rune {
	switch {
	case r >= ' ' && r <= '~', r == '\n', r == '\t': // nearly all there is
	case !strconv.IsPrint(r):
		return '?'
	}
	return r
}

// text prints a line after an indent. Where it is wrapped, the rest is indented by two more.
func (p page) text(indent int, format string, args ...any) {
	line := strings.Repeat(" ", indent)
	fresh := true
	for word := range strings.SplitSeq(fmt.Sprintf(format, args...), " ") {
		switch {
		case fresh:
		case p.width > 0 && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > p.width:
			fmt.Fprintln(p, line)
			line = strings.Repeat(" ", indent+2)
		default:
			line += " "
		}
		line += word
		fresh = false
	}
	fmt.Fprintln(p, line)
}

// table prints rows in columns, the first one being their heads, after an empty line. On a terminal the last column is
// wrapped to the width.
func (p page) table(rows [][]string) {
	wide := make([]int, len(rows[0]))
	for _, cells := range rows {
		for i, c := range cells {
			wide[i] = max(wide[i], utf8.RuneCountInString(c))
		}
	}
	last := len(wide) - 1
	at := 0 // where the last column begins
	for _, w := range wide[:last] {
		at += w + len(gap)
	}
	const least = 12 // columns, else wrapping makes it no better
	room := p.width - at
	if p.width == 0 || room < least {
		room = 1 << 30
	}
	var b []byte
	b = append(b, '\n')
	for _, cells := range rows {
		var line []byte
		for i, c := range cells[:last] {
			line = append(line, c...)
			line = append(line, strings.Repeat(" ", wide[i]-utf8.RuneCountInString(c)+len(gap))...)
		}
		for i, text := range wrap(cells[last], room) {
			if i > 0 {
				line = []byte(strings.Repeat(" ", at))
			}
			// No blanks at the end of a line.
			b = append(append(b, bytes.TrimRight(append(line, text...), " ")...), '\n')
		}
	}
	_, _ = p.Write(b) // as with Fprintln, nothing helps where stdout is gone
}

// wrap cuts text between words into lines of up to so many columns. There is at least one.
func wrap(text string, columns int) []string {
	var out []string
	line := ""
	for word := range strings.SplitSeq(text, " ") {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > columns {
			out, line = append(out, line), word
			continue
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(out, line)
}

const nothingCovered = "nothing is covered: no output policy asks for ESP or AH."

// nothingText says that nothing is covered, and whether there is something to do all the same.
func nothingText(r *agent.Report) string {
	if len(r.Holds) == 0 {
		return nothingCovered + " There is nothing to do."
	}
	return nothingCovered
}

func statusTable(p page, r *agent.Report) {
	p.text(0, "mode %s, since %s, pid %d", r.Mode, r.Since.Format(time.DateTime), r.PID)
	if r.Paused != nil {
		p.text(0, "! %s", pausedText(r.Paused))
	}
	if r.NotFollowed {
		namespaceTable(p, r)
		findings(p, r)
		return
	}
	if r.Netns != "" {
		p.text(0, "network namespace %s", r.Netns)
	}
	p.text(0, "%s, %s, %s, %s", count(r.Links, "link", "links"), count(r.Routes, "route", "routes"),
		count(r.Policies, "policy", "policies"), count(r.SAs, "SA", "SAs"))
	if len(r.Coverages) == 0 {
		p.text(0, "%s", nothingText(r))
	} else {
		p.text(0, "%s, see `tsoctl plan`", count(len(r.Coverages), "coverage", "coverages"))
	}
	observing(p, r)
	heldTable(p, r)
	laneTable(p, r)
	shown := shorten(r)
	lockTable(p, shown)
	mtuTable(p, r)
	clampTable(p, shown)
	leftOut(p, r, shown)
	namespaceTable(p, r)
	findings(p, r)
}

// namespaceTable has a line for each namespace but the one that the report is about. Where they
// don't fit one screen, those in which there is nothing to see are only counted.
func namespaceTable(p page, r *agent.Report) {
	quiet, many := 0, len(r.Namespaces) > screen
	rows := [][]string{{"NAMESPACE", "STATE", "COVERED", "HELD OFF", "LOCKED"}}
	for _, n := range r.Namespaces {
		switch {
		case n.Name == netns.Host:
		case many && n.State == agent.NetnsFollowed && n.Coverages+n.Holds+n.Locks+n.Clones == 0 && !n.Degraded:
			quiet++
		case n.State == agent.NetnsFollowed || n.State == agent.NetnsLeaving:
			state := n.State
			if n.Degraded {
				state += ", look"
			}
			rows = append(rows, []string{n.Name, state, fmt.Sprint(n.Coverages), fmt.Sprint(n.Holds), fmt.Sprint(n.Locks + n.Clones)})
		default:
			rows = append(rows, []string{n.Name, n.State, "-", "-", "-"})
		}
	}
	if r.NotFollowed {
		p.text(0, "the namespace that it was started in is not followed")
	}
	if len(rows) > 1 {
		p.table(rows)
	}
	if quiet > 0 {
		p.text(0, "followed, with nothing covered: %s", count(quiet, "namespace", "namespaces"))
	}
	if len(rows) > 1 {
		p.text(0, "more with `tsoctl status --netns NAMESPACE`")
	}
}

// screen is how many locks and clones, and how many rules, fit a status of one screen.
const screen = 12

// shorten leaves of the locks, clones and rules what fits one screen.
func shorten(r *agent.Report) *agent.Report {
	s := *r
	s.Locks = s.Locks[:min(len(s.Locks), screen)]
	s.Clones = s.Clones[:min(len(s.Clones), screen-len(s.Locks))]
	s.Rules = s.Rules[:min(len(s.Rules), screen)]
	s.Clamps = s.Clamps[:min(len(s.Clamps), screen)]
	return &s
}

// leftOut says how much more there is than was shown.
func leftOut(p page, r, shown *agent.Report) {
	if n := len(r.Locks) + len(r.Clones) - len(shown.Locks) - len(shown.Clones); n > 0 {
		p.text(0, "and %s, see `tsoctl plan`", count(n, "more route", "more routes"))
	}
	if n := len(r.Clamps) - len(shown.Clamps); n > 0 {
		p.text(0, "and %s, see `tsoctl plan`", count(n, "more clamp", "more clamps"))
	}
	if n := len(r.Rules) - len(shown.Rules); n > 0 {
		p.text(0, "and %s, see `tsoctl plan`", count(n, "more rule", "more rules"))
	}
}

// findings are what a person should look at.
func findings(p page, r *agent.Report) {
	for _, s := range r.Stale {
		p.text(0, "! %s lost events and is being read again: nothing is given back meanwhile", s)
	}
	for _, f := range r.Findings {
		p.text(0, "! %s", f)
	}
}

func count[N int | uint64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func holdTable(p page, r *agent.Report) {
	if len(r.Holds) == 0 {
		return
	}
	rows := [][]string{{"DEVICE", "FEATURE HELD OFF", "STATE", "BECAUSE"}}
	for _, h := range r.Holds {
		because := short(h.Because)
		if because == "" {
			because = h.Why
		}
		rows = append(rows, []string{h.Device, h.Feature, h.State, because})
	}
	p.table(rows)
	why(p, r)
}

// heldTable has a line for the features of a device that are alike, and no more than fit a screen.
func heldTable(p page, r *agent.Report) {
	type group struct{ device, state, because string }
	var order []group
	features := map[group][]string{}
	for _, h := range r.Holds {
		g := group{h.Device, h.State, cmp.Or(short(h.Because), h.Why)}
		if features[g] == nil {
			order = append(order, g)
		}
		features[g] = append(features[g], h.Feature)
	}
	rows := [][]string{{"DEVICE", "HELD OFF", "STATE", "BECAUSE"}}
	for i, g := range order {
		if i < screen || g.state == agent.StateContested || g.state == agent.StateRefused {
			rows = append(rows, []string{g.device, few(features[g]), g.state, g.because})
		}
	}
	if len(order) == 0 {
		return
	}
	p.table(rows)
	if n := len(order) - len(rows) + 1; n > 0 {
		p.text(0, "and %s, see `tsoctl devices`", count(n, "more line", "more lines"))
	}
	why(p, r)
}

// few are features in as few words as fit a column.
func few(features []string) string {
	if len(features) == 1 {
		return features[0]
	}
	return fmt.Sprintf("%d: %s …", len(features), slices.MinFunc(features, func(a, b string) int { return cmp.Compare(len(a), len(b)) }))
}

// why says why features that are wanted off are on.
func why(p page, r *agent.Report) {
	told := false
	for _, h := range r.Holds {
		if h.State == agent.StateContested || h.State == agent.StateRefused {
			p.text(0, "! %s %s: %s", h.Device, h.Feature, h.Why)
			told = true
		}
	}
	if told {
		p.text(0, "`tsoctl events` says when that was, `tsoctl devices` what else the device does")
	}
}

func laneTable(p page, r *agent.Report) {
	if len(r.Lanes) == 0 {
		return
	}
	rows := [][]string{{"DEVICE", "LANE", "STATE", "TAKES", "BECAUSE"}}
	for _, l := range r.Lanes {
		because := short(l.Because)
		if because == "" {
			because = l.Why
		}
		rows = append(rows, []string{l.Device, l.IFB, l.State, count(len(l.Matches), "match", "matches"), because})
	}
	p.table(rows)
	for _, l := range r.Lanes {
		if l.State == agent.StateRefused {
			p.text(0, "! no lane on %s: %s", l.Device, l.Why)
		}
	}
}

func lockTable(p page, r *agent.Report) {
	rows := [][]string{{"ROUTE", "MTU", "DEVICE", "STATE"}}
	for _, l := range r.Locks {
		rows = append(rows, []string{l.Route, mtuText(l.MTU, l.Locked), strings.Join(l.Devices, ","), l.State})
	}
	for _, c := range r.Clones {
		if c.Throw {
			rows = append(rows, []string{c.Dst, "-", "-", placeText(c) + ", throw"})
			continue
		}
		rows = append(rows, []string{c.Dst, mtuText(c.MTU, c.Locked), strings.Join(c.Devices, ","), placeText(c)})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
	rows = [][]string{{"PRIORITY", "FAMILY", "RULE"}}
	for _, rule := range r.Rules {
		rows = append(rows, []string{fmt.Sprint(rule.Priority), rule.Family, rule.Text})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
}

// placeText is where a clone is, or would be.
func placeText(c agent.CloneReport) string {
	text := fmt.Sprintf("table %d", c.Table)
	if c.State == agent.StateWanted {
		text += ", " + c.State
	}
	return text
}

func mtuText(mtu uint32, locked bool) string {
	if locked {
		return fmt.Sprintf("lock %d", mtu)
	}
	return fmt.Sprint(mtu)
}

func short(list []string) string {
	const most = 2
	if len(list) > most {
		return strings.Join(list[:most], ", ") + fmt.Sprintf(" and %d more", len(list)-most)
	}
	return strings.Join(list, ", ")
}

func planTable(p page, r *agent.Report) {
	if !r.Live {
		p.text(0, "no agent runs; read from the kernel, this is what one would do")
	}
	if r.NotFollowed {
		namespaceTable(p, r)
		findings(p, r)
		return
	}
	if r.Netns != "" {
		p.text(0, "network namespace %s", r.Netns)
	}
	observing(p, r)
	if len(r.Coverages) == 0 {
		p.text(0, "%s", nothingText(r))
	}
	for _, c := range r.Coverages {
		p.text(0, "%s", coverageLine(c))
		p.text(2, "%s", cutLine(c))
		if len(c.Carriers) > 0 {
			p.text(2, "carriers: %s", strings.Join(c.Carriers, ", "))
		}
		coverageActs(p, c)
		for _, n := range c.Notes {
			p.text(2, "- %s", n)
		}
	}
	holdTable(p, r)
	laneTable(p, r)
	lockTable(p, r)
	mtuTable(p, r)
	clampTable(p, r)
	namespaceTable(p, r)
	findings(p, r)
}

// mtuTable has a line for each carrier whose own MTU is set.
func mtuTable(p page, r *agent.Report) {
	rows := [][]string{{"CARRIER", "MTU", "WAS", "STATE", "BECAUSE"}}
	for _, m := range r.DeviceMTUs {
		rows = append(rows, []string{m.Device, fmt.Sprint(m.MTU), fmt.Sprint(m.Was), m.State, short(m.Because)})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
	for _, m := range r.DeviceMTUs {
		if m.Why != "" {
			p.text(0, "! %s: %s", m.Device, m.Why)
		}
	}
}

// clampTable has a line for each interval of destinations that is clamped.
func clampTable(p page, r *agent.Report) {
	rows := [][]string{{"FORWARDED TO AND FROM", "MSS", "STATE", "BECAUSE"}}
	for _, c := range r.Clamps {
		rows = append(rows, []string{c.Dst, fmt.Sprint(c.MSS), c.State, short(c.Because)})
	}
	if len(rows) > 1 {
		p.table(rows)
	}
}

// coverageActs are what was done for a coverage.
func coverageActs(p page, c agent.CoverageReport) {
	for _, h := range byDevice(c.Held) {
		p.text(2, "held off: %s", h)
	}
	for _, l := range c.Locked {
		p.text(2, "locked: %s", l)
	}
}

// byDevice joins what is held on one device: "dev a", "dev b" become "dev a, b".
func byDevice(held []string) []string {
	var out []string
	var last string
	for _, h := range held {
		device, feature, _ := strings.Cut(h, " ")
		if len(out) > 0 && device == last {
			out[len(out)-1] += ", " + feature
			continue
		}
		out, last = append(out, h), device
	}
	return out
}

// observing says that what follows is only what an agent would do.
func observing(p page, r *agent.Report) {
	if r.Live && r.Mode == agent.Observe && len(r.Coverages) > 0 {
		p.text(0, "the agent only observes: nothing of this is written")
	}
}

func coverageLine(c agent.CoverageReport) string {
	if c.Key != "" {
		return keyLine(c)
	}
	s := fmt.Sprintf("policy %d priority %d: src %s dst %s", c.Policy, c.Priority, c.Src, c.Dst)
	if c.Proto != 0 {
		s += fmt.Sprintf(" proto %d", c.Proto)
	}
	if c.Sport != 0 {
		s += fmt.Sprintf(" sport %d", c.Sport)
	}
	if c.Dport != 0 {
		s += fmt.Sprintf(" dport %d", c.Dport)
	}
	if c.IfID != 0 {
		s += fmt.Sprintf(" if_id %#x", c.IfID)
	}
	if c.Mark != "" {
		s += " mark " + c.Mark
	}
	return s
}

// keyLine says whose packets a key signs: those from a listener's port, or a client's to the peer's.
func keyLine(c agent.CoverageReport) string {
	peer := c.Dst
	if p, err := netip.ParsePrefix(peer); err == nil && p.IsSingleIP() {
		peer = p.Addr().String()
	}
	s := fmt.Sprintf("%s key: peer %s", c.Key, peer)
	if c.PeerPort != 0 {
		s += fmt.Sprintf(" port %d", c.PeerPort)
	} else {
		s += fmt.Sprintf(", local port %d", c.Sport)
	}
	if c.Src != "" {
		s += " of " + c.Src
	}
	if c.Dev != "" {
		s += " dev " + c.Dev
	}
	return s
}

// cutLine says what is left to an inner packet, and where segments are cut. A signature is an option
// of TCP: it leaves the MTU as it is.
func cutLine(c agent.CoverageReport) string {
	switch {
	case c.Key != "" && c.Cut == "socket":
		return "segments are cut at the socket"
	case c.Key != "":
		return "segments are cut at the " + cutText(c.Cut)
	case c.MTU > 0:
		return fmt.Sprintf("inner mtu %d, segments are cut at the %s", c.MTU, cutText(c.Cut))
	}
	return "inner mtu not known yet, segments are cut at the " + cutText(c.Cut)
}

func cutText(cut string) string {
	switch cut {
	case "device":
		return "device"
	case "lane":
		return "lane, an ifb of our own"
	case "nic":
		return "NIC, and so are everybody else's who leave by it"
	}
	return "socket, or inside the kernel's ESP"
}

func explainTable(p page, e *agent.Explanation) {
	line := "packets to " + e.Dst
	if e.From != "" {
		line += " from " + e.From
	}
	p.text(0, "%s", line)
	via := e.Device
	if e.Gateway != "" {
		via += " via " + e.Gateway
	}
	route := fmt.Sprintf("%s, table %s, device mtu %d", via, tableText(e.Table), e.DeviceMTU)
	if e.RouteMTU != 0 {
		route += ", route mtu " + mtuText(e.RouteMTU, e.RouteMTULocked)
	}
	p.text(2, "route: %s", route)
	if e.Route != "" {
		p.text(4, "%s", e.Route)
	}
	if e.Rule != "" {
		p.text(4, "by rule %s", e.Rule)
	}
	switch e.Action {
	case "none":
		p.text(2, "policy: none matches, they leave in the clear")
	case "bypass":
		p.text(2, "policy: %d bypasses IPsec (%s)", e.Policy, e.Selector)
	case "block":
		p.text(2, "policy: %d blocks them (%s)", e.Policy, e.Selector)
	default:
		p.text(2, "policy: %d (%s)", e.Policy, e.Selector)
	}
	for _, l := range e.Losers {
		p.text(2, "also matches, but comes later: %s", l)
	}
	for i := len(e.Costs) - 1; i >= 0; i-- {
		costTable(p, e.Costs[i])
	}
	switch c := e.Coverage; {
	case e.MTU > 0 && e.Action != "ipsec":
		p.text(2, "mtu %d, TCP MSS %d without options", e.MTU, e.MSS)
	case e.MTU > 0:
		p.text(2, "inner mtu %d, TCP MSS %d without options", e.MTU, e.MSS)
	case c != nil && c.MTU > 0:
		p.text(2, "inner mtu %d", c.MTU)
	}
	if e.Segmentation != "" {
		p.text(2, "segments are cut %s", e.Segmentation)
	}
	if c := e.Coverage; c != nil {
		if !e.Live && len(c.Held)+len(c.Locked) > 0 {
			p.text(2, "no agent runs; one would have this")
		}
		coverageActs(p, *c)
	}
	for _, n := range e.Notes {
		p.text(2, "- %s", n)
	}
	for i, w := range e.WouldChange {
		if i == 0 {
			p.text(2, "what would change this:")
		}
		p.text(2, "- %s", w)
	}
}

// costTable is a subtraction: what one transformation is given, takes and leaves, in bytes.
func costTable(p page, s agent.StepCost) {
	p.text(2, "%s to %s:", s.Template, s.SA)
	wide := len("leaves")
	for _, it := range s.Items {
		wide = max(wide, len(it.Name))
	}
	line := func(name string, bytes int) { fmt.Fprintf(p, "    %-*s  %5d\n", wide, name, bytes) }
	line("given", s.MTU)
	for _, it := range s.Items {
		line(it.Name, -it.Bytes)
	}
	line("leaves", s.Inner)
	for _, l := range s.Losers {
		p.text(4, "not used: SA %s", l)
	}
}

// tableText is a routing table as `ip` names it.
func tableText(id uint32) string {
	switch id {
	case 253:
		return "default"
	case 254:
		return "main"
	case 255:
		return "local"
	}
	return fmt.Sprint(id)
}

func restoreTable(p page, r *agent.Restored, stale bool) {
	restoredIn(p, r, stale)
	for i := range r.Namespaces {
		restoredIn(p, &r.Namespaces[i], stale)
	}
}

// restoredIn is what was done in one namespace.
func restoredIn(p page, r *agent.Restored, stale bool) {
	in := ""
	if r.Netns != "" {
		in = "namespace " + r.Netns + ": "
	}
	back := some(count(r.Holds, "feature", "features"), count(r.Locks, "route mtu", "route mtus"), count(r.DeviceMTUs, "device mtu", "device mtus"))
	away := some(count(r.Rules, "rule", "rules"), count(r.Clones, "clone", "clones"), count(r.Lanes, "lane", "lanes"), count(r.Clamps, "clamp", "clamps"))
	switch {
	case r.Actions > 0 && back != "" && away != "":
		p.text(0, "%sgiven back: %s; taken away: %s", in, back, away)
	case r.Actions > 0 && back != "":
		p.text(0, "%sgiven back: %s", in, back)
	case r.Actions > 0 && away != "":
		p.text(0, "%staken away: %s", in, away)
	case r.Actions > 0:
		p.text(0, "%s%s undone", in, count(r.Actions, "change", "changes"))
	case stale:
		p.text(0, "%sno rule or clone of tsoagent's was in place", in)
	default:
		p.text(0, "%snothing of tsoagent's was in place", in)
	}
	for _, f := range r.Findings {
		p.text(0, "! %s", f)
	}
}

// some joins what there is any of.
func some(counts ...string) string {
	return strings.Join(slices.DeleteFunc(counts, func(s string) bool { return strings.HasPrefix(s, "0 ") }), ", ")
}
