package scenario

import (
	"errors"
	"strings"
	"testing"
)

func TestRecord(t *testing.T) {
	var out strings.Builder
	s := &session{figures: &out}
	for _, f := range []Figure{{Value: 2, Unit: "Mbit/s", More: "mss=1448"}, {Value: 3, Of: 4, Unit: "connections"}} {
		if err := s.record("gre/before", f); err != nil {
			t.Fatal(err)
		}
	}
	want := `{"case":"gre","when":"before","value":2,"unit":"Mbit/s","more":"mss=1448"}` + "\n" + `{"case":"gre","when":"before","value":3,"of":4,"unit":"connections"}` + "\n"
	if out.String() != want {
		t.Errorf("got %s, want %s", out.String(), want)
	}
	if err := s.record("gre", Figure{}); !errors.Is(err, errUsage) {
		t.Errorf("a figure without a time: %v, want a mistake in the script", err)
	}
}
