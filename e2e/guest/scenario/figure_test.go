package scenario

import (
	"errors"
	"strings"
	"testing"
)

// TestAtLeast compares the best of what was measured, and takes nothing for more than nothing.
func TestAtLeast(t *testing.T) {
	var out strings.Builder
	s := &session{figures: &out, best: map[string]float64{}}
	for _, f := range []struct {
		name  string
		value float64
	}{{"gre/before", 2}, {"gre/after", 8}, {"gre/after", 50}, {"gre/after", 7}, {"stalled/before", 0}, {"stalled/after", 0}} {
		if err := s.record(f.name, Figure{Value: f.value, Unit: "Mbit/s"}); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Count(out.String(), "\n"); got != 6 || !strings.HasPrefix(out.String(), `{"case":"gre","when":"before","value":2,"unit":"Mbit/s"}`) {
		t.Errorf("%d figures: %s", got, out.String())
	}
	for _, test := range []struct {
		args string
		fine bool
	}{
		{"gre/after 25 gre/before", true}, {"gre/after 26 gre/before", false}, {"gre/before 0.1 gre/after", false}, {"stalled/after 1 stalled/before", false},
	} {
		if _, err := s.atLeast(t.Context(), nil, strings.Fields(test.args)); (err == nil) != test.fine || errors.Is(err, errUsage) {
			t.Errorf("atleast %s: %v", test.args, err)
		}
	}
	for _, args := range []string{"gre/after 2", "gre/after two gre/before", "gre/after 2 never/before"} {
		if _, err := s.atLeast(t.Context(), nil, strings.Fields(args)); !errors.Is(err, errUsage) {
			t.Errorf("atleast %s: %v, want a mistake in the script", args, err)
		}
	}
	if err := s.record("gre", Figure{}); !errors.Is(err, errUsage) {
		t.Errorf("a figure without a time: %v", err)
	}
}
