package e2e

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// step is a command with what it prints: in the document as it was printed, in the scenario as expressions.
type step struct {
	command string
	output  []string
}

// TestFirstSteps holds docs/first-steps.md to the scenario that runs its commands: the same ones in the same order, and what the
// document prints is what the scenario wants to see.
func TestFirstSteps(t *testing.T) {
	doc, err := os.ReadFile("../docs/first-steps.md")
	if err != nil {
		t.Fatal(err)
	}
	scenario, err := os.ReadFile("testdata/scenarios/74-first-steps.txtar")
	if err != nil {
		t.Fatal(err)
	}
	printed, run := consoleOf(string(doc)), stepsOf(string(scenario))
	if len(printed) < 10 {
		t.Fatalf("only %d commands in docs/first-steps.md", len(printed))
	}
	at := 0
	for _, p := range printed {
		i := slices.IndexFunc(run[at:], func(s step) bool { return s.command == p.command })
		if i < 0 {
			t.Fatalf("%q of docs/first-steps.md isn't run by the scenario, or not in that order", p.command)
		}
		s := run[at+i]
		at += i + 1
		for _, want := range s.output {
			if re := regexp.MustCompile("(?m)" + want); !re.MatchString(strings.Join(p.output, "\n")) {
				t.Errorf("%q prints nothing in docs/first-steps.md that matches %s:\n%s", p.command, want, strings.Join(p.output, "\n"))
			}
		}
	}
}

// consoleOf are the commands in the document's console blocks.
func consoleOf(doc string) []step {
	var steps []step
	inside := false
	for _, line := range strings.Split(doc, "\n") {
		command, typed := strings.CutPrefix(line, "# ")
		switch {
		case strings.HasPrefix(line, "```"):
			inside = line == "```console"
		case !inside:
		case typed:
			steps = append(steps, step{command: command})
		case len(steps) > 0:
			last := &steps[len(steps)-1]
			last.output = append(last.output, line)
		}
	}
	return steps
}

var (
	inLeft   = regexp.MustCompile(`^(?:! )?in left (.*)$`)
	byShell  = regexp.MustCompile(`^sh -c 'exec (.*) 2>.*' &\w+&$`)
	stdout   = regexp.MustCompile(`^stdout (.*)$`)
	variable = regexp.MustCompile(`\$(\w+)`)
)

// stepsOf are the commands that the scenario's IPv4 variant runs on the left, with what it looks for in their output.
func stepsOf(scenario string) []step {
	body, files, _ := strings.Cut(scenario, "\n-- ")
	env := map[string]string{}
	_, v4, _ := strings.Cut(files, "-- variant-v4.env --\n")
	for _, line := range strings.Split(v4, "\n") {
		if strings.HasPrefix(line, "-- ") {
			break
		}
		for _, word := range strings.Fields(line) {
			if name, value, ok := strings.Cut(word, "="); ok {
				env[name] = value
			}
		}
	}
	expand := func(s string) string {
		return variable.ReplaceAllStringFunc(s, func(v string) string {
			if value, ok := env[v[1:]]; ok {
				return value
			}
			return v
		})
	}
	var steps []step
	for _, line := range strings.Split(body, "\n") {
		if m := inLeft.FindStringSubmatch(line); m != nil {
			command := m[1]
			if sh := byShell.FindStringSubmatch(command); sh != nil {
				command = sh[1]
			}
			steps = append(steps, step{command: expand(command)})
		} else if m := stdout.FindStringSubmatch(line); m != nil && len(steps) > 0 {
			last := &steps[len(steps)-1]
			last.output = append(last.output, strings.ReplaceAll(expand(m[1]), "'", ""))
		}
	}
	return steps
}
