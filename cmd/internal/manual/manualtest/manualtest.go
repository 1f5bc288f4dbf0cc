// Package manualtest holds a program's manual pages to its definitions, and has groff read them.
package manualtest

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"tsoagent/cmd/internal/manual"
)

// Clean fails the test where a page lacks a flag, or groff warns of one.
func Clean(t *testing.T, p *manual.Program, app *cli.App) {
	t.Helper()
	groff, missing := exec.LookPath("groff")
	for _, cmd := range append([]*cli.Command{nil}, app.Commands...) {
		name, page := p.Name(app, cmd), p.Page(app, cmd)
		flags := app.Flags
		if cmd != nil {
			flags = cmd.Flags
		}
		for _, f := range flags {
			for _, flag := range f.Names() {
				if !bytes.Contains(page, []byte(manual.Text("-"+flag)+`\fR`)) {
					t.Errorf("%s: %s is missing", name, flag)
				}
			}
		}
		for _, heading := range []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "FILES", "SEE ALSO"} {
			if !bytes.Contains(page, []byte(`.SH "`+heading+`"`+"\n")) {
				t.Errorf("%s: no %s", name, heading)
			}
		}
		if missing != nil {
			continue
		}
		run := exec.Command(groff, "-man", "-ww", "-Tutf8")
		run.Stdin = bytes.NewReader(page)
		var warnings bytes.Buffer
		run.Stderr = &warnings
		out, err := run.Output()
		if err != nil || warnings.Len() > 0 || len(out) < 500 {
			t.Errorf("%s: %v\n%s", name, err, warnings.String())
		}
	}
	if missing != nil {
		t.Skip("groff is missing (package groff-base)")
	}
}

// Written fails the test unless `man --dir` writes the pages with these names among them, one for each command and one for the program.
func Written(t *testing.T, app *cli.App, want ...string) {
	t.Helper()
	dir := t.TempDir()
	if err := app.Run([]string{app.Name, "man", "--dir", dir}); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, f := range files {
		names[f.Name()] = true
	}
	for _, name := range want {
		if !names[name] {
			t.Errorf("%s is missing", name)
		}
	}
	if len(names) != len(app.Commands)+1 {
		t.Errorf("%d pages for %d commands", len(names), len(app.Commands))
	}
	var out strings.Builder
	app.Writer = &out
	if err := app.Run([]string{app.Name, "man", app.Commands[0].Name}); err != nil || !strings.HasPrefix(out.String(), ".TH ") {
		t.Errorf("man %s: %v, %.60q", app.Commands[0].Name, err, out.String())
	}
}
