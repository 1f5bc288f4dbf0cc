package scenario

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// mask is a part of some program's output that changes by itself.
type mask struct {
	pattern *regexp.Regexp
	with    string
}

// masks hide timers, counters and what a lookup leaves behind.
var masks = []mask{
	{regexp.MustCompile(`expires -?\d+sec`), "expires -"},
	{regexp.MustCompile(`(users|used|age) \d+(sec)?`), "$1 -"},
	{regexp.MustCompile(`((?:hello|tcn|topology_change|gc)_timer)\s+[\d.]+`), "$1 -"},
	{regexp.MustCompile(`packets \d+ bytes \d+`), "packets - bytes -"},
	{regexp.MustCompile(`[ \t]+(\n|$)`), "$1"},
}

// section is one part of a snapshot.
type section struct {
	title   string
	sorted  bool // lines whose order means nothing
	program []string
}

// sections are what the agent might change, and what it must put back.
var sections = []section{
	// The order of rules of one priority means something, and ip prints it.
	{"rules 4", false, []string{"ip", "-d", "-4", "rule", "show"}},
	{"rules 6", false, []string{"ip", "-d", "-6", "rule", "show"}},
	{"routes 4", true, []string{"ip", "-o", "-d", "-4", "route", "show", "table", "all"}},
	{"routes 6", true, []string{"ip", "-o", "-d", "-6", "route", "show", "table", "all"}},
	{"nexthops", true, []string{"ip", "-o", "-d", "nexthop", "show"}},
	{"links", true, []string{"ip", "-o", "-d", "link", "show"}},
	{"qdiscs", true, []string{"tc", "qdisc", "show"}},
	{"nftables", false, []string{"nft", "list", "ruleset"}},
}

// snapshot writes a comparable text of everything that must be restored.
func (s *session) snapshot(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: snapshot namespace file")
	}
	ctx, cancel := context.WithTimeout(context.Background(), defaultPatience*patience())
	defer cancel()

	s.awaitAddresses(ctx, ts, args[0])
	var out strings.Builder
	for _, section := range sections {
		program := section.program
		if _, err := exec.LookPath(program[0]); err != nil {
			continue
		}
		if args[0] != "-" {
			program = append([]string{"ip", "netns", "exec", args[0]}, program...)
		}
		stdout, stderr, err := s.program(ctx, ts, program)
		if err != nil {
			ts.Fatalf("snapshot: %s: %v: %s", strings.Join(program, " "), err, stderr)
		}
		fmt.Fprintf(&out, "== %s\n%s", section.title, normalise(stdout, section.sorted))
	}
	lines, err := featureLines(args[0])
	ts.Check(err)
	fmt.Fprintf(&out, "== features\n%s\n", strings.Join(lines, "\n"))
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(out.String()), 0o644))
}

// awaitAddresses waits until duplicate address detection is over: the local routes of IPv6 addresses come only then, and a
// snapshot that is taken before would differ from one taken after.
func (s *session) awaitAddresses(ctx context.Context, ts *testscript.TestScript, namespace string) {
	program := []string{"ip", "-6", "addr", "show", "tentative"}
	if namespace != "-" {
		program = append([]string{"ip", "-n", namespace}, program[1:]...)
	}
	for {
		stdout, stderr, err := s.program(ctx, ts, program)
		if err != nil {
			ts.Fatalf("snapshot: %s: %v: %s", strings.Join(program, " "), err, stderr)
		}
		if stdout == "" {
			return
		}
		time.Sleep(pollInterval)
	}
}

// normalise masks what changes by itself and, where the order means nothing, sorts.
func normalise(text string, sorted bool) string {
	for _, m := range masks {
		text = m.pattern.ReplaceAllString(text, m.with)
	}
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if sorted {
		slices.Sort(lines)
	}
	if len(lines) == 1 && lines[0] == "" {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}
