package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tsoagent/e2e/guest/scenario"
)

// runJob runs one job and returns the exit status. The first argument says what it is:
//
//	scenario FILE [-v] [-variant=NAME]   a txtar script under /mnt/src
//	test DIR BINARY ARGS...              a compiled Go test, run in DIR under /mnt/src
//	batch JOB... + JOB... ...            several jobs one after the other (batch.go)
func runJob(args []string) int {
	result := "fail"
	switch {
	case len(args) >= 2 && args[0] == "scenario":
		result = runScenario(args[1], args[2:])
	case len(args) >= 1 && args[0] == "batch":
		result = runBatch(args[1:])
	case len(args) >= 3 && args[0] == "test":
		result = runTest(args[1], args[2], args[3:])
	default:
		fmt.Printf("guest: what job is %q?\n", args)
	}
	writeResult(result)
	if result == "fail" {
		return 1
	}
	return 0
}

func runScenario(file string, flags []string) string {
	variant := ""
	for _, f := range flags {
		if name, ok := strings.CutPrefix(f, "-variant="); ok {
			variant = name
		}
	}
	steps, err := os.Create(filepath.Join(resultDir(), "steps"))
	if err != nil {
		fmt.Println("guest: steps:", err)
		return "fail"
	}
	defer steps.Close()
	figures, err := os.Create(filepath.Join(exchangeDir, "figures"))
	if err != nil {
		fmt.Println("guest: figures:", err)
		return "fail"
	}
	defer figures.Close()

	deadline, err := time.Parse(time.RFC3339Nano, os.Getenv("TSOAGENT_DEADLINE"))
	if err != nil {
		fmt.Println("guest: TSOAGENT_DEADLINE:", err)
		return "fail"
	}
	return scenario.Run(scenario.Config{
		File:     filepath.Join(sourceDir, file),
		Variant:  variant,
		Verbose:  slices.Contains(flags, "-v"),
		Deadline: deadline,
		Log:      os.Stdout,
		Steps:    steps,
		Figures:  figures,
	})
}

func runTest(dir, binary string, args []string) string {
	cmd := exec.Command(filepath.Join(binDir, binary), args...)
	cmd.Dir = filepath.Join(sourceDir, dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		fmt.Printf("guest: %s: %v\n", binary, err)
		return "fail"
	}
	return "pass"
}
