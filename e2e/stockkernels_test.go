package e2e

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"tsoagent/e2e/stockkernel"
	"tsoagent/e2e/stockkernel/suite"
	"tsoagent/e2e/testkernel"
)

// stockVersions are Debian's kernels that the scenarios run on: bookworm's own, and the newer one in its security suite.
var stockVersions = []string{"6.1", "6.12"}

// stockVariable is all, or for how many seconds the stock kernels may take. Without it they are left out.
const stockVariable = "TSOAGENT_STOCK_KERNELS"

// stockDeadline ends a scenario that hangs. Emulation is slow, and slower beside others.
const stockDeadline = 20 * time.Minute

// stockBudget is the one budget of all that runs on stock kernels.
var stockBudget = sync.OnceValues(func() (*budget, error) { return newBudget(os.Getenv(stockVariable)) })

// stockKernels returns the bench and the kernels to run on. It skips the test where stock kernels are left out, and fails or skips a subtest for
// each kernel that isn't there.
func stockKernels(t *testing.T) (*bench, *budget, []*stockkernel.Kernel) {
	t.Helper()
	left, err := stockBudget()
	if err != nil {
		t.Fatal(err)
	}
	if left == nil {
		t.Skip("stock kernels are left out: make test-kernels runs them")
	}
	b, err := sharedBench()
	if err != nil {
		t.Fatal(err)
	}
	if err := stockkernel.BuildLoader(t.Context(), b.tree, b.binaries); err != nil {
		t.Fatal(err)
	}
	var kernels []*stockkernel.Kernel
	for _, version := range stockVersions {
		kernel, err := stockkernel.Find(t.Context(), b.tree, version)
		if err != nil {
			t.Run(version, func(t *testing.T) { skipOrFail(t, err) })
			continue
		}
		kernels = append(kernels, kernel)
	}
	return b, left, kernels
}

// TestStockKernels runs scenarios on Debian's stock kernels: several in each machine, as many machines at once as there are processors (each keeps one
// busy), and where the time is limited one after the other, in order, in a machine each.
func TestStockKernels(t *testing.T) {
	b, left, kernels := stockKernels(t)
	wanted, err := wantedScenarios()
	if err != nil {
		t.Fatal(err)
	}
	all, err := suite.Scripts(".")
	if err != nil {
		t.Fatal(err)
	}
	var batches []stockBatch
	for _, s := range all {
		for _, kernel := range kernels {
			switch name := s.Name() + "/" + kernel.Release(); {
			case !wanted(s.Name(), kernel.Release()):
			case slices.Contains(stockkernel.AllCards(), s.Variant) && !slices.Contains(kernel.Cards(), s.Variant):
				t.Run(name, func(t *testing.T) {
					r := suite.Result{Name: s.Name(), Reason: fmt.Sprintf("no %s in this QEMU", s.Variant)}
					defer record(t, kernel, &r)
					t.Skipf("%s needs a newer QEMU: %s has no such card", s.Name(), kernel.Emulator())
				})
			default:
				batches = append(batches, stockBatch{kernel, []suite.Script{s}})
			}
		}
	}
	workers := 1
	if left.limit == 0 {
		batches, workers = joined(batches), runtime.NumCPU()
	}
	queue := make(chan stockBatch, len(batches))
	for _, batch := range batches {
		queue <- batch
	}
	close(queue)
	var done sync.WaitGroup
	for range workers {
		done.Go(func() {
			for batch := range queue {
				batch.run(t, b, left)
			}
		})
	}
	done.Wait()
}

// onlyVariable is a regular expression: of the scenarios NAME/VARIANT/RELEASE only those that it matches are run. And where missingVariable is set, only
// those of them that have not passed yet, by the file of results.
const (
	onlyVariable    = "TSOAGENT_STOCK_ONLY"
	missingVariable = "TSOAGENT_STOCK_MISSING"
)

// wantedScenarios returns which of the scenarios are to be run on which kernel.
func wantedScenarios() (func(name, release string) bool, error) {
	only, err := regexp.Compile(os.Getenv(onlyVariable))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", onlyVariable, err)
	}
	passed := map[string]bool{}
	if os.Getenv(missingVariable) != "" {
		results, err := suite.Read(os.Getenv(resultsVariable))
		if err != nil {
			return nil, err
		}
		for _, r := range results {
			passed[r.Name+"/"+r.Kernel] = r.Outcome == "pass"
		}
	}
	return func(name, release string) bool {
		return only.MatchString(name+"/"+release) && !passed[name+"/"+release]
	}, nil
}

// stockBatch is what one machine runs.
type stockBatch struct {
	kernel  *stockkernel.Kernel
	scripts []suite.Script
}

// joined puts scenarios of one kernel together, but for those that want a machine of their own.
func joined(singles []stockBatch) (batches []stockBatch) {
	const size = 8
	open := map[*stockkernel.Kernel]int{} // the batch that isn't full yet
	for _, single := range singles {
		i, ok := open[single.kernel]
		switch {
		case single.scripts[0].Alone():
			batches = append(batches, single)
		case !ok || len(batches[i].scripts) == size:
			open[single.kernel] = len(batches)
			batches = append(batches, single)
		default:
			batches[i].scripts = append(batches[i].scripts, single.scripts[0])
		}
	}
	return batches
}

// run runs the batch in one machine, and what that didn't get to in others, and reports each scenario under its name.
func (batch stockBatch) run(t *testing.T, b *bench, left *budget) {
	for scripts := batch.scripts; len(scripts) > 0; {
		if name := scripts[0].Name() + "/" + batch.kernel.Release(); !left.allows() {
			t.Run(name, func(t *testing.T) {
				t.Skipf("left out: %s, for want of time (%s=%s); make test-kernels runs it", name, stockVariable, os.Getenv(stockVariable))
			})
			scripts = scripts[1:]
			continue
		}
		start := time.Now()
		results, err := batch.boot(t, b, scripts)
		left.took(time.Since(start))
		if err != nil {
			results = []*testkernel.Result{{Outcome: "fail", Reason: "no machine", Log: err.Error()}}
		}
		for i, result := range results {
			batch.report(t, b, scripts[i], result)
		}
		scripts = scripts[len(results):]
	}
}

// boot runs scenarios in one machine.
func (batch stockBatch) boot(t *testing.T, b *bench, scripts []suite.Script) ([]*testkernel.Result, error) {
	dir, err := os.MkdirTemp(workDir, "machine-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	machine := testkernel.Machine{Boot: batch.kernel.Boot, Binaries: b.binaries, Tree: b.tree, Dir: dir}
	var jobs []testkernel.Job
	for _, s := range scripts {
		jobs = append(jobs, testkernel.Job{Args: script{s}.job(), Cards: s.Cards(batch.kernel.Cards())})
	}
	results, log, err := machine.RunBatch(t.Context(), stockDeadline, jobs)
	if err == nil && len(results) < len(jobs) {
		t.Logf("%s: %d of %d scenarios in this machine: %s", batch.kernel.Release(), len(results), len(jobs), log)
	}
	return results, err
}

// report is the test of one scenario, and records what came of it. A failure is one, also behind others: what those leave is a fault of the batch.
func (batch stockBatch) report(t *testing.T, b *bench, s suite.Script, result *testkernel.Result) {
	t.Run(s.Name()+"/"+batch.kernel.Release(), func(t *testing.T) {
		r := suite.Result{Name: s.Name(), Cards: s.Cards(batch.kernel.Cards()), Reason: result.Reason, Seconds: result.Took.Seconds()}
		if result.Outcome == "fail" && r.Reason == "" {
			r.Reason = suite.WhereItFailed(result.Log)
		}
		defer record(t, batch.kernel, &r)
		script{s}.run(t, b, func(*testing.T, ...string) *testkernel.Result { return result })
	})
}

// resultsVariable names the file that gets what came of each scenario, for docs/kernels.md.
const resultsVariable = "TSOAGENT_STOCK_RESULTS"

// record adds to the file of results what came of the test, whose end it is.
func record(t *testing.T, kernel *stockkernel.Kernel, r *suite.Result) {
	file := os.Getenv(resultsVariable)
	if file == "" {
		return
	}
	r.Kernel, r.Emulator, r.Tree = kernel.Release(), kernel.Emulator(), os.Getenv("TSOAGENT_STOCK_TREE")
	switch {
	case t.Failed():
		r.Outcome = "fail"
		if r.Reason == "" {
			r.Reason = "no result" // the machine ended without one
		}
	case t.Skipped():
		r.Outcome = "skip"
	default:
		r.Outcome = "pass"
	}
	if err := r.Append(file); err != nil {
		t.Error(err)
	}
}

// TestPackagesInStockKernels runs packages' tests on stock kernels, and reports each of them under its name.
func TestPackagesInStockKernels(t *testing.T) {
	b, left, kernels := stockKernels(t)
	for _, kernel := range kernels {
		for _, pkg := range suite.Packages {
			t.Run(pkg+"/"+kernel.Release(), func(t *testing.T) {
				if !left.allows() {
					t.Skipf("left out for want of time (%s=%s); make test-kernels runs it", stockVariable, os.Getenv(stockVariable))
				}
				binary, err := testkernel.BuildTest(t.Context(), b.tree, pkg, b.binaries)
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				r := suite.Result{Name: pkg}
				defer record(t, kernel, &r)
				result := b.boot(t, testkernel.Machine{Boot: kernel.Boot, Deadline: stockDeadline},
					// The compiler isn't the kernel's affair.
					"test", pkg, binary, "-test.v", "-test.skip", "Reproducible", "-test.timeout", (stockDeadline - 10*time.Second).String())
				left.took(time.Since(start))
				r.Seconds = result.Took.Seconds()
				if result.Outcome == "fail" {
					r.Reason = "see what `make test-kernels` prints"
				}
				reportTests(t, result)
			})
		}
	}
}

// skipOrFail skips the test if the machine lacks something for stock kernels.
func skipOrFail(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, stockkernel.ErrMissing) {
		t.Skip(err)
	}
	t.Fatal(err)
}

// budget is a time that jobs share.
type budget struct {
	limit time.Duration // 0 for none

	mu      sync.Mutex
	used    time.Duration
	longest time.Duration // that a job took so far
}

// newBudget parses `all` or a number of seconds. It returns nil for nothing.
func newBudget(text string) (*budget, error) {
	switch text {
	case "", "0":
		return nil, nil
	case "all":
		return &budget{}, nil
	}
	seconds, err := strconv.Atoi(text)
	if err != nil || seconds < 0 {
		return nil, fmt.Errorf("%s is neither all nor a number of seconds: %q", stockVariable, text)
	}
	return &budget{limit: time.Duration(seconds) * time.Second}, nil
}

// allows reports whether another job, which may take as long as the longest one did, still has its time.
func (b *budget) allows() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limit == 0 || b.used+b.longest < b.limit
}

// took counts a job.
func (b *budget) took(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used += d
	b.longest = max(b.longest, d)
}

func TestBudget(t *testing.T) {
	for _, test := range []struct {
		text string
		took []time.Duration
		want []bool // allows, before each job and after the last
	}{
		{"all", []time.Duration{time.Hour}, []bool{true, true}},
		{"100", []time.Duration{30 * time.Second, 30 * time.Second, 20 * time.Second}, []bool{true, true, true, false}},
		{"60", []time.Duration{40 * time.Second}, []bool{true, false}},
	} {
		t.Run(test.text, func(t *testing.T) {
			b, err := newBudget(test.text)
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range test.want {
				if got := b.allows(); got != want {
					t.Errorf("before job %d: allows %v, want %v", i, got, want)
				}
				if i < len(test.took) {
					b.took(test.took[i])
				}
			}
		})
	}
	for _, text := range []string{"", "0"} {
		if b, err := newBudget(text); b != nil || err != nil {
			t.Errorf("%q: %v, %v", text, b, err)
		}
	}
	for _, text := range []string{"some", "-1", "5m"} {
		if _, err := newBudget(text); err == nil {
			t.Errorf("no error for %q", text)
		}
	}
}
