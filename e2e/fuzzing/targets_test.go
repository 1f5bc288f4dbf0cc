// Package fuzzing holds that what decodes data from outside has a fuzz target, which tools/fuzz runs: each `func Fuzz` in the module.
package fuzzing

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const root = "../.."

// targets are all that there are, by package. What each is for stands with it.
var targets = map[string][]string{
	"agent":              {"FuzzAdopt", "FuzzReadBody", "FuzzReadConfig"},
	"agent/api":          {"FuzzParseQuestion"},
	"agent/client":       {"FuzzAnswers"},
	"agent/doctor/host":  {"FuzzParseRule", "FuzzText"},
	"agent/flows":        {"FuzzFilterFrom", "FuzzParseJSON"},
	"agent/guard":        {"FuzzParse"},
	"agent/journal":      {"FuzzParse", "FuzzRecord"},
	"agent/netns":        {"FuzzID"},
	"agent/probe":        {"FuzzLoad"},
	"clamp":              {"FuzzIntervals", "FuzzSetName"},
	"e2e/guest/scenario": {"FuzzParseFrame", "FuzzParsePacket"},
	"ethtool":            {"FuzzDecode"},
	"l2tp":               {"FuzzDecode"},
	"lane":               {"FuzzFilter", "FuzzLink"},
	"routes":             {"FuzzAddr", "FuzzAnswer", "FuzzFDB", "FuzzLink", "FuzzNexthop", "FuzzRoute", "FuzzRule"},
	"sockopt":            {"FuzzDecode"},
	"sockopt/sockbpf":    {"FuzzDecodeConns", "FuzzDecodeHeld", "FuzzDecodeKey"},
	"wire":               {"FuzzBlock", "FuzzPacket"},
	"xfrmwatch":          {"FuzzDecode", "FuzzKeys", "FuzzMessages"},
}

// without are packages that use a decoder's means, and why they need no target.
var without = map[string]string{}

// means are what a decoder of outside data is made with: a package, and the functions of it that read.
var means = map[string][]string{
	"encoding/json":               {"Unmarshal", "NewDecoder"},
	"encoding/binary":             {"NativeEndian", "BigEndian", "LittleEndian", "Read"},
	"gopkg.in/yaml.v3":            {"Unmarshal", "NewDecoder"},
	"github.com/mdlayher/netlink": {"NewAttributeDecoder", "UnmarshalAttributes"},
	"github.com/google/nftables":  {"New"},
}

func TestEachDecoderHasATarget(t *testing.T) {
	found, decoders := map[string][]string{}, map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		pkg, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		switch {
		case strings.HasSuffix(path, "_test.go"):
			found[pkg] = append(found[pkg], fuzzTargets(file)...)
		case !strings.HasPrefix(pkg, "e2e") && !strings.HasPrefix(pkg, "tools"):
			decoders[pkg] = decoders[pkg] || decodes(file)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(found, func(_ string, names []string) bool { slices.Sort(names); return len(names) == 0 })
	if diff := cmp.Diff(targets, found); diff != "" {
		t.Errorf("the fuzz targets are others than those of this list (-listed +there):\n%s", diff)
	}
	for pkg, is := range decoders {
		if _, said := without[pkg]; is && !said && len(targets[pkg]) == 0 {
			t.Errorf("%s decodes, and has no fuzz target", pkg)
		}
	}
	for pkg, why := range without {
		if !decoders[pkg] || len(targets[pkg]) > 0 {
			t.Errorf("%s needs no excuse any more: %s", pkg, why)
		}
	}
}

func fuzzTargets(file *ast.File) (names []string) {
	for _, d := range file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Fuzz") {
			names = append(names, f.Name.Name)
		}
	}
	return names
}

// decodes says whether a file uses one of the means.
func decodes(file *ast.File) (is bool) {
	reads := map[string][]string{}
	for _, i := range file.Imports {
		path := strings.Trim(i.Path.Value, `"`)
		name := strings.TrimSuffix(filepath.Base(path), ".v3")
		if i.Name != nil {
			name = i.Name.Name
		}
		reads[name] = means[path]
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			x, named := s.X.(*ast.Ident)
			is = is || named && slices.Contains(reads[x.Name], s.Sel.Name)
		}
		return !is
	})
	return is
}
