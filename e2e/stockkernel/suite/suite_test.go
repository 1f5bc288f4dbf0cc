package suite

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tsoagent/e2e/stockkernel"
)

// e2e is the directory with the scenarios.
const e2e = "../.."

func scripts(t *testing.T) []Script {
	t.Helper()
	all, err := Scripts(e2e)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestEachScenarioIsThere: all of the tree's, each variant once, under names of their own.
func TestEachScenarioIsThere(t *testing.T) {
	names := map[string]bool{}
	files := map[string]bool{}
	for _, s := range scripts(t) {
		if names[s.Name()] {
			t.Errorf("two scenarios are called %s", s.Name())
		}
		names[s.Name()], files[s.File] = true, true
	}
	all, err := filepath.Glob(e2e + "/testdata/*/*.txtar")
	if err != nil || len(files) != len(all) {
		t.Errorf("scenarios of %d files; there are %d (%v)", len(files), len(all), err)
	}
	for _, special := range []map[string]string{alone, cardless} {
		for name, why := range special {
			if !names[name] {
				t.Errorf("%s, of which is said %q, is no scenario", name, why)
			}
		}
	}
}

// TestEachCardComesFirst: the scenarios that lay wires are spread over the cards.
func TestEachCardComesFirst(t *testing.T) {
	cards := stockkernel.AllCards()
	first := map[string]int{}
	for _, s := range scripts(t) {
		got := s.Cards(cards)
		if got == nil {
			continue
		}
		first[got[0]]++
		slices.Sort(got)
		want := slices.Sorted(slices.Values(cards))
		if slices.Contains(cards, s.Variant) {
			want = []string{s.Variant}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s has %v of %v", s.Name(), got, want)
		}
	}
	for _, card := range cards {
		if first[card] < 5 {
			t.Errorf("%s comes first %d times: %v", card, first[card], first)
		}
	}
	if (Script{File: "x.txtar", Text: []byte("exec true")}).Cards(cards) != nil {
		t.Error("cards for a scenario without wires")
	}
	if lacp := (Script{File: "62-stacks-ports.txtar", Variant: "bond-v4", Text: []byte("nic left port1 right port1")}); lacp.Cards(cards) != nil {
		t.Error("cards for a scenario that joins links of one speed")
	}
}

// TestPartsAddUp: what is run again replaces what was, and the rest stays.
func TestPartsAddUp(t *testing.T) {
	file := filepath.Join(t.TempDir(), "results")
	if results, err := Read(file); err != nil || results != nil {
		t.Errorf("of no file: %v, %v", results, err)
	}
	for _, r := range []Result{
		{Name: "a/v4", Kernel: "6.1", Outcome: "fail", Reason: "line 7"},
		{Name: "a/v4", Kernel: "6.12", Outcome: "pass"},
		{Name: "a/v4", Kernel: "6.1", Outcome: "pass", Seconds: 2},
	} {
		if err := r.Append(file); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Read(file)
	want := []Result{{Name: "a/v4", Kernel: "6.1", Outcome: "pass", Seconds: 2}, {Name: "a/v4", Kernel: "6.12", Outcome: "pass"}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
	slices.Reverse(got)
	if err := Write(file, got); err != nil {
		t.Fatal(err)
	}
	if again, err := Read(file); err != nil || cmp.Diff(want, again) != "" {
		t.Errorf("written anew: %v, %v", again, err)
	}
	if err := os.WriteFile(file, []byte("no JSON\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(file); err == nil {
		t.Error("no error for what is no result")
	}
}

// TestTable: a failure is named as such with its place, so is what is missing, and what was not run; the older kernel comes first.
func TestTable(t *testing.T) {
	two := func(name string) []Script {
		return []Script{{File: "testdata/scenarios/" + name + ".txtar", Variant: "v4"}, {File: "testdata/scenarios/" + name + ".txtar", Variant: "v6"}}
	}
	list := slices.Concat(two("10-story"), two("20-kill"), []Script{{File: "testdata/stockkernel/30-churn.txtar"}}, two("40-new"))
	var results []Result
	add := func(kernel, name, outcome, reason string, seconds float64, cards ...string) {
		results = append(results, Result{Name: name, Kernel: kernel, Emulator: "QEMU 7.2", Cards: cards, Outcome: outcome, Reason: reason, Seconds: seconds, Tree: "abc"})
	}
	add("6.12.1+x", "10-story/v4", "pass", "", 60, "e1000e", "virtio")
	add("6.12.1+x", "10-story/v6", "pass", "", 61, "virtio", "e1000e")
	add("6.1.9", "10-story/v4", "pass", "", 50, "e1000e", "virtio")
	add("6.1.9", "10-story/v6", "fail", WhereItFailed("> x\nFAIL: /tmp/s/10-story.txtar:17: stdout: no match\n"), 70)
	add("6.1.9", "20-kill/v4", "skip", "needs bonds", 10)
	add("6.1.9", "20-kill/v6", "skip", "needs bonds", 10)
	add("6.1.9", "30-churn", "pass", "", 40)
	add("6.12.1+x", "30-churn", "fail", WhereItFailed("the machine died"), 0)
	add("6.12.1+x", "wire", "pass", "", 9)
	want := `QEMU 7.2; at abc. 5 passed, 2 failed, 2 skipped, 7 not run; 5 minutes of machines in all.

| scenario | first card | 6.1.9 | 6.12.1+x |
| --- | --- | --- | --- |
| [10-story](../e2e/testdata/scenarios/10-story.txtar) | e1000e, virtio | v4: pass; v6: **fail**, line 17 (50 s, 70 s) | pass (60 s, 61 s) |
| [20-kill](../e2e/testdata/scenarios/20-kill.txtar) |  | needs bonds | not run |
| [30-churn](../e2e/testdata/stockkernel/30-churn.txtar) |  | pass (40 s) | **fail**, without a word (0 s) |
| [40-new](../e2e/testdata/scenarios/40-new.txtar) |  | not run | not run |
| the tests of wire | | not run | pass (9 s) |
`
	if diff := cmp.Diff(want, Markdown(list, []string{"wire"}, results)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
