// Package scenario runs one txtar script inside the test kernel. It is testscript with commands of its own
// for network namespaces, traffic and a look at the wire; e2e/README.md lists them.
package scenario

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/rogpeppe/go-internal/txtar"
)

// Config says which script to run and where its output goes.
type Config struct {
	File     string    // path of the txtar file
	Variant  string    // of a script with files variant-NAME.env, which of them sets its environment
	Verbose  bool      // keep the log of the phases that passed, too
	Deadline time.Time // when running programs are told to end
	Log      io.Writer // the script's log, written when it has ended
	Steps    io.Writer // the timeline, written as it happens
	Figures  io.Writer // what was measured, a JSON object (Figure) a line; nil if nobody wants it
}

// Run runs the script and returns "pass", "fail" or "skip: reason".
func Run(cfg Config) string {
	file, err := expandFile(cfg.File)
	if err != nil {
		fmt.Fprintln(cfg.Log, "scenario:", err)
		return "fail"
	}

	s := &session{start: time.Now(), steps: cfg.Steps, figures: figuresTo(cfg.Figures), connections: map[string]*connection{}, servers: map[string]*server{}}
	defer s.close()

	root := &result{verbose: cfg.Verbose, log: cfg.Log}
	root.Run("", func(t testscript.T) {
		testscript.RunT(t, testscript.Params{
			Files:    []string{file},
			Deadline: cfg.Deadline,
			Cmds:     s.commands(),
			Setup: func(env *testscript.Env) error {
				env.Setenv("TSOAGENT_TEST_KERNEL", "1")
				env.Setenv("GOTRACEBACK", "all")
				env.Setenv("TSOAGENT_CARDS", os.Getenv("TSOAGENT_CARDS")) // for bin/nic
				for _, v := range env.Vars {
					name, _, _ := strings.Cut(v, "=")
					s.envNames = append(s.envNames, name)
				}
				s.envNames = append(s.envNames, namesSet(file)...)
				vars, err := variant(file, cfg.Variant)
				for _, v := range vars {
					env.Setenv(v.name, v.value)
					s.envNames = append(s.envNames, v.name)
				}
				return err
			},
		})
	})
	return root.String()
}

// expandFile writes the script with our line forms expanded (see expandLine) into a new directory and returns its path.
// The file keeps its name, and its lines their numbers, so that the log's FILE:LINE is right.
func expandFile(file string) (string, error) {
	archive, err := txtar.ParseFile(file)
	if err != nil {
		return "", fmt.Errorf("parse script: %w", err)
	}
	lines := strings.Split(string(archive.Comment), "\n")
	for i, line := range lines {
		lines[i] = expandLine(line)
	}
	archive.Comment = []byte(strings.Join(lines, "\n"))

	dir, err := os.MkdirTemp("", "scenario")
	if err != nil {
		return "", fmt.Errorf("temp dir: %w", err)
	}
	expanded := filepath.Join(dir, filepath.Base(file))
	if err := os.WriteFile(expanded, txtar.Format(archive), 0o644); err != nil {
		return "", fmt.Errorf("write script: %w", err)
	}
	return expanded, nil
}

// namesSet returns the variables that the script's env lines set. testscript keeps its environment to itself but for
// Getenv, and a command of ours that starts a program must hand it on.
func namesSet(file string) []string {
	archive, err := txtar.ParseFile(file)
	if err != nil {
		return nil
	}
	var names []string
	for line := range strings.SplitSeq(string(archive.Comment), "\n") {
		words := strings.Fields(line)
		if len(words) < 2 || words[0] != "env" {
			continue
		}
		for _, word := range words[1:] {
			if name, _, ok := strings.Cut(word, "="); ok {
				names = append(names, name)
			}
		}
	}
	return names
}

type variable struct{ name, value string }

// variant returns the variables of a script's variant: the words NAME=VALUE of its file variant-NAME.env. One script can so
// tell the same story of both address families.
func variant(file, name string) ([]variable, error) {
	if name == "" {
		return nil, nil
	}
	archive, err := txtar.ParseFile(file)
	if err != nil {
		return nil, err
	}
	for _, f := range archive.Files {
		if f.Name != "variant-"+name+".env" {
			continue
		}
		var out []variable
		for _, word := range strings.Fields(string(f.Data)) {
			name, value, ok := strings.Cut(word, "=")
			if !ok {
				return nil, fmt.Errorf("%s: %q is not NAME=VALUE", f.Name, word)
			}
			out = append(out, variable{name, value})
		}
		return out, nil
	}
	return nil, fmt.Errorf("%s has no variant %q", file, name)
}

// result implements testscript.T outside of `go test`.
type result struct {
	log     io.Writer
	verbose bool
	failed  bool
	skipped bool
	reason  string
}

var _ testscript.T = (*result)(nil)

// stop is what Skip, Fatal and FailNow panic with, to unwind to Run.
type stop struct{}

// Skip implements testscript.T.
func (r *result) Skip(args ...any) {
	r.skipped, r.reason = true, fmt.Sprint(args...)
	panic(stop{})
}

// Fatal implements testscript.T.
func (r *result) Fatal(args ...any) {
	r.Log(args...)
	r.FailNow()
}

// FailNow implements testscript.T.
func (r *result) FailNow() {
	r.failed = true
	panic(stop{})
}

// Parallel implements testscript.T: there is one script.
func (r *result) Parallel() {}

// Log implements testscript.T.
func (r *result) Log(args ...any) { fmt.Fprintln(r.log, args...) }

// Verbose implements testscript.T.
func (r *result) Verbose() bool { return r.verbose }

// Run implements testscript.T. All levels share one result.
func (r *result) Run(_ string, f func(testscript.T)) {
	defer func() {
		if e := recover(); e != nil {
			if _, ok := e.(stop); !ok {
				panic(e)
			}
		}
	}()
	f(r)
}

// String returns the result as the guest writes it.
func (r *result) String() string {
	switch {
	case r.failed:
		return "fail"
	case r.skipped:
		return "skip: " + r.reason
	}
	return "pass"
}
