package main

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

func manCommand() *cli.Command {
	return &cli.Command{
		Name: "man", Usage: "print the manual page of tsoctl, or of a command, for man -l -", ArgsUsage: "[COMMAND]",
		Description:  "The pages are made of the same definitions as --help:\n   tsoctl man flows | man -l -\nWith --dir all of them are written there, as for packages.",
		OnUsageError: usage, Action: man,
		Flags: []cli.Flag{&cli.StringFlag{Name: "dir", Usage: "write all pages into `DIR`"}},
	}
}

func man(c *cli.Context) error {
	if dir := c.String("dir"); dir != "" {
		if err := noArgs(c); err != nil {
			return err
		}
		for _, cmd := range append([]*cli.Command{nil}, c.App.Commands...) {
			if err := os.WriteFile(filepath.Join(dir, pageName(cmd)+".8"), manPage(c.App, cmd), 0o644); err != nil {
				return err
			}
		}
		return nil
	}
	if c.Args().Len() > 1 {
		return cli.Exit("give one command: tsoctl man [COMMAND]", exitUsage)
	}
	var cmd *cli.Command
	if name := c.Args().First(); name != "" {
		if cmd = c.App.Command(name); cmd == nil {
			return cli.Exit(fmt.Sprintf("there is no command %q; see tsoctl --help", name), exitUsage)
		}
	}
	_, err := c.App.Writer.Write(manPage(c.App, cmd))
	return err
}

// pageName is that of a command, or of tsoctl itself.
func pageName(cmd *cli.Command) string {
	if cmd == nil {
		return "tsoctl"
	}
	return "tsoctl-" + cmd.Name
}

// manPage is the manual page of a command, or of tsoctl itself, in the macros of man(7).
func manPage(app *cli.App, cmd *cli.Command) []byte {
	m := &roff{}
	m.macro("TH", strings.ToUpper(pageName(cmd)), "8", "", "tsoagent "+app.Version, "System Administration")
	m.macro("SH", "NAME")
	if cmd == nil {
		m.text(pageName(cmd) + ` \- ` + roffText(app.Usage))
	} else {
		m.text(roffText(pageName(cmd)) + ` \- ` + roffText(cmd.Usage))
	}
	m.macro("SH", "SYNOPSIS")
	synopsis, description, flags := "[OPTION]... COMMAND [ARGUMENT]...", app.Description, app.Flags
	if cmd != nil {
		synopsis, description, flags = strings.TrimSpace("[OPTION]... "+cmd.ArgsUsage), cmd.Description, cmd.Flags
		m.text(`.B tsoctl ` + roffText(cmd.Name))
	} else {
		m.text(`.B tsoctl`)
	}
	m.text(roffText(synopsis))
	m.macro("SH", "DESCRIPTION")
	if description == "" {
		description = strings.ToUpper(cmd.Usage[:1]) + cmd.Usage[1:] + "."
	}
	m.paragraphs(description)
	if cmd == nil {
		m.macro("SH", "COMMANDS")
		for _, c := range app.Commands {
			m.macro("TP")
			m.text(`.BR tsoctl\-` + roffText(c.Name) + ` (8)`)
			m.text(roffText(c.Usage))
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
	m.text("0 done, 1 failed, 2 wrong usage, 3 degraded, 4 no agent is running.")
	m.macro("SH", "FILES")
	m.macro("TP")
	m.text(`.I /run/tsoagent/tsoagent.sock`)
	m.text("the agent's control socket.")
	m.macro("SH", "SEE ALSO")
	var also []string
	if cmd != nil {
		also = append(also, ".BR tsoctl (8)")
	}
	for _, name := range []string{"ip-xfrm", "ip-route", "ethtool"} {
		also = append(also, ".BR "+roffText(name)+" (8)")
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
		m.WriteString(` "` + strings.ReplaceAll(roffText(a), `"`, `\(dq`) + `"`)
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
		m.text(roffText(strings.TrimLeft(line, " ")))
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
		names = append(names, `\fB`+roffText(dashes+n)+`\fR`)
	}
	slices.SortStableFunc(names, func(a, b string) int { return len(a) - len(b) })
	m.macro("TP")
	line := strings.Join(names, ", ")
	if value != "" {
		line += ` \fI` + roffText(value) + `\fR`
	}
	m.text(line)
	text := strings.ReplaceAll(usage, "`", "")
	if v := d.GetDefaultText(); d.TakesValue() && !slices.Contains([]string{"", "0", "0s"}, v) {
		text += fmt.Sprintf(" (default: %s)", v)
	}
	m.text(roffText(text + "."))
	if env := d.GetEnvVars(); len(env) > 0 {
		m.text("The environment variable " + roffText(strings.Join(env, ", ")) + " has the same meaning.")
	}
}

// roffText escapes what troff would take for more than text: a backslash, a dash that is to stay one, and a
// control character at the beginning of a line.
func roffText(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", "...", "→", `\(->`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}
