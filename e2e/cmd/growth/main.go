// Command growth draws what `go test ./agent -bench Growth` prints (`make growth`).
//
//	growth -svg FILE -table FILE <RESULTS
package main

import (
	"flag"
	"fmt"
	"os"

	"tsoagent/e2e/bench"
	"tsoagent/e2e/growth"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "growth:", err)
		os.Exit(1)
	}
}

func run() error {
	svg := flag.String("svg", "", "write the plot to this file")
	table := flag.String("table", "", "replace the table in this file")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	series, err := growth.Read(os.Stdin)
	if err != nil {
		return err
	}
	if *svg != "" {
		if err := os.WriteFile(*svg, []byte(growth.Plot(series)), 0o644); err != nil {
			return err
		}
	}
	if *table == "" {
		_, err = fmt.Print(growth.Table(series))
		return err
	}
	return bench.Between(*table, "growth", growth.Table(series))
}
