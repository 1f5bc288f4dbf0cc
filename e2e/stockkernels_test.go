package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"tsoagent/e2e/stockkernel"
	"tsoagent/e2e/testkernel"
)

// stockVersions are Debian's kernels that the scenarios run on: bookworm's own, and the newer one in its security suite.
var stockVersions = []string{"6.1", "6.12"}

// stockScripts are the scenarios for them: those that need what the test kernel lacks, and the story, with real cards. Where the
// time is short the last ones are left out.
var stockScripts = []string{"testdata/stockkernel/*.txtar", "testdata/scenarios/10-story.txtar"}

// stockVariable is all, or for how many seconds the stock kernels may take. Without it they are left out.
const stockVariable = "TSOAGENT_STOCK_KERNELS"

// stockDeadline ends a scenario that hangs. Emulation is slow, and slower beside others.
const stockDeadline = 10 * time.Minute

// stockBudget is the one budget of all that runs on stock kernels.
var stockBudget = sync.OnceValues(func() (*budget, error) { return newBudget(os.Getenv(stockVariable)) })

// TestStockKernels runs scenarios on Debian's stock kernels, one after the other: each machine keeps two processors busy.
func TestStockKernels(t *testing.T) {
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
	for _, script := range stockScenarios(t) {
		for _, kernel := range kernels {
			name := script.name() + "/" + kernel.Release()
			t.Run(name, func(t *testing.T) {
				if !left.allows() {
					t.Skipf("left out: %s, for want of time (%s=%s); make test-kernels runs it", name, stockVariable, os.Getenv(stockVariable))
				}
				start := time.Now()
				defer func() { left.took(time.Since(start)) }()
				script.run(t, b, func(t *testing.T, job ...string) *testkernel.Result {
					return b.boot(t, testkernel.Machine{Boot: kernel.Boot, Deadline: stockDeadline}, job...)
				})
			})
		}
	}
}

// stockPackages are those whose tests run on stock kernels, too: all of their tests, since the host's kernel may lack what they are about.
// User-mode Linux has no BPF tracing, and not every guest lets its kernel's functions be traced.
var stockPackages = []string{"sockopt/sockbpf", "wire"}

// TestPackagesInStockKernels runs packages' tests on stock kernels, and reports each of them under its name.
func TestPackagesInStockKernels(t *testing.T) {
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
	for _, version := range stockVersions {
		kernel, err := stockkernel.Find(t.Context(), b.tree, version)
		if err != nil {
			t.Run(version, func(t *testing.T) { skipOrFail(t, err) })
			continue
		}
		for _, pkg := range stockPackages {
			t.Run(pkg+"/"+kernel.Release(), func(t *testing.T) {
				if !left.allows() {
					t.Skipf("left out for want of time (%s=%s); make test-kernels runs it", stockVariable, os.Getenv(stockVariable))
				}
				binary, err := testkernel.BuildTest(t.Context(), b.tree, pkg, b.binaries)
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				result := b.boot(t, testkernel.Machine{Boot: kernel.Boot, Deadline: stockDeadline},
					// The compiler isn't the kernel's affair.
					"test", pkg, binary, "-test.v", "-test.skip", "Reproducible", "-test.timeout", (stockDeadline - 10*time.Second).String())
				left.took(time.Since(start))
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

// stockScenarios returns all scenarios for stock kernels, in order.
func stockScenarios(t *testing.T) []script {
	t.Helper()
	var scripts []script
	for _, pattern := range stockScripts {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("no scenarios in %s: %v", pattern, err)
		}
		for _, file := range files {
			scripts = append(scripts, variantsOf(t, file)...)
		}
	}
	return scripts
}

// budget is a time that jobs share.
type budget struct {
	limit   time.Duration // 0 for none
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
func (b *budget) allows() bool { return b.limit == 0 || b.used+b.longest < b.limit }

// took counts a job.
func (b *budget) took(d time.Duration) {
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
