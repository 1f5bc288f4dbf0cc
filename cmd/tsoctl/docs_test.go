package main

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func TestEveryFlagIsDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/commands.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	app := newApp()
	flags := app.Flags
	for _, cmd := range app.Commands {
		if !strings.Contains(text, "### tsoctl "+cmd.Name+"\n") {
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
