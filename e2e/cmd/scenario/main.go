// Command scenario boots the test kernel with one scenario and prints its timeline as it happens, and then the result. `make demo`
// is this with the story.
//
//	go run ./e2e/cmd/scenario [-v] FILE
//
// With -v, and when the scenario fails, the whole log follows.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"tsoagent/e2e/testkernel"
)

func main() {
	verbose := flag.Bool("v", false, "print the whole log, too")
	variant := flag.String("variant", "", "of a scenario with variants, which one")
	deadline := flag.Duration("deadline", 5*time.Minute, "when to give up")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: scenario [-v] FILE (in the module's root)")
		os.Exit(2)
	}
	os.Exit(exitStatus(flag.Arg(0), *variant, *verbose, *deadline))
}

// exitStatus runs the scenario and returns the status to exit with.
func exitStatus(file, variant string, verbose bool, deadline time.Duration) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	passed, err := run(ctx, file, variant, verbose, deadline)
	if err != nil {
		fmt.Fprintln(os.Stderr, "scenario:", err)
	}
	if !passed {
		return 1
	}
	return 0
}

// run runs the scenario in the current directory's module and reports whether it passed.
func run(ctx context.Context, file, variant string, verbose bool, deadline time.Duration) (bool, error) {
	tree, err := os.Getwd()
	if err != nil {
		return false, err
	}
	kernel, err := testkernel.Find(ctx, tree)
	if err != nil {
		return false, err
	}
	dir, err := os.MkdirTemp("", "tsoagent-scenario-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	binaries, exchange := filepath.Join(dir, "bin"), filepath.Join(dir, "x")
	for _, d := range []string{binaries, exchange} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return false, err
		}
	}
	if err := testkernel.BuildGuest(ctx, tree, binaries); err != nil {
		return false, err
	}
	if err := testkernel.BuildCommands(ctx, tree, binaries); err != nil {
		// A scenario that does without them still has something to show.
		fmt.Fprintln(os.Stderr, "scenario:", err)
	}
	job := []string{"scenario", file}
	if verbose {
		job = append(job, "-v")
	}
	if variant != "" {
		job = append(job, "-variant="+variant)
	}
	machine := testkernel.Machine{Kernel: kernel, Binaries: binaries, Tree: tree, Dir: exchange, Deadline: deadline, Steps: os.Stdout}
	result, err := machine.Run(ctx, job...)
	if result == nil {
		return false, err
	}
	if verbose || result.Outcome == "fail" {
		fmt.Println(result.Log)
	}
	if err != nil {
		fmt.Println(result.Console)
		return false, err
	}
	fmt.Printf("%s in %v", result.Outcome, result.Took.Round(100*time.Millisecond))
	if result.Reason != "" {
		fmt.Printf(": %s", result.Reason)
	}
	fmt.Println()
	return result.Outcome != "fail", nil
}
