// Package commandtest has what the tests of both commands do alike.
package commandtest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/urfave/cli/v2"
)

// Exits is a command for scripts: it runs another one, and wants an exit code, as in `exits 2 tsoctl foo`.
func Exits(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exits CODE CMD…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	have := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		have = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if have != want {
		ts.Fatalf("exit code %d, want %d", have, want)
	}
}

// Printable is a command for scripts: it wants files, or stdout or stderr, to have nothing that a terminal would obey, as in
// `printable stdout log`.
func Printable(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		text := ts.ReadFile(name)
		if text == "" {
			ts.Fatalf("%s is empty", name)
		}
		if !utf8.ValidString(text) {
			ts.Fatalf("%s is no UTF-8: %q", name, text)
		}
		for i, r := range text {
			if r != '\n' && r != '\t' && !strconv.IsPrint(r) {
				ts.Fatalf("%s has %q", name, text[max(0, i-40):min(len(text), i+40)])
			}
		}
	}
}

// nobody is a user without any capability.
const nobody = 65534

// Self is a copy of the test's own binary under a command's name, which says what it is to be, in a directory that everybody may enter,
// unlike that of t.TempDir.
type Self struct{ Dir, path string }

// NewSelf makes the copy. It goes with the test.
func NewSelf(t *testing.T, name string) *Self {
	t.Helper()
	binary, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", name+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &Self{dir, filepath.Join(dir, name)}
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(s.path, binary, 0o755)); err != nil {
		t.Fatal(err)
	}
	return s
}

// Run runs it with an empty environment, as it is or, with nobody, as a user without capabilities.
func (s *Self) Run(t *testing.T, unprivileged bool, args ...string) (stdout []byte, stderr string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), s.path, args...)
	cmd.Env = []string{}
	if unprivileged && os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.Bytes(), errOut.String(), cmd.ProcessState.ExitCode()
}

// Documented fails the test for each command without a section in docs/commands.md, and each flag and environment variable that is not there.
func Documented(t *testing.T, app *cli.App) {
	t.Helper()
	b, err := os.ReadFile("../../docs/commands.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	flags := app.Flags
	for _, cmd := range app.Commands {
		if cmd.Hidden {
			continue // which is not for people
		}
		if !strings.Contains(text, "### "+app.Name+" "+cmd.Name+"\n") {
			t.Errorf("%s has no section in docs/commands.md", cmd.Name)
		}
		flags = append(flags, cmd.Flags...)
	}
	for _, f := range flags {
		for _, name := range f.Names() {
			dashes := "--"
			if len(name) == 1 {
				dashes = "-"
			}
			if !regexp.MustCompile("`" + dashes + name + "[ `]").MatchString(text) {
				t.Errorf("%s%s is not in docs/commands.md", dashes, name)
			}
		}
		if d, ok := f.(cli.DocGenerationFlag); ok {
			for _, env := range d.GetEnvVars() {
				if !strings.Contains(text, "`"+env+"`") {
					t.Errorf("%s is not in docs/commands.md", env)
				}
			}
		}
	}
}
