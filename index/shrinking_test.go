package index

import (
	"runtime"
	"testing"
)

// TestShrinkingGivesMemoryBack fills a map and leaves a hundredth of it.
func TestShrinkingGivesMemoryBack(t *testing.T) {
	const n = 100_000
	var s Shrinking[int, [4]int]
	before := inUse()
	for i := range n {
		s.Set(i, [4]int{i})
	}
	full := inUse() - before
	for i := range n {
		if i%100 != 0 {
			s.Delete(i)
		}
	}
	left := inUse() - before
	if left > full/5 {
		t.Errorf("%d bytes of %d are in use after 99 of 100 entries went", left, full)
	}
	for i := range n {
		if v, ok := s.Map[i]; ok != (i%100 == 0) || ok && v[0] != i {
			t.Fatalf("entry %d is %v, %v", i, v, ok)
		}
	}
}

func inUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
