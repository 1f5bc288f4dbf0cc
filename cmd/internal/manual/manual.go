// Package manual makes manual pages of the definitions that --help is made of.
package manual

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// Program is what the pages of a program say beyond its commands and flags.
type Program struct {
	Exits string // what its exit codes mean
	Files []File
	Also  []string // other manual pages, of section 8
}

// File is one that a program reads or makes.
type File struct{ Name, Text string }

// wrongUsage is the exit code for it.
const wrongUsage = 2

// Command is the command that prints the pages, or writes all of them. Its errors for wrong usage are onUsage's.
func (p *Program) Command(program string, onUsage cli.OnUsageErrorFunc) *cli.Command {
	return &cli.Command{
		Name: "man", Usage: "print the manual page of " + program + ", or of a command, for man -l -", ArgsUsage: "[COMMAND]",
		Description:  "The pages are made of the same definitions as --help:\n   " + program + " man | man -l -\nWith --dir all of them are written there, as for packages.",
		OnUsageError: onUsage, Action: p.print,
		Flags: []cli.Flag{&cli.StringFlag{Name: "dir", Usage: "write all pages into `DIR`"}},
	}
}

func (p *Program) print(c *cli.Context) error {
	if dir := c.String("dir"); dir != "" {
		if c.Args().Present() {
			return cli.Exit(fmt.Sprintf("unexpected argument %q; see %s man --help", c.Args().First(), c.App.Name), wrongUsage)
		}
		for _, cmd := range append([]*cli.Command{nil}, c.App.Commands...) {
			if err := os.WriteFile(filepath.Join(dir, p.Name(c.App, cmd)+".8"), p.Page(c.App, cmd), 0o644); err != nil {
				return err
			}
		}
		return nil
	}
	if c.Args().Len() > 1 {
		return cli.Exit(fmt.Sprintf("give one command: %s man [COMMAND]", c.App.Name), wrongUsage)
	}
	var cmd *cli.Command
	if name := c.Args().First(); name != "" {
		if cmd = c.App.Command(name); cmd == nil {
			return cli.Exit(fmt.Sprintf("there is no command %q; see %s --help", name, c.App.Name), wrongUsage)
		}
	}
	_, err := c.App.Writer.Write(p.Page(c.App, cmd))
	return err
}

// Name is that of a command's page, or of the program's own.
func (p *Program) Name(app *cli.App, cmd *cli.Command) string {
	if cmd == nil {
		return app.Name
	}
	return app.Name + "-" + cmd.Name
}

// Page is the manual page of a command, or of the program itself, in the macros of man(7).
func (p *Program) Page(app *cli.App, cmd *cli.Command) []byte {
	pageName := func(cmd *cli.Command) string { return p.Name(app, cmd) }
	m := &roff{}
	m.macro("TH", strings.ToUpper(pageName(cmd)), "8", "", "tsoagent "+app.Version, "System Administration")
	m.macro("SH", "NAME")
	if cmd == nil {
		m.text(pageName(cmd) + ` \- ` + Text(app.Usage))
	} else {
		m.text(Text(pageName(cmd)) + ` \- ` + Text(cmd.Usage))
	}
	m.macro("SH", "SYNOPSIS")
	synopsis, description, flags := "[OPTION]... COMMAND [ARGUMENT]...", app.Description, app.Flags
	if cmd != nil {
		synopsis, description, flags = strings.TrimSpace("[OPTION]... "+cmd.ArgsUsage), cmd.Description, cmd.Flags
		m.text(`.B ` + Text(app.Name+" "+cmd.Name))
	} else {
		m.text(`.B ` + Text(app.Name))
	}
	m.text(Text(synopsis))
	m.macro("SH", "DESCRIPTION")
	if description == "" {
		usage := app.Usage
		if cmd != nil {
			usage = cmd.Usage
		}
		description = strings.ToUpper(usage[:1]) + usage[1:] + "."
	}
	m.paragraphs(description)
	if cmd == nil {
		m.macro("SH", "COMMANDS")
		for _, c := range app.Commands {
			m.macro("TP")
			m.text(`.BR ` + Text(pageName(c)) + ` (8)`)
			m.text(Text(c.Usage))
		}
	}
	m.macro("SH", "OPTIONS")
	for _, f := range flags {
		m.flag(f)
	}
	m.macro("TP")
	m.text(`.BR \-h ", " \-\-help`)
	m.text("show help.")
	m.macro("SH", "EXIT STATUS")
	m.text(p.Exits)
	m.macro("SH", "FILES")
	for _, f := range p.Files {
		m.macro("TP")
		m.text(`.I ` + Text(f.Name))
		m.text(Text(f.Text))
	}
	m.macro("SH", "SEE ALSO")
	var also []string
	if cmd != nil {
		also = append(also, ".BR "+Text(app.Name)+" (8)")
	}
	for _, name := range p.Also {
		also = append(also, ".BR "+Text(name)+" (8)")
	}
	m.text(strings.Join(also, ",\n"))
	return m.Bytes()
}

// roff is a page that is being written.
type roff struct{ bytes.Buffer }

// macro writes one, with its arguments quoted.
func (m *roff) macro(name string, args ...string) {
	m.WriteString("." + name)
	for _, a := range args {
		m.WriteString(` "` + strings.ReplaceAll(Text(a), `"`, `\(dq`) + `"`)
	}
	m.WriteByte('\n')
}

// text writes lines as they are.
func (m *roff) text(s string) { _, _ = io.WriteString(m, s+"\n") }

// paragraphs writes text with its line breaks filled; a line that is indented stays one.
func (m *roff) paragraphs(s string) {
	verbatim := false
	for line := range strings.Lines(s) {
		line = strings.TrimSuffix(line, "\n")
		switch indented := strings.HasPrefix(line, "   "); {
		case indented && !verbatim:
			m.macro("PP")
			m.macro("RS", "4")
			m.macro("nf")
			verbatim = true
		case !indented && verbatim:
			m.macro("fi")
			m.macro("RE")
			verbatim = false
		}
		m.text(Text(strings.TrimLeft(line, " ")))
	}
	if verbatim {
		m.macro("fi")
		m.macro("RE")
	}
}

// flag writes one with its names, its value, what it does, its default and its environment.
func (m *roff) flag(f cli.Flag) {
	d, ok := f.(cli.DocGenerationFlag)
	if !ok {
		return
	}
	value := ""
	usage := d.GetUsage()
	if _, after, has := strings.Cut(usage, "`"); has {
		value, _, _ = strings.Cut(after, "`")
	}
	var names []string
	for _, n := range f.Names() {
		dashes := "--"
		if len(n) == 1 {
			dashes = "-"
		}
		names = append(names, `\fB`+Text(dashes+n)+`\fR`)
	}
	slices.SortStableFunc(names, func(a, b string) int { return len(a) - len(b) })
	m.macro("TP")
	line := strings.Join(names, ", ")
	if value != "" {
		line += ` \fI` + Text(value) + `\fR`
	}
	m.text(line)
	text := strings.ReplaceAll(usage, "`", "")
	if v := d.GetDefaultText(); d.TakesValue() && !slices.Contains([]string{"", "0", "0s"}, v) {
		text += fmt.Sprintf(" (default: %s)", v)
	}
	m.text(Text(text + "."))
	if env := d.GetEnvVars(); len(env) > 0 {
		m.text("The environment variable " + Text(strings.Join(env, ", ")) + " has the same meaning.")
	}
}

// Text is text as troff takes it: it escapes what troff would take for more than text: a backslash, a dash that is to stay one, and a
// control character at the beginning of a line.
func Text(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", "...", "→", `\(->`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}
