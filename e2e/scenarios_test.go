// Package e2e runs the binaries of this project in the test kernel, as they are: it knows none of the packages.
package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"tsoagent/e2e/stockkernel/suite"
	"tsoagent/e2e/testkernel"
)

// deadline ends a scenario that hangs. None of them takes a quarter of it on two processors that have nothing else to do: a machine that
// is slow, or busy, may take its time.
const deadline = 15 * time.Minute

// kernelPackages are those with tests that want the test kernel: tests with Kernel in their name.
var kernelPackages = []string{"xfrmwatch", "routes", "ethtool", "sockopt", "lane", "l2tp", "wire", "agent", "e2e/owners"}

// bench is what all machines share.
type bench struct {
	kernel    string
	kernelErr error // why there is no test kernel
	tree      string
	binaries  string
	// slots limits the machines that run at once to what the host has processors for: each keeps one busy.
	slots chan struct{}
	// commandsErr is why tsoagent or tsoctl doesn't build. It fails only the scenarios that use them.
	commandsErr error
}

var sharedBench = sync.OnceValues(func() (*bench, error) {
	ctx := context.Background()
	tree, err := filepath.Abs("..")
	if err != nil {
		return nil, err
	}
	b := &bench{
		tree:     tree,
		binaries: filepath.Join(workDir, "bin"),
		slots:    make(chan struct{}, runtime.NumCPU()),
	}
	b.kernel, b.kernelErr = testkernel.Find(ctx, tree)
	b.commandsErr = testkernel.BuildCommands(ctx, tree, b.binaries)
	return b, testkernel.BuildGuest(ctx, tree, b.binaries)
})

// workDir holds the binaries and each machine's directory.
var workDir string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "tsoagent-e2e-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		workDir = dir
		return m.Run()
	}())
}

// newBench returns the shared bench, or skips the test if there is no test kernel.
func newBench(t testing.TB) *bench {
	t.Helper()
	b, err := sharedBench()
	if err != nil {
		t.Fatal(err)
	}
	if errors.Is(b.kernelErr, testkernel.ErrNotBuilt) {
		t.Skip(b.kernelErr)
	}
	if b.kernelErr != nil {
		t.Fatal(b.kernelErr)
	}
	return b
}

// run runs a job in a machine of its own. It waits for a free slot first.
func (b *bench) run(t *testing.T, job ...string) *testkernel.Result {
	t.Helper()
	b.slots <- struct{}{}
	defer func() { <-b.slots }()
	return b.boot(t, testkernel.Machine{Kernel: b.kernel, Deadline: deadline}, job...)
}

// boot runs a job in the machine, whose kernel and deadline are set.
func (b *bench) boot(t testing.TB, machine testkernel.Machine, job ...string) *testkernel.Result {
	t.Helper()
	dir, err := os.MkdirTemp(workDir, "machine-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	machine.Binaries, machine.Tree, machine.Dir = b.binaries, b.tree, dir
	result, err := machine.Run(t.Context(), job...)
	if err != nil {
		if result != nil {
			t.Logf("console:\n%s\nlog:\n%s", result.Console, result.Log)
		}
		t.Fatal(err)
	}
	return result
}

func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/scenarios/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		for _, s := range variantsOf(t, file) {
			t.Run(s.Name(), func(t *testing.T) {
				t.Parallel()
				b := newBench(t)
				s.run(t, b, b.run)
			})
		}
	}
}

// script is a scenario, or one variant of it.
type script struct{ suite.Script }

// variantsOf returns the scenario in a file once for each of its variants.
func variantsOf(t *testing.T, file string) []script {
	t.Helper()
	variants, err := suite.Variants(".", file)
	if err != nil {
		t.Fatal(err)
	}
	var scripts []script
	for _, v := range variants {
		scripts = append(scripts, script{v})
	}
	return scripts
}

// job is what a machine is told to run it.
func (s script) job() []string {
	args := []string{"scenario", filepath.Join("e2e", s.File)}
	if s.Variant != "" {
		args = append(args, "-variant="+s.Variant)
	}
	if testing.Verbose() {
		args = append(args, "-v")
	}
	return args
}

// run runs the scenario as a job of one of the bench's machines, and judges the result.
func (s script) run(t *testing.T, b *bench, job func(*testing.T, ...string) *testkernel.Result) {
	if b.commandsErr != nil && usesCommands.Match(s.Text) {
		t.Fatal(b.commandsErr)
	}
	result := job(t, s.job()...)
	t.Logf("took %v\n%s", result.Took.Round(time.Millisecond), result.Log)
	switch result.Outcome {
	case "pass":
	case "skip":
		t.Skip(result.Reason)
	default:
		if crash.MatchString(result.Console) {
			t.Logf("console:\n%s", result.Console)
		}
		t.Fail()
	}
}

// usesCommands finds the scenarios that need tsoagent or tsoctl.
var usesCommands = regexp.MustCompile(`\btso(agent|ctl)\s`)

// crash is what the kernel prints when something is wrong with it.
var crash = regexp.MustCompile(`Kernel panic|BUG:|WARNING:|Call Trace:`)

// TestPackagesInTestKernel runs the packages' own kernel tests in the test kernel, which has devices and SAs that the host's
// kernel may lack, and reports each of them under its name.
func TestPackagesInTestKernel(t *testing.T) {
	for _, pkg := range kernelPackages {
		t.Run(pkg, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			binary, err := testkernel.BuildTest(t.Context(), b.tree, pkg, b.binaries)
			if err != nil {
				t.Fatal(err)
			}
			if binary == "" {
				t.Log("no tests")
				return
			}
			result := b.run(t, "test", pkg, binary, "-test.v", "-test.run", "Kernel", "-test.timeout", (deadline - 10*time.Second).String())
			reportTests(t, result)
		})
	}
}

// reportTests reports the tests that ran in a machine under their names.
func reportTests(t *testing.T, result *testkernel.Result) {
	t.Helper()
	for _, test := range parseTests(result.Log) {
		t.Run(test.name, func(t *testing.T) {
			switch test.outcome {
			case "SKIP":
				t.Skip(test.reason)
			case "FAIL":
				t.Fail()
			}
		})
	}
	if result.Outcome != "pass" || testing.Verbose() {
		t.Log(result.Log)
	}
	if result.Outcome != "pass" {
		t.Fail()
	}
}

// outcome is one test's result as `-test.v` prints it.
type outcome struct{ name, outcome, reason string }

var outcomeLine = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) `)

// parseTests reads the output of a test binary. The reason of a skip is the line ahead of it.
func parseTests(log string) []outcome {
	var outcomes []outcome
	var before string
	for line := range strings.SplitSeq(log, "\n") {
		if m := outcomeLine.FindStringSubmatch(line); m != nil {
			o := outcome{name: m[2], outcome: m[1]}
			if o.outcome == "SKIP" {
				o.reason = before
			}
			outcomes = append(outcomes, o)
			continue
		}
		before = strings.TrimSpace(line)
	}
	return outcomes
}

func TestParseTests(t *testing.T) {
	got := parseTests("=== RUN   TestA\n    a_test.go:3: no ESP here\n--- SKIP: TestA (0.00s)\n=== RUN   TestB\n--- PASS: TestB (0.10s)\nPASS\n")
	want := []outcome{{"TestA", "SKIP", "a_test.go:3: no ESP here"}, {"TestB", "PASS", ""}}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("got %v, want %v", got, want)
	}
}
