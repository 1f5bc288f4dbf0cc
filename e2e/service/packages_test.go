package service

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The versions that the packages are given: no tree has them.
const version, nextVersion = "1.2.3", "1.2.4"

// packages are those of both architectures, and the next ones of this machine's, made once each, in directories of their own.
var packages = sync.OnceValues(func() (string, error) { return makePackages("packages", version, "amd64 arm64") })
var nextPackages = sync.OnceValues(func() (string, error) { return makePackages("next", nextVersion, runtime.GOARCH) })

// makePackages has a copy of the tree, which has no history, make them.
func makePackages(name, version, arches string, environment ...string) (string, error) {
	tree := filepath.Join(host.WorkDir(), name)
	copyTree := `mkdir "$1" && tar -C ../.. --exclude=./.git --exclude=./bin --exclude=./dist -c . | tar -C "$1" -x`
	if out, err := exec.Command("sh", "-c", copyTree, "sh", tree).CombinedOutput(); err != nil {
		return "", fmt.Errorf("copy the tree: %w: %s", err, out)
	}
	cmd := exec.Command(tree + "/tools/packages")
	cmd.Env = slices.Concat(os.Environ(), []string{"VERSION=" + version, "SOURCE_DATE_EPOCH=1790000000", "ARCHES=" + arches}, environment)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("tools/packages: %w: %s", err, out)
	}
	return tree + "/dist", nil
}

func mustPackages(t *testing.T, made func() (string, error)) string {
	t.Helper()
	host.Need(t, map[string]string{"dpkg-deb": "dpkg", "rpm": "rpm", "make": "make", "tar": "tar"})
	// There is no way out of the test's network namespace.
	if out, err := exec.Command("go", "-C", "../../tools/packaging", "list", "-deps", "tool").CombinedOutput(); err != nil {
		t.Skipf("needs the Go modules of tools/packaging (go -C tools/packaging mod download): %v: %s", err, out)
	}
	dir, err := made()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// A format is how a kind of package is called and handled.
type format struct {
	name    string
	file    func(version, arch string) string
	install []string // or upgrade
	remove  []string
}

var formats = []format{
	{
		"deb", func(v, arch string) string { return fmt.Sprintf("tsoagent_%s-1_%s.deb", v, arch) },
		[]string{"dpkg", "--no-triggers", "-i"}, []string{"dpkg", "--no-triggers", "-r"},
	},
	{
		"rpm", func(v, arch string) string {
			return fmt.Sprintf("tsoagent-%s-1.%s.rpm", v, map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch])
		},
		[]string{"rpm", "-U", "--nodeps"}, []string{"rpm", "-e"}, // this host's packages are dpkg's
	},
}

// TestPackagesAreReproducible makes them again elsewhere, in another time zone and as somebody who lets nobody read.
func TestPackagesAreReproducible(t *testing.T) {
	one := mustPackages(t, packages)
	other := func() (string, error) {
		environment := []string{"TZ=Pacific/Auckland", "LC_ALL=C.UTF-8", "GOFLAGS=-buildvcs=false"}
		if os.Getenv("TSOAGENT_REPRODUCE") == "cold" { // some minutes: nothing that was compiled is used again
			environment = append(environment, "GOCACHE="+filepath.Join(host.WorkDir(), "gocache"))
		}
		return makePackages("another place, where it is made again", version, "amd64 arm64", environment...)
	}
	two := mustPackages(t, other)
	files := func(dir string) map[string]string {
		sums := map[string]string{}
		paths, err := filepath.Glob(dir + "/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			sums[filepath.Base(path)] = fmt.Sprintf("%x", sha256.Sum256(b))
		}
		return sums
	}
	want := files(one)
	if len(want) != 9 { // two formats and two bills for each architecture, and the sums
		t.Errorf("made %v", want)
	}
	if diff := cmp.Diff(want, files(two)); diff != "" {
		t.Errorf("not the same bytes (-here +there)\n%s", diff)
	}
}

// unpack is what a package holds, as files below a directory.
func unpack(t *testing.T, path string) string {
	t.Helper()
	dir := t.TempDir()
	how := `dpkg-deb -x "$1" "$2"`
	if strings.HasSuffix(path, ".rpm") {
		how = `rpm2archive - <"$1" | tar -xz -C "$2"`
	}
	if out, err := exec.Command("sh", "-c", how, "sh", path, dir).CombinedOutput(); err != nil {
		t.Fatalf("unpack %s: %v: %s", path, err, out)
	}
	return dir
}

// TestPackagesHoldWhatIsInstalled compares both formats with what `make install` installs, for both architectures.
func TestPackagesHoldWhatIsInstalled(t *testing.T) {
	dir := mustPackages(t, packages)
	list := func(root string) []string {
		out, err := exec.Command("sh", "-c", `cd "$1" && find . ! -type d | sed "s/\.8\.gz$/.8/"`, "sh", root).Output()
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Fields(string(out))
		slices.Sort(lines)
		return lines
	}
	for _, f := range formats {
		for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
			t.Run(f.name+" "+arch, func(t *testing.T) {
				root := unpack(t, filepath.Join(dir, f.file(version, arch)))
				want := append(list(mustStage(t)), "./etc/tsoagent/tsoagent.yaml", "./usr/share/doc/tsoagent/sbom/tsoagent.cdx.json", "./usr/share/doc/tsoagent/sbom/tsoctl.cdx.json")
				if f.name == "deb" {
					want = append(want, "./usr/share/doc/tsoagent/changelog.Debian.gz", "./usr/share/doc/tsoagent/copyright", "./usr/share/lintian/overrides/tsoagent")
				} else {
					want[slices.Index(want, "./usr/share/zsh/vendor-completions/_tsoctl")] = "./usr/share/zsh/site-functions/_tsoctl"
				}
				slices.Sort(want)
				if diff := cmp.Diff(want, list(root)); diff != "" {
					t.Errorf("files (-want +got)\n%s", diff)
				}
				for _, program := range []string{"usr/sbin/tsoagent", "usr/bin/tsoctl"} {
					isStatic(t, filepath.Join(root, program), machine)
					isBilled(t, filepath.Join(root, program))
				}
				if b, err := os.ReadFile(root + "/etc/tsoagent/tsoagent.yaml"); err != nil || !bytes.Contains(b, []byte("tsoagent check /etc/tsoagent/tsoagent.yaml\n")) || !bytes.Contains(b, []byte("\nmode: enforce\n")) {
					t.Errorf("the configuration: %v\n%s", err, b)
				}
			})
		}
	}
}

// isStatic wants a program that no loader and no library is needed for.
func isStatic(t *testing.T, path string, machine elf.Machine) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Machine != machine {
		t.Errorf("%s is for %s", path, f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("%s is not static: %s", path, p.Type)
		}
	}
}

// isBilled wants the bill of materials to have each module that the program says it is made of, the toolchain's library included.
func isBilled(t *testing.T, path string) {
	t.Helper()
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(path), "..", "share", "doc", "tsoagent", "sbom", filepath.Base(path)+".cdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	var bill struct {
		BomFormat string
		Metadata  struct {
			Component struct{ Name, Version string }
		}
		Components []struct{ Name, Version string }
	}
	if err := json.Unmarshal(b, &bill); err != nil {
		t.Fatal(err)
	}
	if c := bill.Metadata.Component; bill.BomFormat != "CycloneDX" || c.Name != "tsoagent" || c.Version != version {
		t.Errorf("the bill is %s of %+v", bill.BomFormat, c)
	}
	want, got := []string{"std " + info.GoVersion}, []string{}
	for _, m := range info.Deps {
		want = append(want, m.Path+" "+m.Version)
	}
	for _, c := range bill.Components {
		got = append(got, c.Name+" "+c.Version)
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" || len(got) < 10 {
		t.Errorf("the bill of %s (-program +bill)\n%s", path, diff)
	}
}

// TestVersionOfPackages has git say it: what was built later is of a later version, for dpkg and for rpm.
func TestVersionOfPackages(t *testing.T) {
	host.Need(t, map[string]string{"git": "git", "dpkg": "dpkg", "rpm": "rpm"})
	tree := t.TempDir()
	git := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", tree, "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	b, err := os.ReadFile("../../tools/packages")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(tree+"/tools", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tree+"/tools/packages", b, 0o755); err != nil {
		t.Fatal(err)
	}
	say := func(pattern string) string {
		t.Helper()
		cmd := exec.Command(tree+"/tools/packages", "--version")
		out, err := cmd.CombinedOutput()
		got := strings.TrimSpace(string(out))
		if err != nil || !regexp.MustCompile("^"+pattern+"$").MatchString(got) {
			t.Errorf("version %q, want %s: %v", got, pattern, err)
		}
		return got
	}
	git("init", "-q")
	git("add", ".")
	git("commit", "-q", "-m", "one")
	versions := []string{say(`0\.0\.0~git20\d{12}\.[0-9a-f]{10}`)}
	for _, step := range []struct{ tag, want string }{
		{"v1.3.0-rc.1", `1\.3\.0~rc\.1`}, {"", `1\.3\.0~rc\.1\+1\.g[0-9a-f]+`}, {"v1.3.0", `1\.3\.0`}, {"", `1\.3\.0\+1\.g[0-9a-f]+`}, {"v1.3.1", `1\.3\.1`},
	} {
		git("commit", "-q", "--allow-empty", "-m", "next")
		if step.tag != "" {
			git("tag", step.tag)
		}
		versions = append(versions, say(step.want))
	}
	for i := range versions[1:] {
		if err := exec.Command("dpkg", "--compare-versions", versions[i]+"-1", "lt", versions[i+1]+"-1").Run(); err != nil {
			t.Errorf("for dpkg %s is not before %s", versions[i], versions[i+1])
		}
		out, err := exec.Command("rpm", "--eval", fmt.Sprintf(`%%{lua:print(rpm.vercmp(%q,%q))}`, versions[i], versions[i+1])).Output()
		if err != nil || strings.TrimSpace(string(out)) != "-1" {
			t.Errorf("for rpm %s is not before %s: %v %s", versions[i], versions[i+1], err, out)
		}
	}
	if err := os.WriteFile(tree+"/tools/packages", append(b, "# changed\n"...), 0o755); err != nil {
		t.Fatal(err)
	}
	say(`1\.3\.1\+dirty`)
}
