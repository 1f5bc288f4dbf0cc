package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"tsoagent/agent/flows"
	"tsoagent/agent/netns"
	"tsoagent/agent/probe"
)

// The shells' scripts ask tsoctl itself: what they get are words, which no shell evaluates.
var (
	//go:embed completion/tsoctl.bash
	bashScript string
	//go:embed completion/tsoctl.zsh
	zshScript string
	//go:embed completion/tsoctl.fish
	fishScript string
)

var shells = map[string]*string{"bash": &bashScript, "zsh": &zshScript, "fish": &fishScript}

func completionCommand() *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print the completion of commands and flags for a shell", ArgsUsage: "bash|zsh|fish",
		Description: "To have it in each shell:\n" +
			"   bash: tsoctl completion bash > /etc/bash_completion.d/tsoctl\n" +
			"   zsh:  tsoctl completion zsh > \"${fpath[1]}/_tsoctl\"\n" +
			"   fish: tsoctl completion fish > /etc/fish/completions/tsoctl.fish",
		OnUsageError: usage,
		Action: func(c *cli.Context) error {
			script := shells[c.Args().First()]
			if c.Args().Len() != 1 || script == nil {
				return cli.Exit("give one shell: bash, zsh or fish", exitUsage)
			}
			_, err := io.WriteString(c.App.Writer, *script)
			return err
		},
	}
}

// completeCommand is what the scripts call: tsoctl __complete WORD…, the last one being typed.
const completeCommand = "__complete"

// anyFile tells the shell to complete a file's name.
const anyFile = ":files"

// complete prints what the last word can become, a line for each, with a description after a tab.
func complete(app *cli.App, words []string, w io.Writer) {
	var b bytes.Buffer
	for _, c := range completions(app, words) {
		if c.about != "" {
			fmt.Fprintf(&b, "%s\t%s\n", c.word, c.about)
		} else {
			fmt.Fprintln(&b, c.word)
		}
	}
	_, _ = w.Write(b.Bytes()) // a shell that went away is its own affair
}

// A completion is what a word can become.
type completion struct{ word, about string }

func completions(app *cli.App, words []string) []completion {
	if len(words) == 0 {
		words = []string{""}
	}
	last := words[len(words)-1]
	// The command, and the flag whose value comes next.
	var cmd *cli.Command
	var valueOf cli.Flag
	literal := false // after --
	flags := func() []cli.Flag {
		if cmd != nil {
			return cmd.Flags
		}
		return app.Flags
	}
	for _, word := range words[:len(words)-1] {
		switch {
		case valueOf != nil:
			valueOf = nil
		case word == "--":
			literal = true
		case !literal && strings.HasPrefix(word, "-"):
			if name, _, has := strings.Cut(word, "="); !has {
				if f := flagNamed(flags(), strings.TrimLeft(name, "-")); f != nil && wantsValue(f) {
					valueOf = f
				}
			}
		case cmd == nil:
			if cmd = app.Command(word); cmd == nil {
				return nil
			}
		}
	}
	var out []completion
	switch name, _, has := strings.Cut(last, "="); {
	case valueOf != nil:
		out = values(cmd, valueOf, "")
	case literal:
	case has && strings.HasPrefix(last, "-"):
		if f := flagNamed(flags(), strings.TrimLeft(name, "-")); f != nil && wantsValue(f) {
			out = values(cmd, f, name+"=")
		}
	case strings.HasPrefix(last, "-"):
		for _, f := range flags() {
			for _, n := range f.Names() {
				if len(n) > 1 {
					out = append(out, completion{"--" + n, flagUsage(f)})
				}
			}
		}
		out = append(out, completion{"--help", "show help"})
	case cmd == nil:
		for _, c := range app.Commands {
			out = append(out, completion{c.Name, c.Usage})
		}
	default:
		out = arguments(app, cmd)
	}
	return slices.DeleteFunc(out, func(c completion) bool { return c.word != anyFile && !strings.HasPrefix(c.word, last) })
}

func flagNamed(flags []cli.Flag, name string) cli.Flag {
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

func wantsValue(f cli.Flag) bool {
	_, boolean := f.(*cli.BoolFlag)
	return !boolean
}

// flagUsage is a flag's text without the marks of its placeholder.
func flagUsage(f cli.Flag) string {
	if d, ok := f.(cli.DocGenerationFlag); ok {
		return strings.ReplaceAll(d.GetUsage(), "`", "")
	}
	return ""
}

// values are those that a command's flag can have, each after a prefix.
func values(cmd *cli.Command, f cli.Flag, prefix string) []completion {
	var list []string
	switch f.Names()[0] {
	case "output":
		list = []string{"table", "json", "yaml"}
	case "netns":
		names, _ := netns.Names() // without them there is host
		list = append([]string{netns.Host}, names...)
	case "state":
		list = flows.StateList()
	case "dev":
		list = deviceNames()
	case "kind":
		list = probe.Kinds()
	case "sa":
		list = probe.SANames()
	case "for":
		if list = []string{"10m", "1h", "8h"}; cmd != nil && cmd.Name == "verify" {
			list = []string{"5s", "30s", "2m"}
		}
	case "within":
		list = []string{"10s", "1m", "5m"}
	case "proto":
		list = slices.Sorted(maps.Keys(protocols))
	case "run-dir", "config", "state-dir", "dir":
		return []completion{{anyFile, ""}}
	}
	out := make([]completion, 0, len(list))
	for _, v := range list {
		out = append(out, completion{prefix + v, ""})
	}
	return out
}

// arguments are those of a command.
func arguments(app *cli.App, cmd *cli.Command) []completion {
	var out []completion
	switch cmd.Name {
	case "completion":
		out = []completion{{"bash", ""}, {"fish", ""}, {"zsh", ""}}
	case "man":
		for _, c := range app.Commands {
			out = append(out, completion{c.Name, c.Usage})
		}
	case "devices", "verify":
		for _, name := range deviceNames() {
			out = append(out, completion{name, ""})
		}
	}
	return out
}

func deviceNames() []string {
	list, err := net.Interfaces()
	if err != nil {
		return nil
	}
	var out []string
	for _, i := range list {
		out = append(out, i.Name)
	}
	return out
}
