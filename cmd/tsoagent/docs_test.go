package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"tsoagent/agent"
	"tsoagent/cmd/internal/commandtest"
	"tsoagent/cmd/internal/manual/manualtest"
)

func document(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// keys are the configuration's YAML keys, those of entries in lists as well.
func keys(typ reflect.Type) []string {
	for typ.Kind() == reflect.Slice {
		typ = typ.Elem()
	}
	var out []string
	if typ.Kind() != reflect.Struct {
		return nil
	}
	for f := range typ.Fields() {
		if name, _, _ := strings.Cut(f.Tag.Get("yaml"), ","); name != "" {
			out = append(out, name)
		}
		out = append(out, keys(f.Type)...)
	}
	return out
}

// TestReferenceFileHasTheDefaults reads docs/tsoagent.yaml as the agent would.
func TestReferenceFileHasTheDefaults(t *testing.T) {
	got, err := agent.ReadConfig(strings.NewReader(document(t, "tsoagent.yaml")), "docs/tsoagent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(agent.Config{}.WithDefaults(), got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("docs/tsoagent.yaml has other values than the defaults (-default +file)\n%s", diff)
	}
}

func TestEveryKeyIsDocumented(t *testing.T) {
	reference, text := document(t, "tsoagent.yaml"), document(t, "configuration.md")
	names := keys(reflect.TypeFor[agent.Config]())
	if len(names) < 10 {
		t.Fatalf("found %d keys only: %v", len(names), names)
	}
	for _, name := range names {
		// As a key, or in the comment of a list's entry.
		if !regexp.MustCompile(`(?m)^(#? *(- )?)` + name + `:`).MatchString(reference) {
			t.Errorf("%s is not in docs/tsoagent.yaml", name)
		}
		if !strings.Contains(text, "`"+name+"`") {
			t.Errorf("%s is not in docs/configuration.md", name)
		}
	}
}

// TestEveryKeyHasAFlag holds the flags to the configuration, both ways.
func TestEveryKeyHasAFlag(t *testing.T) {
	known := agent.Keys()
	for key := range known {
		if keyUsage[key] == "" {
			t.Errorf("%s has no usage in keyUsage", key)
		}
	}
	for key := range keyUsage {
		if _, ok := known[key]; !ok {
			t.Errorf("%s is in keyUsage, and is no key", key)
		}
	}
	for _, name := range keys(reflect.TypeFor[agent.Config]()) {
		if _, ok := known[name]; !ok && name != "devices" && name != "match" {
			t.Errorf("%s is no key that can be set", name)
		}
	}
}

func TestEveryFlagIsDocumented(t *testing.T) { commandtest.Documented(t, newApp()) }

func TestManualPages(t *testing.T) {
	manualtest.Written(t, newApp(), "tsoagent.8", "tsoagent-run.8")
	manualtest.Clean(t, &pages, newApp())
}

// TestDocumentsNameTests holds the documents that say which test shows what to the tests that they name, and the scripts.
func TestDocumentsNameTests(t *testing.T) {
	known := map[string]bool{}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		known[d.Name()] = true
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`).FindAllSubmatch(b, -1) {
			known[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for doc, least := range map[string]int{"threat-model.md": 40, "faults.md": 20, "stale-window.md": 3} {
		named := regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+|\w+\.txtar`).FindAllString(document(t, doc), -1)
		if len(named) < least {
			t.Errorf("docs/%s names %d tests only", doc, len(named))
		}
		for _, name := range named {
			if !known[name] {
				t.Errorf("docs/%s names %s, which is nowhere", doc, name)
			}
		}
	}
}
