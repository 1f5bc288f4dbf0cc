// Command cures runs the scenarios that measure the known pathologies, without the agent and with it, each in a test kernel of its own, one
// after the other, and writes the tables in docs/cures.md, docs/limits.md and README.md. `make cures` is this.
//
//	cures [-rounds N] [-only RE] [-older VERSION] [-o FILE] [-table FILE] [-readme FILE] [-limits FILE] [-from FILE]
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/bench"
	"tsoagent/e2e/cures"
	"tsoagent/e2e/testkernel"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "cures:", err)
		os.Exit(1)
	}
}

type options struct {
	rounds                     int
	only                       *regexp.Regexp
	older                      string
	out, table, readme, limits string
}

func run() error {
	var o options
	flag.IntVar(&o.rounds, "rounds", 3, "run each scenario that measures a rate so often")
	only := flag.String("only", "", "only scenarios whose name matches, and peers, which is no scenario")
	flag.StringVar(&o.older, "older", "6.12.107", "measure the tunnels on this `version` too, if it is in the cache (e2e/testkernel/build VERSION)")
	flag.StringVar(&o.out, "o", "", "write all samples as JSON to this file")
	flag.StringVar(&o.table, "table", "", "replace the table in this file")
	flag.StringVar(&o.readme, "readme", "", "replace the table of what is cured in this file")
	flag.StringVar(&o.limits, "limits", "", "replace the table of what is not in this file")
	from := flag.String("from", "", "measure nothing, and take the samples in this file")
	flag.Parse()
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return err
	}
	var results cures.Results
	if *from != "" {
		text, err := os.ReadFile(*from)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, &results); err != nil {
			return fmt.Errorf("%s: %w", *from, err)
		}
		return show(&results, o)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err = measure(ctx, o, &results)
	if o.out != "" {
		// Also those of a run that went wrong in the end.
		text, e := json.MarshalIndent(results, "", "  ")
		if e == nil {
			e = os.WriteFile(o.out, append(text, '\n'), 0o644)
		}
		err = errors.Join(err, e)
	}
	if err != nil {
		return err
	}
	return show(&results, o)
}

// show prints the long table, and puts all of them into the files that are named.
func show(r *cures.Results, o options) error {
	fmt.Print(r.Long())
	var errs []error
	for _, page := range []struct{ file, text string }{{o.table, r.Long()}, {o.readme, r.Short()}, {o.limits, r.Uncured()}} {
		if page.file != "" {
			errs = append(errs, bench.Between(page.file, "cures", page.text))
		}
	}
	return errors.Join(errs...)
}

// measures finds the scenarios that leave figures, and rates those that are to be repeated.
var (
	measures = regexp.MustCompile(`(?m)^(\[.*\] )?(rate|speed|flows|datagrams) `)
	rates    = regexp.MustCompile(`(?m)^(\[.*\] )?rate `)
	variants = regexp.MustCompile(`(?m)^-- variant-([\w-]+)\.env --$`)
)

// job is one scenario in one variant on one kernel.
type job struct {
	file, variant, kernel, version string
	rounds                         int
}

func measure(ctx context.Context, o options, r *cures.Results) error {
	begin := time.Now()
	r.Machine, r.Rounds = bench.ThisMachine().String(), o.rounds
	first := load()
	defer func() { r.Took, r.Load = time.Since(begin).Seconds(), first+" and "+load() }()
	tree, err := os.Getwd()
	if err != nil {
		return err
	}
	jobs, err := plan(ctx, tree, o)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "tsoagent-cures-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binaries := filepath.Join(dir, "bin")
	if err := os.Mkdir(binaries, 0o755); err != nil {
		return err
	}
	if len(jobs) > 0 {
		if err := errors.Join(testkernel.BuildGuest(ctx, tree, binaries), testkernel.BuildCommands(ctx, tree, binaries)); err != nil {
			return err
		}
	}
	var errs []error
	for round := range o.rounds {
		for _, j := range jobs {
			if round < j.rounds {
				errs = append(errs, j.run(ctx, tree, binaries, dir, r))
			}
		}
	}
	if o.only.MatchString("peers") {
		errs = append(errs, peers(ctx, tree, dir, r))
	}
	return errors.Join(errs...)
}

// plan lists what is to be run.
func plan(ctx context.Context, tree string, o options) (jobs []job, err error) {
	kernel, err := testkernel.Find(ctx, tree)
	if err != nil {
		return nil, err
	}
	older, err := testkernel.FindVersion(ctx, tree, o.older)
	if err != nil {
		fmt.Fprintf(os.Stderr, "cures: no tunnels on Linux %s: e2e/testkernel/build %[1]s makes that kernel (%v)\n", o.older, err)
	}
	files, err := filepath.Glob("e2e/testdata/scenarios/*.txtar")
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if !measures.Match(text) || !o.only.MatchString(filepath.Base(file)) {
			continue
		}
		rounds := 1
		if rates.Match(text) {
			rounds = o.rounds
		}
		for _, v := range variants.FindAllSubmatch(text, -1) {
			jobs = append(jobs, job{file, string(v[1]), kernel, version(kernel), rounds})
			if older != "" && strings.Contains(file, "tunnels") {
				jobs = append(jobs, job{file, string(v[1]), older, version(older), rounds})
			}
		}
	}
	if len(jobs) == 0 && !o.only.MatchString("peers") {
		return nil, errors.New("no such scenario")
	}
	return jobs, nil
}

// version is that of a test kernel, which its directory is named by.
func version(kernel string) string {
	v, _, _ := strings.Cut(filepath.Base(filepath.Dir(kernel)), "-")
	return v
}

func (j job) run(ctx context.Context, tree, binaries, dir string, r *cures.Results) error {
	exchange, err := os.MkdirTemp(dir, "machine-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(exchange)
	name := strings.TrimSuffix(filepath.Base(j.file), ".txtar") + "/" + j.variant
	machine := testkernel.Machine{Kernel: j.kernel, Binaries: binaries, Tree: tree, Dir: exchange, Deadline: 15 * time.Minute}
	result, err := machine.Run(ctx, "scenario", j.file, "-variant="+j.variant)
	if err != nil {
		return fmt.Errorf("%s on %s: %w", name, j.version, err)
	}
	fmt.Fprintf(os.Stderr, "%s on %s: %s in %v\n", name, j.version, result.Outcome, result.Took.Round(100*time.Millisecond))
	if result.Outcome != "pass" {
		return fmt.Errorf("%s on %s: %s %s\n%s", name, j.version, result.Outcome, result.Reason, result.Log)
	}
	return add(r, result.Figures, j.variant, j.version)
}

// add reads figures, one JSON object a line.
func add(r *cures.Results, text, variant, kernel string) error {
	for line := range strings.Lines(text) {
		s := cures.Sample{Variant: variant, Kernel: kernel}
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			return fmt.Errorf("figure %q: %w", line, err)
		}
		r.Samples = append(r.Samples, s)
	}
	return nil
}

// peers runs the test of a key of another, which is on the host's kernel: it alone shows the truth of connections.
func peers(ctx context.Context, tree, dir string, r *cures.Results) error {
	file := filepath.Join(dir, "peers")
	cmd := exec.CommandContext(ctx, "go", "test", "./e2e/peers", "-run", "TestKeyOfAnotherCosts", "-count=1", "-v")
	cmd.Dir, cmd.Env = tree, append(os.Environ(), "TSOAGENT_FIGURES="+file)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("TestKeyOfAnotherCosts: %w\n%s", err, out)
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return errors.New("TestKeyOfAnotherCosts was skipped: go test ./e2e/peers -run KeyOfAnother -v says why")
	}
	if err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	release := strings.FieldsFunc(unix.ByteSliceToString(u.Release[:]), func(r rune) bool { return r == '-' || r == '+' })
	return add(r, string(text), "", slices.Concat(release, []string{""})[0])
}

// load is the machine's, of the last minute.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	one, _, _ := strings.Cut(string(text), " ")
	return one
}
