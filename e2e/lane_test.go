package e2e

import (
	"testing"

	"tsoagent/e2e/testkernel"
)

// BenchmarkLane prints what covered and plain flows on one NIC send with shared_nics keep, lane and off, measured in one run
// in the test kernel (lane.TestKernelCost). Its own time says nothing.
func BenchmarkLane(b *testing.B) {
	bench := newBench(b)
	binary, err := testkernel.BuildTest(b.Context(), bench.tree, "lane", bench.binaries)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		result := bench.boot(b, testkernel.Machine{Kernel: bench.kernel, Deadline: deadline}, "test", "lane", binary, "-test.v", "-test.run", "TestKernelCost", "-lane.rounds", "12", "-lane.time", "150ms")
		b.Log(result.Log)
		if result.Outcome != "pass" {
			b.Fail()
		}
	}
}
