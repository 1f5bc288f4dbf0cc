// Command bench measures tsoagent at a large host's size, as root, on the host's kernel and in a network namespace of its own that ends with
// it. `make bench` builds what it needs and writes the table in docs/bench.md; `make bench-check` compares what was measured with the figures
// to reach.
//
//	bench [-scale N] [-rounds N] [-o FILE] [-table FILE] [-readme FILE] [-profiles DIR]
//	bench -check FILE
//
// With -scale it is quick to try: 0.01 takes a minute.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"tsoagent/e2e/bench"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	var o bench.Options
	flag.Float64Var(&o.Scale, "scale", 1, "this part of the full size")
	flag.IntVar(&o.Rounds, "rounds", 3, "take each figure so often")
	flag.DurationVar(&o.Budget, "budget", 30*time.Second, "time for policy events, each with empty and with full tables")
	flag.DurationVar(&o.Idle, "idle", 30*time.Second, "how long to watch the idle agent, and to wait until memory is given back")
	flag.StringVar(&o.Bin, "bin", "bin", "the directory of tsoagent and tsoctl")
	flag.StringVar(&o.Profiles, "profiles", "", "save the agent's profiles in this directory; they cost time, so no figure counts then")
	flag.IntVar(&o.ProfileSeconds, "profile-seconds", 15, "how much of a start, of policy events and of a storm is in a profile of the CPU")
	flag.BoolVar(&o.StormsOnly, "storms", false, "measure storms, and nothing else")
	out := flag.String("o", "", "write all samples as JSON to this file")
	table := flag.String("table", "", "replace the table in this file")
	readme := flag.String("readme", "", "replace the short table in this file")
	from := flag.String("from", "", "measure nothing, and take the samples in this file")
	check := flag.String("check", "", "only compare the samples in this file with the figures to reach")
	straight := flag.Bool("straight-line", false, "be the floor of a policy event (what bench starts itself)")
	count := flag.Int("count", 0, "be the floor of a storm: count so many notifications of routes (what bench starts itself)")
	flag.Parse()
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	case *straight:
		return bench.Straight(os.Stdin, os.Stdout)
	case *count > 0:
		return bench.Count(*count, os.Stdout)
	case *from != "":
		r, err := load(*from)
		if err != nil {
			return err
		}
		return show(r, *table, *readme)
	case *check != "":
		return checkFile(*check)
	case os.Geteuid() != 0:
		return errors.New("needs root, for a network namespace")
	case !bench.Inside():
		code, err := bench.Again()
		if err == nil && code != 0 {
			os.Exit(code)
		}
		return err
	}
	return measure(o, *out, *table, *readme)
}

func measure(o bench.Options, out, table, readme string) error {
	var err error
	if o.Bin, err = filepath.Abs(o.Bin); err != nil {
		return err
	}
	if o.Profiles != "" {
		if err := os.MkdirAll(o.Profiles, 0o755); err != nil {
			return err
		}
	}
	if err := bench.Settle(); err != nil {
		return err
	}
	o.Self, o.Progress = "/proc/self/exe", os.Stderr
	r, err := bench.Run(o)
	if r != nil && out != "" {
		err = errors.Join(err, save(r, out))
	}
	if err != nil {
		return err
	}
	return show(r, table, readme)
}

// save writes all samples to a file, also those of a run that went wrong in the end.
func save(r *bench.Results, file string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// show prints the table, and puts it and the short one into files if they are named.
func show(r *bench.Results, table, readme string) error {
	fmt.Print(r.Markdown())
	var errs []error
	if table != "" {
		errs = append(errs, r.WriteTable(table))
	}
	if readme != "" {
		errs = append(errs, bench.Between(readme, "bench", r.Short()))
	}
	return errors.Join(errs...)
}

func load(file string) (*bench.Results, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%w (`make bench` writes it)", err)
	}
	var r bench.Results
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return &r, nil
}

func checkFile(file string) error {
	r, err := load(file)
	if err != nil {
		return err
	}
	missed := r.Missed()
	for _, line := range missed {
		fmt.Println("missed:", line)
	}
	if len(missed) > 0 {
		return fmt.Errorf("%d figures missed", len(missed))
	}
	fmt.Println("all figures are reached")
	return nil
}
