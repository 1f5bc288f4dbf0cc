package suite

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
)

// Result is what came of one scenario, or of one package's tests, on one kernel. A file of results has one JSON object a line.
type Result struct {
	Name     string   `json:"name"` // Script.Name, or a package
	Kernel   string   `json:"kernel"`
	Emulator string   `json:"emulator"`
	Cards    []string `json:"cards,omitempty"`
	Outcome  string   `json:"outcome"` // pass, fail or skip
	Reason   string   `json:"reason,omitempty"`
	Seconds  float64  `json:"seconds"`
	Tree     string   `json:"tree"` // the commit
}

// Append adds a result to a file.
func (r Result) Append(file string) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	// One write, so that several processes can add to one file.
	_, err = f.Write(append(text, '\n'))
	return errors.Join(err, f.Close())
}

// Read returns the results in a file, none where there is no such file. The last one of a scenario on a kernel counts, so that a run in parts, and
// one of what failed before, add up.
func Read(file string) ([]Result, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var results []Result
	at := map[[2]string]int{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var r Result
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		key := [2]string{r.Name, r.Kernel}
		if i, ok := at[key]; ok {
			results[i] = r
			continue
		}
		at[key] = len(results)
		results = append(results, r)
	}
	return results, lines.Err()
}

// Write makes a file of results anew, a line each, in an order in which a run of a part changes only that part's lines.
func Write(file string, results []Result) error {
	var text bytes.Buffer
	lines := json.NewEncoder(&text)
	for _, r := range slices.SortedStableFunc(slices.Values(results), func(a, b Result) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), byVersion(a.Kernel, b.Kernel))
	}) {
		if err := lines.Encode(r); err != nil {
			return err
		}
	}
	return os.WriteFile(file, text.Bytes(), 0o644)
}

// failLine is how testscript ends a log: with the place in the script.
var failLine = regexp.MustCompile(`(?m)^\s*FAIL: \S+\.txtar:(\d+): (.*)$`)

// WhereItFailed is the place in the script, as its log tells it.
func WhereItFailed(log string) string {
	if m := failLine.FindStringSubmatch(log); m != nil {
		return "line " + m[1]
	}
	return "without a word"
}

// Markdown is the table: a row for each scenario, and behind them one for each of the packages, a column for each kernel.
func Markdown(scripts []Script, packages []string, results []Result) string {
	t := table{results: map[[2]string]Result{}}
	for _, r := range results {
		t.results[[2]string{r.Name, r.Kernel}] = r
		t.kernels, t.emulators, t.trees = with(t.kernels, r.Kernel), with(t.emulators, r.Emulator), with(t.trees, r.Tree)
	}
	slices.SortFunc(t.kernels, byVersion)
	var rows strings.Builder
	for i := 0; i < len(scripts); {
		end := i + 1
		for end < len(scripts) && scripts[end].File == scripts[i].File {
			end++
		}
		t.scenario(&rows, scripts[i:end])
		i = end
	}
	for _, pkg := range packages {
		fmt.Fprintf(&rows, "| the tests of %s | |", pkg)
		for _, kernel := range t.kernels {
			fmt.Fprintf(&rows, " %s |", t.cell([]string{pkg}, kernel))
		}
		rows.WriteByte('\n')
	}
	head := "| scenario | first card |" + strings.Repeat(" %s |", len(t.kernels)) + "\n| --- | --- |" + strings.Repeat(" --- |", len(t.kernels)) + "\n"
	kernels := make([]any, len(t.kernels))
	for i, k := range t.kernels {
		kernels[i] = k
	}
	return fmt.Sprintf("%s; at %s. %s\n\n", strings.Join(t.emulators, ", "), strings.Join(t.trees, ", "), t.counts()) + fmt.Sprintf(head, kernels...) + rows.String()
}

// table is a table in the making.
type table struct {
	results                         map[[2]string]Result // by name and kernel
	kernels, emulators, trees       []string
	passed, failed, skipped, notRun int
	seconds                         float64
}

func with(list []string, item string) []string {
	if item == "" || slices.Contains(list, item) {
		return list
	}
	return append(list, item)
}

// number finds the numbers in a version.
var number = regexp.MustCompile(`\d+`)

// byVersion compares versions by their numbers: 6.1 is before 6.12.
func byVersion(a, b string) int {
	x, y := number.FindAllString(a, -1), number.FindAllString(b, -1)
	for i := range min(len(x), len(y)) {
		if d := len(x[i]) - len(y[i]); d != 0 {
			return d
		}
		if d := strings.Compare(x[i], y[i]); d != 0 {
			return d
		}
	}
	return strings.Compare(a, b)
}

// scenario writes the row of one scenario.
func (t *table) scenario(w *strings.Builder, variants []Script) {
	s := variants[0]
	var names, cards []string
	for _, v := range variants {
		names = append(names, v.Name())
		for _, kernel := range t.kernels {
			if r := t.results[[2]string{v.Name(), kernel}]; len(r.Cards) > 0 {
				cards = with(cards, r.Cards[0])
			}
		}
	}
	fmt.Fprintf(w, "| [%s](../e2e/%s) | %s |", s.Scenario(), s.File, strings.Join(cards, ", "))
	for _, kernel := range t.kernels {
		fmt.Fprintf(w, " %s |", t.cell(names, kernel))
	}
	w.WriteByte('\n')
}

// cell says what came of a scenario's variants on a kernel: once, if it is the same of all.
func (t *table) cell(names []string, kernel string) string {
	var each, labelled, times []string
	for _, name := range names {
		r, ok := t.results[[2]string{name, kernel}]
		text := ""
		switch {
		case !ok:
			t.notRun++
			text = "not run"
		case r.Outcome == "pass":
			t.passed++
			text = "pass"
			if r.Reason != "" {
				text += ", " + r.Reason
			}
		case r.Outcome == "skip":
			t.skipped++
			text = r.Reason
		default:
			t.failed++
			text = "**fail**, " + r.Reason
		}
		if r.Outcome == "pass" || r.Outcome == "fail" {
			times = append(times, fmt.Sprintf("%.0f s", r.Seconds))
		}
		t.seconds += r.Seconds
		each = with(each, text)
		_, variant, _ := strings.Cut(name, "/")
		labelled = append(labelled, variant+": "+text)
	}
	text := strings.Join(each, "")
	if len(each) > 1 {
		text = strings.Join(labelled, "; ")
	}
	if times != nil {
		text += " (" + strings.Join(times, ", ") + ")"
	}
	return text
}

// counts are the sums. They are complete when all rows are written.
func (t *table) counts() string {
	text := fmt.Sprintf("%d passed, %d failed, %d skipped", t.passed, t.failed, t.skipped)
	if t.notRun > 0 {
		text += fmt.Sprintf(", %d not run", t.notRun)
	}
	return text + fmt.Sprintf("; %.0f minutes of machines in all.", t.seconds/60)
}
