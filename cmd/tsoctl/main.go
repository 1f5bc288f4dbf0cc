// Command tsoctl shows what tsoagent sees, wants and has done, and undoes it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/netns"
	"tsoagent/cmd/internal/inert"
)

// Exit codes.
const (
	exitFailed   = 1
	exitUsage    = 2
	exitDegraded = 3
	exitNoAgent  = 4
)

func main() { os.Exit(run(os.Args)) }

// run returns the exit code.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	app := newApp()
	if len(args) > 1 && args[1] == completeCommand {
		complete(app, args[2:], os.Stdout)
		return 0
	}
	err := app.RunContext(ctx, flagsFirst(app, args))
	if err == nil {
		return 0
	}
	var absent *agent.AbsentError
	if errors.As(err, &absent) {
		err = cli.Exit(fmt.Sprintf("--%s: %v", absent.Of, absent), exitUsage)
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(inert.Writer{Writer: os.Stderr}, "tsoctl:", text)
	}
	return exitCode(err)
}

func exitCode(err error) int {
	var coder cli.ExitCoder
	switch {
	case errors.As(err, &coder):
		return coder.ExitCode()
	case errors.Is(err, client.ErrNoAgent):
		return exitNoAgent
	}
	return exitFailed
}

// common are the flags that every command takes, before or after its name. The environment
// stands behind both places, so only those before the name read it.
func common(env bool) []cli.Flag {
	vars := func(name string) []string {
		if !env {
			return nil
		}
		return []string{name}
	}
	return []cli.Flag{
		&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "table", Usage: "print a table, json or yaml: `FORMAT`", EnvVars: vars("TSOCTL_OUTPUT")},
		&cli.StringFlag{Name: "run-dir", Value: agent.DefaultRunDir, Usage: "the agent's run directory is `DIR`", EnvVars: vars("TSOAGENT_RUN_DIR")},
		&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "without an agent: plan with the configuration in `FILE`", EnvVars: vars("TSOAGENT_CONFIG")},
	}
}

// netnsFlag chooses the namespace that a command is about.
func netnsFlag() cli.Flag {
	return &cli.StringFlag{Name: "netns", Usage: "in the network namespace `NAME`: host, a name in /run/netns, a path or pid:N"}
}

// netnsOf is the namespace that was given, checked, else none.
func netnsOf(c *cli.Context) (string, error) {
	name := c.String("netns")
	if name == "" {
		return "", nil
	}
	err := netns.Check(name)
	if name == netns.All {
		err = errors.New("one namespace, not all of them")
	}
	if err != nil {
		return "", cli.Exit(fmt.Sprintf("--netns: %v", err), exitUsage)
	}
	return name, nil
}

// given is the value of a common flag that was given, before or after the command, or by the
// environment. An empty one is none.
func given(c *cli.Context, name string) (string, bool) {
	for _, ctx := range c.Lineage() {
		if ctx.Command != nil && slices.Contains(ctx.LocalFlagNames(), name) && ctx.String(name) != "" {
			return ctx.String(name), true
		}
	}
	return "", false
}

// option is the value of a common flag: what was given, else its default.
func option(c *cli.Context, name string) string {
	if v, ok := given(c, name); ok {
		return v
	}
	for _, f := range common(false) {
		if f, ok := f.(*cli.StringFlag); ok && f.Name == name {
			return f.Value
		}
	}
	return ""
}

// flagsFirst moves flags ahead of other arguments within a command, as the flag parser stops
// at the first that is none: `tsoctl explain DST --from ADDRESS` is what people type.
func flagsFirst(app *cli.App, args []string) []string {
	for i, arg := range args {
		cmd := app.Command(arg)
		if i == 0 || cmd == nil {
			continue
		}
		out := slices.Clone(args[:i+1])
		var rest []string
		for j := i + 1; j < len(args); j++ {
			switch {
			case args[j] == "--":
				return append(append(out, rest...), args[j:]...)
			case len(args[j]) < 2 || args[j][0] != '-':
				rest = append(rest, args[j])
			default:
				out = append(out, args[j])
				if takesValue(cmd, args[j]) && j+1 < len(args) {
					j++
					out = append(out, args[j])
				}
			}
		}
		return append(out, rest...)
	}
	return args
}

func takesValue(cmd *cli.Command, arg string) bool {
	name := strings.TrimLeft(arg, "-")
	for _, f := range cmd.Flags {
		if _, boolean := f.(*cli.BoolFlag); slices.Contains(f.Names(), name) {
			return !boolean
		}
	}
	return false
}

func newApp() *cli.App {
	app := &cli.App{
		Name:            "tsoctl",
		Usage:           "see and undo what tsoagent does",
		Version:         version(),
		HideHelpCommand: true,
		ExitErrHandler:  func(*cli.Context, error) {}, // main prints
		OnUsageError:    usage,
		Description: "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 degraded (something is contested,\n" +
			"refused, stale or paused, or the doctor has a finding), 4 no agent is running.",
		Flags: common(true),
		Commands: []*cli.Command{
			statusCommand(),
			planCommand(),
			explainCommand(),
			restoreCommand(),
			probeCommand(),
			flowsCommand(),
			verifyCommand(),
			doctorCommand(),
			devicesCommand(),
			locksCommand(),
			eventsCommand(),
			pauseCommand(),
			resumeCommand(),
			reloadCommand(),
			handoverCommand(),
			completionCommand(),
			pages.Command("tsoctl", usage),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return cli.Exit(fmt.Sprintf("there is no command %q; see tsoctl --help", c.Args().First()), exitUsage)
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, name := range []string{"status", "plan", "explain", "restore", "flows", "verify", "doctor", "devices", "locks", "events", "pause", "resume"} {
		cmd := app.Command(name)
		cmd.Flags = append(cmd.Flags, netnsFlag())
	}
	for _, cmd := range app.Commands {
		cmd.Flags = append(cmd.Flags, common(false)...)
		cmd.Before = knownOutput // not after the work is done
	}
	return app
}

func usage(_ *cli.Context, err error, _ bool) error {
	return cli.Exit(fmt.Sprintf("%v; see tsoctl --help", err), exitUsage)
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}

func noArgs(c *cli.Context) error {
	if c.Args().Present() {
		return cli.Exit(fmt.Sprintf("unexpected argument %q; see tsoctl %s --help", c.Args().First(), c.Command.Name), exitUsage)
	}
	return nil
}

// plainCall is what a command without arguments is about: the configuration and the namespace.
func plainCall(c *cli.Context) (cfg agent.Config, ns string, err error) {
	if err = noArgs(c); err != nil {
		return cfg, "", err
	}
	return call(c)
}

// call is what a command with arguments is about besides them.
func call(c *cli.Context) (cfg agent.Config, ns string, err error) {
	if cfg, err = configOf(c); err != nil {
		return cfg, "", err
	}
	ns, err = netnsOf(c)
	return cfg, ns, err
}

// logAbove is the log of a command without an agent.
func logAbove(least slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: least}))
}

// configOf is what the agent is, or would be, configured with: the file, then the flags.
func configOf(c *cli.Context) (agent.Config, error) {
	var cfg agent.Config
	if file := option(c, "config"); file != "" {
		var err error
		if cfg, err = agent.LoadConfig(file); errors.Is(err, fs.ErrNotExist) {
			return cfg, cli.Exit(fmt.Sprintf("there is no configuration file %s", file), exitUsage)
		} else if err != nil {
			return cfg, cli.Exit(err.Error(), exitUsage)
		}
	}
	if _, ok := given(c, "run-dir"); ok || cfg.RunDir == "" {
		cfg.RunDir = option(c, "run-dir")
	}
	return cfg, nil
}
