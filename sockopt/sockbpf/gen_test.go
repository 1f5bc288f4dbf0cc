package sockbpf

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// compiler is the one that made the objects. Others make other bytes.
const compiler = "Debian clang version 14.0.6"

// TestObjectsAreReproducible runs what `go generate` runs, and wants what is committed.
func TestObjectsAreReproducible(t *testing.T) {
	for _, need := range []string{"clang-14", "llvm-strip-14"} {
		if _, err := exec.LookPath(need); err != nil {
			t.Skipf("needs %s (Debian's clang-14, llvm-14 and libbpf-dev)", need)
		}
	}
	if _, err := os.Stat("/usr/include/bpf/bpf_helpers.h"); err != nil {
		t.Skip("needs bpf/bpf_helpers.h (Debian's libbpf-dev)")
	}
	version, err := exec.Command("clang-14", "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	if first, _, _ := strings.Cut(string(version), "\n"); first != compiler {
		t.Skipf("needs %s, this is %s", compiler, first)
	}
	source, err := os.ReadFile("gen.go")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for line := range strings.Lines(string(source)) {
		command, ok := strings.CutPrefix(line, "//go:generate ")
		if !ok {
			continue
		}
		command = strings.Replace(command, "bpf2go", "bpf2go -output-dir "+dir, 1)
		cmd := exec.Command("sh", "-c", command)
		cmd.Env = append(os.Environ(), "GOPACKAGE=sockbpf", "GOFILE=gen.go")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	committed, err := filepath.Glob("*_bpfe[lb].*")
	if err != nil {
		t.Fatal(err)
	}
	made, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(committed) != 12 || len(made) != len(committed) {
		t.Fatalf("%d files committed, %d made, want 12", len(committed), len(made))
	}
	for _, path := range made {
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Base(path))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s isn't what its source gives: run go generate", filepath.Base(path))
		}
	}
}
