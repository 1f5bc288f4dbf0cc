package plan

import (
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// TestRegressions checks the laws for worlds in which they were once broken. Each file says how. A
// second part is what the world was, whose plan is still in place.
func TestRegressions(t *testing.T) {
	files, err := filepath.Glob("testdata/regress/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no regressions: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if len(a.Files) == 2 {
				for seed := range uint64(20) {
					if err := followsChange(string(a.Files[1].Data), string(a.Files[0].Data), seed); err != nil {
						t.Fatalf("%s\n%v", a.Comment, err)
					}
				}
				return
			}
			w, err := newWorld(string(a.Files[0].Data))
			if err != nil {
				t.Fatal(err)
			}
			if err := laws(w, rand.New(rand.NewPCG(1, 2)), 3000); err != nil {
				t.Errorf("%s\n%v", a.Comment, err)
			}
		})
	}
}
