package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestBatchIsSplitIntoJobs(t *testing.T) {
	got := splitJobs([]string{"CARDS=a,b", "scenario", "x", "-v", "+", "scenario", "y", "+", "test", "d", "b", "-test.v"})
	want := [][]string{{"CARDS=a,b", "scenario", "x", "-v"}, {"scenario", "y"}, {"test", "d", "b", "-test.v"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
