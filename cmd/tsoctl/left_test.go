package main

import (
	"strings"
	"testing"

	"tsoagent/agent/journal"
)

// What a killed agent has left is called by its name, whatever it is.
func TestNextWithoutNamesWhatIsLeft(t *testing.T) {
	scope, err := journal.ReadScope()
	if err != nil {
		t.Fatal(err)
	}
	for kind, want := range map[journal.Kind]string{
		"feature": "has left 1 held feature:", "route": "has left 1 locked route:", "device-mtu": "has left 1 device mtu:",
		"lane": "has left 1 lane:", "moved": "has left 1 device that was moved to another network namespace:", "clamp": "has left a clamp:", "tables": "has left rules and clones:", "mtu": "starts one",
	} {
		t.Run(string(kind), func(t *testing.T) {
			dir := t.TempDir()
			j, _, err := journal.Open(dir, scope)
			if err != nil {
				t.Fatal(err)
			}
			if err := j.Put(journal.Entry{ID: "x/1", Kind: kind, Data: []byte(`{}`)}); err != nil {
				t.Fatal(err)
			}
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
			if got := nextWithout(dir); !strings.Contains(got, want) {
				t.Errorf("%s, want %q", got, want)
			}
		})
	}
}
