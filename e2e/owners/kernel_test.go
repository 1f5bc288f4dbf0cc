package owners

import (
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestKernelOwners is for the test kernel, which has VRFs, xfrm interfaces and SAs: the worlds that need them, and some random ones.
func TestKernelOwners(t *testing.T) {
	if !inTestKernel {
		t.Skip("needs the test kernel: it runs in TestPackagesInTestKernel")
	}
	bin := need(t)
	files, err := filepath.Glob("testdata/worlds/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no worlds: %v", err)
	}
	for _, file := range files {
		if s := readScript(t, file); s["kernel"] != nil {
			t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) { s.run(t, bin) })
		}
	}
	for i := range 4 {
		t.Run(strconv.Itoa(i), func(t *testing.T) { random(t, bin, rand.New(rand.NewPCG(2, uint64(i)))) })
	}
}
