package plan

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

var update = flag.Bool("update", false, "write the golden plans anew")

// TestGoldenPlans compares plans with text that a person can review, and checks the laws for
// each world besides.
func TestGoldenPlans(t *testing.T) {
	files, err := filepath.Glob("testdata/golden/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden plans: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			w, err := newWorld(string(a.Files[0].Data))
			if err != nil {
				t.Fatal(err)
			}
			in := w.input()
			pl := Make(in)
			got := w.render(pl, Diff(in, pl, w.held))
			if *update {
				a.Files[1].Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(strings.Split(string(a.Files[1].Data), "\n"), strings.Split(got, "\n")); diff != "" {
				t.Errorf("another plan (-want +got):\n%s", diff)
			}
			if err := laws(w, rand.New(rand.NewPCG(3, 4)), 500); err != nil {
				t.Error(err)
			}
		})
	}
}

// render is a plan as text, in the words of `ip`: holds, locks, the tables with their rules,
// what goes, and a verdict for each coverage with its notes.
func (w *world) render(pl *Plan, s Steps) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	for _, h := range pl.Holds {
		line("hold %s %s because %s", h.Device.Name, h.Feature, h.Why+renderCauses(h.Because, h.Keys))
	}
	for _, l := range pl.Lanes {
		line("lane %s %v because %s", l.Name, l.Matches, renderCauses(l.Because, l.Keys))
	}
	for _, l := range pl.Locks {
		line("lock %s%s %s, the owner's was %s, because %s", l.Route.Key(), w.hops(l.Route), l.Want, l.Owner, renderIDs(l.Because))
	}
	for _, sh := range pl.Shapes {
		for _, r := range sh.Rules {
			line("rule %s", renderRule(&r))
		}
		for c := range sh.Clones() {
			if c.Throw {
				line("table %d: throw %s", sh.Table, c.Dst)
			} else {
				line("table %d: %s%s %s advmss %d because %s", sh.Table, c.Dst, w.hops(c.Of), c.MTU, c.AdvMSS, renderIDs([]xfrmwatch.CoverageID{c.Because}))
			}
			for _, b := range c.Behind {
				line("table %d: behind it %s%s %s for what is bound to a device", sh.Table, c.Dst, w.hops(b.Of), b.MTU)
			}
		}
	}
	for _, r := range s.DropRules {
		line("drop rule %s", renderRule(&r))
	}
	for _, r := range s.DropClones {
		line("drop %s", r.Key())
	}
	for _, v := range pl.Verdicts {
		name := renderIDs([]xfrmwatch.CoverageID{v.ID})
		if v.Key != nil {
			name = v.Key.String()
		}
		line("%s: mtu %d, cut at %s, carriers %v, %d held, locked %q", name, v.MTU, v.Cut, v.Carriers, len(v.Held), v.Locked)
		for _, n := range v.Notes {
			line("\t%s", n)
		}
	}
	return b.String()
}

func renderIDs(ids []xfrmwatch.CoverageID) string {
	var out []string
	for _, id := range ids {
		s := fmt.Sprintf("policy %d", id.Policy)
		if id.Peer.IsValid() {
			s += " peer " + id.Peer.String()
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

func renderCauses(ids []xfrmwatch.CoverageID, keys []sockopt.Key) string {
	var out []string
	if len(ids) > 0 {
		out = append(out, renderIDs(ids))
	}
	for _, k := range keys {
		out = append(out, k.String())
	}
	return strings.Join(out, ", ")
}

func (w *world) hops(r routes.Route) string {
	var s string
	for _, n := range r.Body.Nexthops {
		if n.Gateway.IsValid() {
			s += " via " + n.Gateway.String()
		}
		s += " dev " + w.fib.Link(n.Oif).Name
	}
	return s
}

func renderRule(r *routes.Rule) string {
	s := fmt.Sprintf("%d:", r.Priority)
	switch {
	case r.Src.IsValid():
		s += " from " + r.Src.String()
	case r.Family == routes.IPv6:
		s += " inet6 from all"
	default:
		s += " from all"
	}
	if r.Dst.IsValid() {
		s += " to " + r.Dst.String()
	}
	if r.Iif != "" {
		s += " iif " + r.Iif
	}
	if r.Mask != 0 {
		s += fmt.Sprintf(" fwmark %#x/%#x", r.Mark, r.Mask)
	}
	if r.IPProto != 0 {
		s += fmt.Sprintf(" ipproto %d", r.IPProto)
	}
	if !r.Sport.Any() {
		s += fmt.Sprintf(" sport %d-%d", r.Sport.Lo, r.Sport.Hi)
	}
	if !r.Dport.Any() {
		s += fmt.Sprintf(" dport %d-%d", r.Dport.Lo, r.Dport.Hi)
	}
	return s + fmt.Sprintf(" lookup %d", r.Table)
}
