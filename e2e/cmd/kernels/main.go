// Command kernels writes the table of scenarios and stock kernels in docs/kernels.md from the results of `make test-kernels`, and puts those in order:
// of a scenario that was run again the newest result stays. It runs nothing.
//
//	kernels -results FILE -table FILE    in the module's root
package main

import (
	"flag"
	"fmt"
	"os"

	"tsoagent/e2e/bench"
	"tsoagent/e2e/stockkernel/suite"
)

func main() {
	results := flag.String("results", "", "the `file` of results")
	table := flag.String("table", "", "replace the table in this `file`")
	flag.Parse()
	if err := write(*results, *table); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func write(file, table string) error {
	results, err := suite.Read(file)
	if err != nil {
		return err
	}
	if len(results) == 0 {
		return fmt.Errorf("%s has no results", file)
	}
	scripts, err := suite.Scripts("e2e")
	if err != nil {
		return err
	}
	if err := suite.Write(file, results); err != nil {
		return err
	}
	return bench.Between(table, "test-kernels", suite.Markdown(scripts, suite.Packages, results))
}
