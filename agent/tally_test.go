package agent

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/ethtool"
	"tsoagent/xfrmwatch"
)

// TestEveryActionIsCounted reads the calls that count, so that no action is counted as another one, and the
// table has no message that nobody says.
func TestEveryActionIsCounted(t *testing.T) {
	said := map[string]bool{lockWithdrawn: true, laneRefused: true}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, e.Name(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				for _, text := range counted(t, fn) {
					said[text] = true
				}
			}
		}
	}
	if len(said) < 30 {
		t.Fatalf("only %d messages found", len(said))
	}
	for text := range said {
		if actionOf[text] == ActOther {
			t.Errorf("%q is no action: add it to actionOf", text)
		}
	}
	for text := range actionOf {
		if !said[text] {
			t.Errorf("nobody says %q: take it out of actionOf", text)
		}
	}
	for _, names := range [][]string{Actions[:], Results[:]} {
		if sorted := slices.Compact(slices.Sorted(slices.Values(names))); len(sorted) != len(names) || sorted[0] == "" {
			t.Errorf("names %q", names)
		}
	}
}

// counted are the messages with which a function calls did, failed, clampFailed or count, those that it has in
// a variable included.
func counted(t *testing.T, fn *ast.FuncDecl) []string {
	var out, variables []string
	values := map[string][]string{}
	literal := func(e ast.Expr) (string, bool) {
		l, ok := e.(*ast.BasicLit)
		if !ok || l.Kind != token.STRING {
			return "", false
		}
		s, err := strconv.Unquote(l.Value)
		return s, err == nil
	}
	ast.Inspect(fn, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for i, lhs := range n.Lhs {
				if id, ok := lhs.(*ast.Ident); ok && i < len(n.Rhs) {
					if s, ok := literal(n.Rhs[i]); ok {
						values[id.Name] = append(values[id.Name], s)
					}
				}
			}
		case *ast.CallExpr:
			sel, ok := n.Fun.(*ast.SelectorExpr)
			if !ok || len(n.Args) == 0 || !slices.Contains([]string{"did", "failed", "clampFailed", "count"}, sel.Sel.Name) {
				break
			}
			if s, ok := literal(n.Args[0]); ok {
				out = append(out, s)
			} else if id, ok := n.Args[0].(*ast.Ident); ok {
				variables = append(variables, id.Name)
			} else {
				t.Errorf("%s calls %s with what is neither a text nor a variable", fn.Name.Name, sel.Sel.Name)
			}
		}
		return true
	})
	for _, v := range variables {
		passedOn := slices.ContainsFunc(fn.Type.Params.List, func(f *ast.Field) bool {
			return slices.ContainsFunc(f.Names, func(id *ast.Ident) bool { return id.Name == v })
		})
		if len(values[v]) == 0 && !passedOn && v != "lockWithdrawn" && v != "laneRefused" {
			t.Errorf("%s counts %s, whose value this test doesn't find", fn.Name.Name, v)
		}
		out = append(out, values[v]...)
	}
	return out
}

// TestReactionsAreMeasuredFromTheEvent has events wait for the loop, and the kernel take its time.
func TestReactionsAreMeasuredFromTheEvent(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start(policy(97, "0.0.0.0/0", "10.5.0.0/16", 2), sa(0x200, 2))
	w.addRoute("10.5.0.0/16", hop{oif: ipsec2})
	w.settle()
	if n := sum(w.a.tally.Reactions[:]); n != 1 || w.a.tally.ReactionSum != 0 {
		t.Fatalf("after the start: %d reactions of %s, want one, to the route, of no time", n, w.a.tally.ReactionSum)
	}
	w.a.tally.Reactions = [len(ReactionBounds) + 1]uint64{}
	// A batch waits for 30 ms, another comes later, and the write takes 10 ms.
	w.a.inbox.put(batch{xfrm: []xfrmwatch.Event{tunnelPolicy}})
	w.now = w.now.Add(30 * time.Millisecond)
	w.a.inbox.put(batch{xfrm: []xfrmwatch.Event{tunnelSA}})
	w.beforeSet = func() { w.now = w.now.Add(10 * time.Millisecond) }
	w.settle()
	w.mustProtect()
	if n := sum(w.a.tally.Reactions[:]); n != 1 || w.a.tally.ReactionSum != 40*time.Millisecond {
		t.Errorf("%d reactions of %s, want one of 40ms", n, w.a.tally.ReactionSum)
	}
	if ReactionBounds[6] != .05 || w.a.tally.Reactions[6] != 1 {
		t.Errorf("classes %v, want one up to 0.05 s", w.a.tally.Reactions)
	}
	o, err := w.a.observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f := o.figures
	if f.Tally != w.a.tally || f.JournalEntries != len(w.book) || f.JournalEntries == 0 {
		t.Errorf("the figures %+v don't have it", f)
	}
	if len(f.Features) != 6 || f.Features[0] != (ManagedFeature{"ipsec1", string(ethtool.TCPECNSegmentation), false}) {
		t.Errorf("features %+v", f.Features)
	}
	// What a timer asks for answers no event.
	w.xfrm(gone(tunnelPolicy), saGone(tunnelSA))
	w.settle()
	before := w.a.tally
	w.advance(time.Minute)
	if w.a.tally.Actions[ActUnhold][Done] == 0 || w.a.tally.Reactions != before.Reactions {
		t.Errorf("given back: %v; reactions %v, want %v", w.a.tally.Actions, w.a.tally.Reactions, before.Reactions)
	}
	// A long one is beyond all bounds.
	w.a.since = w.now.Add(-time.Hour)
	w.a.reacted(true)
	if w.a.tally.Reactions[len(ReactionBounds)] != 1 {
		t.Errorf("classes %v", w.a.tally.Reactions)
	}
}

func sum(list []uint64) (n uint64) {
	for _, x := range list {
		n += x
	}
	return n
}

// TestFailuresAreCountedByAction has a device refuse.
func TestFailuresAreCountedByAction(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.replaceErr = unix.EINVAL
	w.start(tunnelPolicy, tunnelSA)
	if got := w.a.tally.Actions[ActLock]; got[Failed] == 0 || w.a.tally.Actions[ActOther] != [results]uint64{} {
		t.Errorf("lock %v, other %v", got, w.a.tally.Actions[ActOther])
	}
	var done, failed uint64
	for _, n := range w.a.tally.Actions {
		done, failed = done+n[Done], failed+n[Failed]
	}
	if c := w.a.stats; c.Actions != done || c.Failed != failed {
		t.Errorf("counters %+v, by action %d and %d", c, done, failed)
	}
}
