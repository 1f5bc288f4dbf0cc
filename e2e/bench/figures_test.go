package bench

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSamples(t *testing.T) {
	var hundred Samples
	for i := range 100 {
		hundred = append(hundred, float64(100-i))
	}
	for _, c := range []struct {
		s           Samples
		median, p99 float64
	}{{nil, 0, 0}, {Samples{3}, 3, 3}, {Samples{4, 1, 3, 2}, 2, 4}, {Samples{5, 1, 3}, 3, 5}, {hundred, 50, 99}} {
		before := slices.Clone(c.s)
		if m, p := c.s.Median(), c.s.P99(); m != c.median || p != c.p99 {
			t.Errorf("%v: median %v, p99 %v", c.s, m, p)
		}
		if !slices.Equal(before, c.s) {
			t.Error("the samples are in another order")
		}
	}
	if r := (Ratio{Ours: Samples{6}, Floor: Samples{4}}); r.Median() != 1.5 || r.P99() != 1.5 {
		t.Errorf("ratios %v, %v", r.Median(), r.P99())
	}
}

// good are results that reach everything.
func good() *Results {
	even := Ratio{Ours: Samples{1}, Floor: Samples{1}}
	mem := map[string][]Memory{observe: {{RSS: 100 << 20}}, enforce: {{RSS: 100 << 20}}}
	return &Results{
		Scale: 1, Size: FullSize, Cold: map[string]*Cold{observe: {Start: even}, enforce: {Start: even}},
		Memory:     MemoryFigures{Ready: mem, Quiet: mem, Shrunk: Memory{RSS: 20 << 20}, Fresh: Memory{RSS: 18 << 20}},
		EmptyEvent: Event{even, even}, FullEvent: Event{even, even}, Storm: Storm{Time: even, Exact: []bool{true}, Moved: Samples{0.001}},
		Writes: Writes{Install: even, Remove: even},
		Idle:   Idle{Seconds: 30, Changes: 5},
	}
}

func TestEachMissedFigureHasALine(t *testing.T) {
	if missed := good().Missed(); len(missed) > 0 {
		t.Errorf("nothing is missed, but %q", missed)
	}
	slow := Ratio{Ours: Samples{4}, Floor: Samples{1}}
	for name, c := range map[string]struct {
		spoil func(*Results)
		want  []string
	}{
		"cold":         {func(r *Results) { r.Cold[observe].Start = slow }, []string{"cold start by iproute2, median: 4, to reach 1"}},
		"not measured": {func(r *Results) { r.Storm.Time = Ratio{} }, []string{"storm by a counting reader, median: not measured"}},
		"memory": {
			func(r *Results) { r.Memory.Ready = map[string][]Memory{enforce: {{RSS: 300 << 20}}} },
			[]string{"resident memory in mode enforce: 300 MiB, to reach 192 MiB"},
		},
		"event": {func(r *Results) { r.FullEvent.Done = slow }, []string{
			"policy event until written and read back, full tables, by a straight line, median: 4, to reach 1.5",
			"policy event until written and read back, full tables, by a straight line, p99: 4, to reach 3",
		}},
		"storm": {
			func(r *Results) { r.Storm.Time, r.Storm.Exact = slow, []bool{true, false} },
			[]string{"storm by a counting reader, median: 4, to reach 1.2", "state after storm 2: not exactly the kernel's"},
		},
		"moved": {
			func(r *Results) { r.Storm.Moved, r.Storm.Late = Samples{0.5}, 3 },
			[]string{"storm, a clone follows its route, seconds at p99: 0.5, to reach 0.01", "storm: 3 clones did not follow their routes"},
		},
		"writes": {func(r *Results) { r.Writes.Remove = slow }, []string{"locks taken away by ip -batch, median: 4, to reach 1.5"}},
		"shrunk": {func(r *Results) { r.Memory.Shrunk.RSS = 180 << 20 }, []string{"resident memory when the tables have shrunk, by a fresh agent's: 10, to reach 2"}},
		"idle": {
			func(r *Results) { r.Idle.Rounds, r.Idle.EmptyRounds = 2, 7 },
			[]string{"idle: 2 rounds in 30 s, to reach 0", "rounds for 5 changes that concern nothing: 7, to reach 0"},
		},
	} {
		r := good()
		c.spoil(r)
		if d := cmp.Diff(c.want, r.Missed()); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestTableIsPutBetweenItsMarks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(file, []byte("before\n"+tableBegin+"\nold\n"+tableEnd+"\nafter\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := good().WriteTable(file); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := "before\n" + tableBegin + "\n\n" + good().Markdown() + "\n" + tableEnd + "\nafter\n"
	if d := cmp.Diff(want, string(text)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if err := os.WriteFile(file, []byte("no marks"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := good().WriteTable(file); err == nil {
		t.Error("a page without the marks is written")
	}
}

// TestPageHasTheMarks holds docs/bench.md and README.md to what `make bench` writes there.
func TestPageHasTheMarks(t *testing.T) {
	for _, page := range []string{"docs/bench.md", "README.md"} {
		text, err := os.ReadFile("../../" + page)
		if err != nil {
			t.Fatal(err)
		}
		begin, end := strings.Index(string(text), tableBegin), strings.Index(string(text), tableEnd)
		if begin < 0 || end < begin {
			t.Errorf("%s: the marks are missing", page)
		}
	}
}

func TestShortTable(t *testing.T) {
	text := good().Short()
	for _, want := range []string{"| what | time | by that of the floor |", "by a straight line", "Resident when quiet: ", good().Machine.String()} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}
