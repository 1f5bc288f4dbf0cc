// Package cures turns what the scenarios have measured of the known pathologies, without the agent and with it, into tables for people: `make
// cures` (e2e/cmd/cures).
package cures

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Sample is one figure of one run.
type Sample struct {
	Case    string  `json:"case"`
	When    string  `json:"when"`
	Variant string  `json:"variant"`
	Kernel  string  `json:"kernel"`
	Value   float64 `json:"value"`
	Of      int     `json:"of,omitempty"`
	Unit    string  `json:"unit"`
	More    string  `json:"more,omitempty"`
}

// Results are all figures of a run.
type Results struct {
	Machine string   `json:"machine"`
	Load    string   `json:"load"` // of the machine, when it began and when it ended
	Rounds  int      `json:"rounds"`
	Took    float64  `json:"took"` // in seconds
	Samples []Sample `json:"samples"`
}

// A Case is a pathology. Its name is that of its figures in the scenarios.
type Case struct {
	Name   string
	What   string
	Done   string // with the agent
	Before string // the case that has the figure from before, if that is another one
	Not    string // why it is no better, where it is not
	Same   bool   // that nothing changes is what is to be shown
}

// Cases are all, in the order of the tables.
var Cases = []Case{
	{Name: "ipip", What: "IPIP (v6: ip6tnl) above ESP transport", Done: "TSO off on the tunnel device"},
	{Name: "gre", What: "GRE above ESP transport", Done: "TSO off on the tunnel device", Not: "TSO goes off all the same, until `tsoctl probe` was run"},
	{Name: "vxlan", What: "VXLAN above ESP transport", Done: "TSO off on the tunnel device", Not: "TSO goes off all the same, until `tsoctl probe` was run"},
	{Name: "geneve", What: "Geneve above ESP transport", Done: "TSO off on the tunnel device", Not: "TSO goes off all the same, until `tsoctl probe` was run"},
	{Name: "plain", What: "plain flow on a NIC with `ethtool -K … tso off gso off` for the sake of IPsec", Done: "nobody needs that any more: the NIC keeps TSO"},
	{Name: "covered", What: "covered flow on that NIC", Done: "the kernel cuts it before the NIC, as before", Same: true},
	{Name: "gateway", What: "forwarded TCP, policy-based gateway, clamp to PMTU, ICMP filtered", Done: "locked route for the covered flows"},
	{Name: "xfrmi", What: "first forwarded TCP behind an xfrm interface of MTU 1500, the same", Done: "lock on the route"},
	{Name: "rekey", What: "new forwarded TCP after a rekey to a larger overhead; before: route MTU set by hand", Done: "the lock follows the SAs"},
	{Name: "moved", What: "new forwarded TCP as its route moves to another xfrm interface; before: route MTU set by hand", Done: "the lock follows the route"},
	{Name: "at-once", What: "the same, 4 opened as fast as can be as soon as the route has moved", Done: "the lock comes an event and a write later", Before: "moved"},
	{Name: "df", What: "first datagram with DF to each of 8 hosts through an xfrm interface", Done: "refused at once, with the MTU"},
	{Name: "underlay", What: "local TCP while the MTU falls to 1400 behind a router, ICMP filtered", Done: "the lock clears DF: ESP is fragmented", Not: "routers don't fragment IPv6"},
	{Name: "md5", What: "unsigned TCP session on a listener with somebody else's TCP-MD5 key; after: on a listener of its own", Done: "found and named, with what helps (`tsoctl doctor`)"},
	{Name: "clamp", What: "forwarded TCP without any clamp, ICMP filtered, with `partial: clamp`", Done: "MSS clamp for the covered destinations", Before: "noclamp"},
	{Name: "noclamp", What: "forwarded TCP without any clamp, ICMP filtered, by default", Done: "nothing tells the sender: `partial: clamp`"},
	{Name: "forwarded-df", What: "forwarded datagrams with DF, ICMP filtered", Done: "nothing tells the sender"},
	{Name: "open", What: "forwarded TCP that is open when the overhead grows", Done: "its MSS was agreed in its SYN"},
}

// controls are figures that the scenarios take for themselves.
var controls = []string{"by-hand"}

// row is one case on one kernel in one variant.
type row struct {
	Case
	kernel, variant string
	before, after   cell
}

// cell is what came of all samples of one figure: the best rate, as whatever else the machine does only makes a flow slower, and the sums of
// what is counted.
type cell struct {
	rate, done, lost float64
	rated            bool
	of, ofLost       int
	more             string
}

func (c *cell) add(s Sample) {
	switch {
	case s.Unit == "Mbit/s":
		if s.Value >= c.rate {
			c.more = s.More
		}
		c.rate, c.rated = max(c.rate, s.Value), true
	case strings.HasPrefix(s.Unit, "datagrams"):
		c.lost += s.Value
		c.ofLost += s.Of
		c.more = s.More
	default:
		c.done += s.Value
		c.of += s.Of
	}
}

func (c cell) empty() bool { return !c.rated && c.of == 0 && c.ofLost == 0 }

// String is the cell for people.
func (c cell) String() string {
	var parts []string
	if c.of > 0 {
		parts = append(parts, fmt.Sprintf("%.0f of %d connections", c.done, c.of))
	}
	if c.ofLost > 0 {
		parts = append(parts, fmt.Sprintf("%.0f of %d lost", c.lost, c.ofLost))
	}
	if c.rated {
		parts = append(parts, mbit(c.rate)+" Mbit/s")
	}
	if parts == nil {
		return "-"
	}
	return strings.Join(parts, ", ")
}

func mbit(v float64) string {
	switch {
	case v < 0.05:
		return "0"
	case v < 10:
		return fmt.Sprintf("%.1f", v)
	case v < 1000:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.0f", math.Round(v/10)*10)
}

// better reports whether the agent has made a difference that a person would see.
func (r row) better() bool {
	return r.after.rate > 1.2*r.before.rate && r.after.rate > 0.05 || r.after.done > r.before.done || r.after.lost < r.before.lost
}

// factor is how many times the rate, or nothing where one of them has none.
func (r row) factor() string {
	if !r.before.rated || !r.after.rated || r.before.rate < 0.05 {
		return ""
	}
	f := r.after.rate / r.before.rate
	if f < 10 {
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.0f", f)
}

// rows are all cases that were measured, in order: by case, then by kernel, then by variant.
func (r *Results) rows() []row {
	type key struct{ name, when, kernel, variant string }
	cells := map[key]*cell{}
	var places []key
	for _, s := range r.Samples {
		k := key{s.Case, s.When, s.Kernel, s.Variant}
		if cells[k] == nil {
			cells[k] = new(cell)
			places = append(places, key{s.Case, "", s.Kernel, s.Variant})
		}
		cells[k].add(s)
	}
	slices.SortFunc(places, func(a, b key) int {
		return cmp.Or(order(a.name)-order(b.name), -strings.Compare(a.kernel, b.kernel), strings.Compare(a.variant, b.variant))
	})
	var rows []row
	for _, p := range slices.Compact(places) {
		i := order(p.name)
		if i < 0 {
			continue // a control
		}
		x := row{Case: Cases[i], kernel: p.kernel, variant: p.variant}
		if c := cells[key{cmp.Or(x.Before, p.name), "before", p.kernel, p.variant}]; c != nil {
			x.before = *c
		}
		if c := cells[key{p.name, "after", p.kernel, p.variant}]; c != nil {
			x.after = *c
		}
		if !x.after.empty() {
			rows = append(rows, x)
		}
	}
	return rows
}

func order(name string) int {
	return slices.IndexFunc(Cases, func(c Case) bool { return c.Name == name })
}

// Long is the table of a run with all that was measured.
func (r *Results) Long() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", r.caption())
	b.WriteString("| trouble | kernel | family | without | with tsoagent | times | what was done |\n| --- | --- | --- | --- | --- | ---: | --- |\n")
	for _, x := range r.rows() {
		after := x.after.String()
		if x.after.ofLost > 0 && x.after.more != "" {
			after += " (" + x.after.more + ")"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n", x.What, x.kernel, family(x.variant), x.before, after, x.factor(), x.Done)
	}
	return b.String()
}

// Short is the table of what is cured or unharmed, for who wants to know what this is good for. IPv4 and IPv6 share a row.
func (r *Results) Short() string {
	return r.pairs("what it does", func(x row) string { return x.Done }, func(x row) bool { return x.better() || x.Same })
}

// Uncured is the table of what is no better with the agent, or worse.
func (r *Results) Uncured() string {
	return r.pairs("why", func(x row) string { return cmp.Or(x.Not, x.Done) }, func(x row) bool { return !x.better() && !x.Same })
}

// pairs is the table of the rows that are wanted, with a last column.
func (r *Results) pairs(head string, last func(row) string, want func(row) bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| trouble | without | with tsoagent | times | %s |\n| --- | --- | --- | ---: | --- |\n", head)
	rows := slices.DeleteFunc(r.rows(), func(x row) bool { return !want(x) })
	for len(rows) > 0 {
		same := 1
		for same < len(rows) && rows[same].Name == rows[0].Name && rows[same].kernel == rows[0].kernel {
			same++
		}
		what := rows[0].What
		if several(r.rows(), rows[0].Name) {
			what += ", Linux " + rows[0].kernel
		}
		if same == 1 {
			what += ", " + family(rows[0].variant)
		}
		var before, after, times []string
		for _, x := range rows[:same] {
			before, after, times = append(before, x.before.String()), append(after, x.after.String()), append(times, cmp.Or(x.factor(), "-"))
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", what, both(before), both(after), strings.ReplaceAll(both(times), "-", ""), last(rows[0]))
		rows = rows[same:]
	}
	fmt.Fprintf(&b, "\n(IPv4 / IPv6. %s)\n", r.caption())
	return b.String()
}

// several reports whether a case was measured on more than one kernel.
func several(rows []row, name string) bool {
	kernels := map[string]bool{}
	for _, x := range rows {
		if x.Name == name {
			kernels[x.kernel] = true
		}
	}
	return len(kernels) > 1
}

// both is one text for both families: once what they share at the front, as far as a comma, and at the end, as far as a blank.
func both(texts []string) string {
	if len(texts) != 2 || texts[0] == texts[1] {
		return texts[0]
	}
	front := ""
	if head, _, ok := strings.Cut(texts[0], ", "); ok && strings.HasPrefix(texts[1], head+", ") {
		front = head + ", "
	}
	end := ""
	if i := strings.LastIndexByte(texts[0], ' '); i >= len(front)-1 && i > 0 && strings.HasSuffix(texts[1], texts[0][i:]) {
		end = texts[0][i:]
	}
	return front + strings.TrimSuffix(texts[0][len(front):], end) + " / " + texts[1][len(front):]
}

func family(variant string) string {
	switch variant {
	case "v4":
		return "IPv4"
	case "v6":
		return "IPv6"
	}
	return variant
}

// caption says where the figures are from.
func (r *Results) caption() string {
	kernels := map[string][]string{}
	for _, x := range r.rows() {
		place := "user mode, one processor"
		if x.Name == "md5" {
			place = "the host's own"
		}
		if !slices.Contains(kernels[place], x.kernel) {
			kernels[place] = append(kernels[place], x.kernel)
		}
	}
	var places []string
	for _, place := range []string{"user mode, one processor", "the host's own"} {
		if list := kernels[place]; list != nil {
			slices.Sort(list)
			places = append(places, fmt.Sprintf("%s (%s)", strings.Join(list, ", "), place))
		}
	}
	return fmt.Sprintf("%s; kernels of the test: %s; %d rounds, the best rate of each, the sums of what is counted; load of the machine %s.",
		r.Machine, strings.Join(places, ", "), r.Rounds, r.Load)
}
