package cures

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

// measured is a run of a few cases: one that is cured on one kernel and healthy on another, in both families, one that is not cured in one family,
// one that is never cured, one that is to stay as it is, and one whose figure from before is another's.
func measured() *Results {
	const rate, flows, lost = "Mbit/s", "connections", "datagrams lost in silence"
	return &Results{Machine: "2 × processor", Load: "1 and 2", Rounds: 2, Samples: []Sample{
		{"gre", "before", "v4", "6.12.117", 2, 0, rate, ""}, {"gre", "before", "v4", "6.12.117", 2.5, 0, rate, ""}, {"gre", "after", "v4", "6.12.117", 50, 0, rate, ""},
		{"gre", "before", "v6", "6.12.117", 4, 0, rate, ""}, {"gre", "after", "v6", "6.12.117", 60, 0, rate, ""},
		{"gre", "before", "v4", "6.12.107", 340, 0, rate, ""}, {"gre", "after", "v4", "6.12.107", 320, 0, rate, ""},
		{"covered", "before", "v4", "6.12.117", 200, 0, rate, ""}, {"covered", "after", "v4", "6.12.117", 190, 0, rate, ""},
		{"underlay", "before", "v4", "6.12.117", 0, 4, flows, ""}, {"underlay", "after", "v4", "6.12.117", 4, 4, flows, ""},
		{"underlay", "before", "v4", "6.12.117", 0.001, 0, rate, ""}, {"underlay", "after", "v4", "6.12.117", 43, 0, rate, ""},
		{"underlay", "before", "v6", "6.12.117", 0, 4, flows, ""}, {"underlay", "after", "v6", "6.12.117", 0, 4, flows, ""},
		{"df", "before", "v4", "6.12.117", 8, 8, lost, ""}, {"df", "after", "v4", "6.12.117", 0, 8, lost, "8 refused with MTU 1446"},
		{"noclamp", "before", "v4", "6.12.117", 0, 4, flows, ""}, {"noclamp", "after", "v4", "6.12.117", 0, 4, flows, ""},
		{"clamp", "after", "v4", "6.12.117", 4, 4, flows, ""},
		{"open", "after", "v4", "6.12.117", 0, 0, rate, ""},
		{"by-hand", "before", "v4", "6.12.117", 4, 4, flows, ""},
	}}
}

// rowsOf are the rows of a table that are no heads, by what stands first.
func rowsOf(table string) map[string]string {
	rows := map[string]string{}
	for line := range strings.Lines(table) {
		what, rest, ok := strings.Cut(strings.TrimPrefix(line, "| "), " | ")
		if ok && strings.HasPrefix(line, "| ") && what != "trouble" && what != "---" {
			rows[what], _ = strings.CutSuffix(strings.TrimSpace(rest), " |")
		}
	}
	return rows
}

func what(name string) string { return Cases[order(name)].What }

func TestShortHasWhatIsCured(t *testing.T) {
	want := map[string]string{
		what("gre") + ", Linux 6.12.117": "2.5 / 4.0 Mbit/s | 50 / 60 Mbit/s | 20 / 15 | TSO off on the tunnel device",
		what("covered") + ", IPv4":       "200 Mbit/s | 190 Mbit/s | 0.9 | " + Cases[order("covered")].Done,
		what("underlay") + ", IPv4":      "0 of 4 connections, 0 Mbit/s | 4 of 4 connections, 43 Mbit/s |  | " + Cases[order("underlay")].Done,
		what("df") + ", IPv4":            "8 of 8 lost | 0 of 8 lost |  | " + Cases[order("df")].Done,
		what("clamp") + ", IPv4":         "0 of 4 connections | 4 of 4 connections |  | " + Cases[order("clamp")].Done,
	}
	if d := gocmp.Diff(want, rowsOf(measured().Short())); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestUncuredHasTheRest(t *testing.T) {
	want := map[string]string{
		what("gre") + ", Linux 6.12.107, IPv4": "340 Mbit/s | 320 Mbit/s | 0.9 | " + Cases[order("gre")].Not,
		what("underlay") + ", IPv6":            "0 of 4 connections | 0 of 4 connections |  | routers don't fragment IPv6",
		what("noclamp") + ", IPv4":             "0 of 4 connections | 0 of 4 connections |  | " + Cases[order("noclamp")].Done,
		what("open") + ", IPv4":                "- | 0 Mbit/s |  | " + Cases[order("open")].Done,
	}
	if d := gocmp.Diff(want, rowsOf(measured().Uncured())); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestLongHasAll(t *testing.T) {
	long := measured().Long()
	for _, want := range []string{
		"| 6.12.107 | IPv4 | 340 Mbit/s | 320 Mbit/s | 0.9 |", "| IPv6 | 4.0 Mbit/s | 60 Mbit/s | 15 |", "0 of 8 lost (8 refused with MTU 1446)",
		"2 × processor; kernels of the test: 6.12.107, 6.12.117 (user mode, one processor); 2 rounds",
	} {
		if !strings.Contains(long, want) {
			t.Errorf("no %q in\n%s", want, long)
		}
	}
	if strings.Contains(long, "by-hand") {
		t.Errorf("a control is in\n%s", long)
	}
}

func TestBoth(t *testing.T) {
	for _, test := range []struct{ v4, v6, want string }{
		{"8 of 8 connections", "8 of 8 connections", "8 of 8 connections"},
		{"2.5 Mbit/s", "4.0 Mbit/s", "2.5 / 4.0 Mbit/s"},
		{"8 of 8 connections, 389 Mbit/s", "8 of 8 connections, 294 Mbit/s", "8 of 8 connections, 389 / 294 Mbit/s"},
		{"8 of 8 connections, 389 Mbit/s", "7 of 8 connections, 294 Mbit/s", "8 of 8 connections, 389 / 7 of 8 connections, 294 Mbit/s"},
		{"2 of 4 connections", "4 of 4 connections", "2 of 4 / 4 of 4 connections"},
		{"206", "83", "206 / 83"},
		{"-", "-", "-"},
	} {
		if got := both([]string{test.v4, test.v6}); got != test.want {
			t.Errorf("%q and %q: got %q, want %q", test.v4, test.v6, got, test.want)
		}
	}
}

// figures finds what scenarios measure: the case, and when.
var figures = regexp.MustCompile(`(?m)^(?:\[.*\] )?(?:rate|speed|flows|datagrams) ([\w-]+)/(before|after) `)

// TestEachCaseIsMeasured holds the cases to the scenarios, and each to both families.
func TestEachCaseIsMeasured(t *testing.T) {
	files, err := filepath.Glob("../testdata/scenarios/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	got := map[string]bool{"md5/before": true, "md5/after": true} // in e2e/peers
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := figures.FindAllStringSubmatch(string(text), -1)
		for _, m := range found {
			got[m[1]+"/"+m[2]] = true
		}
		for _, variant := range []string{"v4", "v6"} {
			if len(found) > 0 && !strings.Contains(string(text), "\n-- variant-"+variant+".env --\n") {
				t.Errorf("%s measures, and has no variant %s", file, variant)
			}
		}
	}
	for _, c := range Cases {
		before := c.Name
		if c.Before != "" {
			before = c.Before
		}
		// What is open when the agent is there was opened by it: there is no before.
		for _, name := range []string{before + "/before", c.Name + "/after"} {
			if !got[name] && name != "open/before" {
				t.Errorf("no scenario measures %s", name)
			}
		}
	}
	for name := range got {
		name, _, _ = strings.Cut(name, "/")
		if order(name) < 0 && !slices.Contains(controls, name) {
			t.Errorf("%s is measured, and is no case", name)
		}
	}
}

// TestPagesHaveTheMarks holds the pages to what `make cures` writes there.
func TestPagesHaveTheMarks(t *testing.T) {
	for _, page := range []string{"docs/cures.md", "docs/limits.md", "README.md"} {
		text, err := os.ReadFile("../../" + page)
		if err != nil {
			t.Fatal(err)
		}
		_, rest, ok := strings.Cut(string(text), "<!-- cures: begin, written by `make cures` -->")
		table, _, ok2 := strings.Cut(rest, "<!-- cures: end -->")
		if !ok || !ok2 {
			t.Errorf("%s: the marks are missing", page)
		}
		if len(rowsOf(table)) == 0 {
			t.Errorf("%s: no figures between the marks", page)
		}
	}
}
