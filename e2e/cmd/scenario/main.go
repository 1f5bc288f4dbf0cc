// Command scenario boots the test kernel with one scenario and prints its timeline as it happens, and then the result. `make demo`
// is this with the story.
//
//	go run ./e2e/cmd/scenario [-v] [-variant NAME] [-kernel 6.1] FILE
//
// With -v, and when the scenario fails, the whole log follows. With -kernel the scenario runs on one of Debian's stock kernels in QEMU:
// the newest in the cache whose version begins so (e2e/stockkernel/fetch gets one).
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

	"tsoagent/e2e/stockkernel"
	"tsoagent/e2e/testkernel"
)

func main() {
	verbose := flag.Bool("v", false, "print the whole log, too")
	variant := flag.String("variant", "", "of a scenario with variants, which one")
	stock := flag.String("kernel", "", "the `version` of a stock kernel, instead of the test kernel")
	deadline := flag.Duration("deadline", 15*time.Minute, "when to give up")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: scenario [-v] [-variant NAME] [-kernel VERSION] FILE (in the module's root)")
		os.Exit(2)
	}
	os.Exit(exitStatus(request{flag.Arg(0), *variant, *stock, *verbose, *deadline}))
}

// request is what the command line asks for.
type request struct {
	file, variant string
	stock         string // version of a stock kernel, empty for the test kernel
	verbose       bool
	deadline      time.Duration
}

// exitStatus runs the scenario and returns the status to exit with.
func exitStatus(r request) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	passed, err := run(ctx, r)
	if err != nil {
		fmt.Fprintln(os.Stderr, "scenario:", err)
	}
	if !passed {
		return 1
	}
	return 0
}

// run runs the scenario in the current directory's module and reports whether it passed.
func run(ctx context.Context, r request) (bool, error) {
	tree, err := os.Getwd()
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
	machine := testkernel.Machine{Binaries: binaries, Tree: tree, Dir: exchange, Deadline: r.deadline, Steps: os.Stdout}
	if err := findKernel(ctx, r, &machine); err != nil {
		return false, err
	}
	if err := testkernel.BuildGuest(ctx, tree, binaries); err != nil {
		return false, err
	}
	if err := testkernel.BuildCommands(ctx, tree, binaries); err != nil {
		// A scenario that does without them still has something to show.
		fmt.Fprintln(os.Stderr, "scenario:", err)
	}
	job := []string{"scenario", r.file}
	if r.verbose {
		job = append(job, "-v")
	}
	if r.variant != "" {
		job = append(job, "-variant="+r.variant)
	}
	result, err := machine.Run(ctx, job...)
	if result == nil {
		return false, err
	}
	if r.verbose || result.Outcome == "fail" {
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

// findKernel makes the machine one of the kernel that is asked for.
func findKernel(ctx context.Context, r request, machine *testkernel.Machine) (err error) {
	if r.stock == "" {
		machine.Kernel, err = testkernel.Find(ctx, machine.Tree)
		return err
	}
	kernel, err := stockkernel.Find(ctx, machine.Tree, r.stock)
	if err != nil {
		return err
	}
	fmt.Println("kernel", kernel.Release())
	machine.Boot = kernel.Boot
	return stockkernel.BuildLoader(ctx, machine.Tree, machine.Binaries)
}
