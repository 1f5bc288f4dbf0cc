// Command tsoctl shows what tsoagent sees, wants and has done, and undoes it.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/netns"
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
		fmt.Fprintln(plain{os.Stderr}, "tsoctl:", text)
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
			{Name: "status", Usage: "what is covered, held off and locked; exit 3 if a person should look", OnUsageError: usage, Action: status},
			{Name: "plan", Usage: "every coverage with its verdict; without an agent, read from the kernel", OnUsageError: usage, Action: showPlan},
			{
				Name: "explain", Usage: "what happens to packets for an address, and why; works without an agent", ArgsUsage: "DST",
				OnUsageError: usage, Action: explain,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "from", Usage: "the packets' source `ADDRESS`; else the one that the kernel picks"},
					&cli.UintFlag{Name: "proto", Usage: "IP protocol `NUMBER`, 6 for TCP"},
					&cli.UintFlag{Name: "port", Usage: "the packets' destination `PORT`"},
					&cli.StringFlag{Name: "mark", Usage: "the packets' fwmark `MARK`, decimal or 0x…"},
				},
			},
			{
				Name: "restore", Usage: "undo what an agent that is gone has left", OnUsageError: usage, Action: restore,
				Flags: []cli.Flag{
					&cli.BoolFlag{Name: "stale", Usage: "only what can go stale: the agent's rules and clones; holds and in-place locks stay"},
					&cli.UintFlag{Name: "table", Usage: "the agent's first routing table is `NUMBER`, if not 5450"},
					&cli.UintFlag{Name: "protocol", Usage: "the agent's route protocol is `NUMBER`, if not 84"},
				},
			},
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

// show prints v as the format asks, with table for people.
func show(c *cli.Context, v any, table func(page)) error {
	switch f := option(c, "output"); f {
	case "table":
		table(pageOf(c.App.Writer))
		return nil
	case "json":
		enc := json.NewEncoder(c.App.Writer)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	case "yaml":
		return showYAML(c.App.Writer, v)
	default:
		return knownOutput(c)
	}
}

func knownOutput(c *cli.Context) error {
	f := option(c, "output")
	if !slices.Contains([]string{"table", "json", "yaml"}, f) {
		return cli.Exit(fmt.Sprintf("--output: %q is not one of table, json, yaml", f), exitUsage)
	}
	return nil
}

// showYAML prints what JSON would, so that both have the same names and order.
func showYAML(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return err
	}
	blockStyle(&n)
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	return errors.Join(enc.Encode(&n), enc.Close())
}

func blockStyle(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle | yaml.DoubleQuotedStyle
	for _, c := range n.Content {
		blockStyle(c)
	}
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
	if cfg, err = configOf(c); err != nil {
		return cfg, "", err
	}
	ns, err = netnsOf(c)
	return cfg, ns, err
}

func status(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	r, err := client.New(cfg.RunDir).ReportIn(c.Context, ns)
	if err != nil {
		return withoutAgent(err, cfg.RunDir)
	}
	if err := show(c, r, func(p page) { statusTable(p, r) }); err != nil {
		return err
	}
	if degraded(r) {
		return cli.Exit("", exitDegraded)
	}
	return nil
}

// nextWithout says what to do where no agent runs.
func nextWithout(runDir string) string {
	text := agent.LeftOver(runDir).String()
	if text == "" {
		return "`tsoctl plan` shows what one would do, `tsoagent run` starts one"
	}
	return fmt.Sprintf("one that was killed or told to keep has left %s: `tsoagent run` takes over what it still wants, `tsoctl restore` gives all of it back", text)
}

// degraded reports whether a person should look.
func degraded(r *agent.Report) bool { return r.Degraded() }

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

func showPlan(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	r, err := client.New(cfg.RunDir).ReportIn(c.Context, ns)
	if errors.Is(err, client.ErrNoAgent) {
		r, err = agent.LookIn(c.Context, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version(), nil)
	}
	if err != nil {
		return err
	}
	return show(c, r, func(p page) { planTable(p, r) })
}

func explain(c *cli.Context) error {
	q, err := question(c)
	if err != nil {
		return cli.Exit(err.Error(), exitUsage)
	}
	cfg, err := configOf(c)
	if err != nil {
		return err
	}
	ns, err := netnsOf(c)
	if err != nil {
		return err
	}
	e, err := client.New(cfg.RunDir).ExplainIn(c.Context, ns, q)
	if errors.Is(err, client.ErrNoAgent) {
		_, err = agent.LookIn(c.Context, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version(), func(ask func(agent.Question) (*agent.Explanation, error)) error {
			e, err = ask(q)
			return err
		})
	}
	if err != nil {
		return err
	}
	return show(c, e, func(p page) { explainTable(p, e) })
}

func question(c *cli.Context) (agent.Question, error) {
	var q agent.Question
	if c.Args().Len() != 1 {
		return q, errors.New("give one destination address: tsoctl explain DST [--from ADDRESS]")
	}
	parse := func(name, s string) (netip.Addr, error) {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return a, fmt.Errorf("%s: %q is no IP address", name, s)
		}
		return a.Unmap(), nil
	}
	var err error
	if q.Dst, err = parse("DST", c.Args().First()); err != nil {
		return q, err
	}
	if s := c.String("from"); s != "" {
		if q.From, err = parse("--from", s); err != nil {
			return q, err
		}
		if q.From.Is4() != q.Dst.Is4() {
			return q, errors.New("--from and DST are of different families")
		}
	}
	if c.Uint("proto") > 255 {
		return q, fmt.Errorf("--proto: %d is no protocol number (0 to 255)", c.Uint("proto"))
	}
	if c.Uint("port") > 65535 {
		return q, fmt.Errorf("--port: %d is no port (0 to 65535)", c.Uint("port"))
	}
	q.Proto, q.Port = uint8(c.Uint("proto")), uint16(c.Uint("port"))
	if s := c.String("mark"); s != "" {
		m, err := strconv.ParseUint(s, 0, 32)
		if err != nil {
			return q, fmt.Errorf("--mark: %q is no mark", s)
		}
		q.Mark = uint32(m)
	}
	return q, nil
}

func restore(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	cfg, err := configOf(c)
	if err != nil {
		return err
	}
	if c.Uint("table") > 1<<32-1 || c.Uint("protocol") > 255 {
		return cli.Exit("--table takes up to 4294967295, --protocol up to 255", exitUsage)
	}
	cfg.SetNumbers(c.Uint("table"), c.Uint("protocol"))
	if wrong := cfg.Validate(); len(wrong) > 0 {
		return cli.Exit(fmt.Sprintf("--%s: %s", strings.ReplaceAll(wrong[0].Key, "_", "-"), wrong[0].Text), exitUsage)
	}
	ns, err := netnsOf(c)
	if err != nil {
		return err
	}
	var r *agent.Restored
	var failed error
	if ns != "" {
		r, failed = agent.RestoreIn(c.Context, ns, cfg, logAbove(slog.LevelWarn), version(), c.Bool("stale"))
	} else {
		r, failed = agent.RestoreAll(c.Context, cfg, logAbove(slog.LevelWarn), version(), c.Bool("stale"))
	}
	if errors.Is(failed, agent.ErrRunning) {
		return fmt.Errorf("an agent is running: stop it first, it restores by itself (%w)", failed)
	}
	if r == nil {
		return failed
	}
	if err := show(c, r, func(p page) { restoreTable(p, r, c.Bool("stale")) }); err != nil {
		return err
	}
	failures := r.Failed
	for _, n := range r.Namespaces {
		failures += n.Failed
	}
	if failures > 0 {
		return errors.Join(failed, cli.Exit(fmt.Sprintf("%d writes failed, see above", failures), exitFailed))
	}
	return failed
}
