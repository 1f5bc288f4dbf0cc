// Command tsoagent keeps segmentation offload off, and route MTUs locked, exactly where IPsec
// needs it, and gives both back when the cause is gone.
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
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"tsoagent/agent"
	"tsoagent/agent/metrics"
	"tsoagent/cmd/internal/inert"
	"tsoagent/cmd/internal/manual"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

// gcPercent is by which part of what is in use the heap may grow until garbage is collected. A gateway's tables stay for
// days, and what changes them is little: half of the runtime's default doubles what collections cost in a storm, about a
// second of CPU for a million events, and takes a quarter of the memory less. GOGC, as the environment has it, goes first.
const gcPercent = 50

func main() {
	if err := newApp().Run(os.Args); err != nil {
		var code cli.ExitCoder
		fmt.Fprintln(inert.Writer{Writer: os.Stderr}, "tsoagent:", err)
		if errors.As(err, &code) {
			os.Exit(code.ExitCode())
		}
		os.Exit(exitFailed)
	}
}

func newApp() *cli.App {
	config := &cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "read the configuration from `FILE`", EnvVars: []string{"TSOAGENT_CONFIG"}}
	return &cli.App{
		Name:                 "tsoagent",
		Usage:                "keep TSO on a machine that also does IPsec",
		Version:              version(),
		HideHelpCommand:      true,
		EnableBashCompletion: true,
		ExitErrHandler:       func(*cli.Context, error) {}, // main prints
		OnUsageError:         usage,
		Commands: []*cli.Command{
			{
				Name: "run", Usage: "follow the kernel, hold features and lock route MTUs until told to stop",
				OnUsageError: usage, Action: run,
				Flags: append([]cli.Flag{
					config,
					&cli.StringFlag{Name: "log-format", Value: "text", Usage: "log on stderr as text or json: `FORMAT`", EnvVars: []string{"TSOAGENT_LOG_FORMAT"}},
					&cli.BoolFlag{Name: "debug", Usage: "log events too", EnvVars: []string{"TSOAGENT_DEBUG"}},
				}, keyFlags()...),
			},
			{
				Name: "init", Usage: "write a minimal configuration to " + defaultConfig + " or FILE, where there is none",
				ArgsUsage: "[FILE]", OnUsageError: usage, Action: initialise,
				Flags: []cli.Flag{&cli.StringFlag{Name: "mode", Value: string(agent.Enforce), Usage: "write this `MODE`: enforce, or observe to look first"}},
			},
			{
				Name: "check", Usage: "validate a configuration; exit 2 and a line for each mistake if it is wrong",
				ArgsUsage: "[FILE]", OnUsageError: usage, Action: check, Flags: []cli.Flag{config},
			},
			guardCommand(),
			pages.Command("tsoagent", usage),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return cli.Exit(fmt.Sprintf("there is no command %q; see tsoagent --help", c.Args().First()), exitUsage)
			}
			return cli.ShowAppHelp(c)
		},
	}
}

func usage(_ *cli.Context, err error, _ bool) error {
	return cli.Exit(fmt.Sprintf("%v; see tsoagent --help", err), exitUsage)
}

// pages are the manual pages.
var pages = manual.Program{
	Exits: "0 done or stopped gracefully, 1 failed, 2 wrong usage or configuration.",
	Files: []manual.File{
		{Name: defaultConfig, Text: "the service's configuration."},
		{Name: "/etc/default/tsoagent", Text: "environment variables of the service, which go before the configuration."},
		{Name: "/run/tsoagent", Text: "the journal of what was changed, and the control socket."},
		{Name: "/usr/share/doc/tsoagent/configuration.md", Text: "each key of the configuration."},
	},
	Also: []string{"tsoctl", "ip-xfrm", "ip-route", "ethtool"},
}

// version is that of the build, from the version control system.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}

// load reads the configuration: defaults, then the file, then flags and environment.
func load(c *cli.Context) (agent.Config, error) {
	var cfg agent.Config
	if file := c.String("config"); file != "" {
		var err error
		if cfg, err = agent.LoadOwnConfig(file); err != nil {
			return cfg, configError(file, err)
		}
	}
	if err := setKeys(&cfg, c); err != nil {
		return cfg, cli.Exit(err.Error(), exitUsage)
	}
	if err := metrics.CheckWebConfig(cfg.MetricsWebConfig); err != nil {
		return cfg, cli.Exit(err.Error(), exitUsage)
	}
	if wrong := cfg.Validate(); len(wrong) > 0 {
		return cfg, cli.Exit(fmt.Sprintf("--%s: %s", flagOf(wrong[0].Key), wrong[0].Text), exitUsage)
	}
	return cfg, nil
}

func configError(file string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return cli.Exit(fmt.Sprintf("there is no configuration file %s; `tsoagent init %s` writes one", file, file), exitUsage)
	}
	return cli.Exit(err.Error(), exitUsage)
}

func check(c *cli.Context) error {
	file := c.Args().First()
	if file == "" {
		file = c.String("config")
	}
	if file == "" || c.Args().Len() > 1 {
		return cli.Exit("give one configuration file: tsoagent check FILE", exitUsage)
	}
	cfg, err := agent.LoadConfig(file)
	if err != nil {
		return configError(file, err)
	}
	if err := metrics.CheckWebConfig(cfg.MetricsWebConfig); err != nil {
		return cli.Exit(err.Error(), exitUsage)
	}
	fmt.Fprintf(c.App.Writer, "%s: ok\n", file)
	return nil
}

func logger(c *cli.Context) (*slog.Logger, error) {
	level := slog.LevelInfo
	if c.Bool("debug") {
		level = slog.LevelDebug
	}
	h, err := newHandler(os.Stderr, c.String("log-format"), level, toJournal(os.Stderr, os.Getenv("JOURNAL_STREAM")))
	if err != nil {
		return nil, cli.Exit(err.Error(), exitUsage)
	}
	return slog.New(h), nil
}

func run(c *cli.Context) error {
	if c.Args().Present() {
		return cli.Exit(fmt.Sprintf("unexpected argument %q; see tsoagent run --help", c.Args().First()), exitUsage)
	}
	cfg, err := load(c)
	if err != nil {
		return err
	}
	log, err := logger(c)
	if err != nil {
		return err
	}
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("the watchdog's environment makes no sense: it is not fed", "err", err)
	}
	program, err := os.Executable() // where another one is installed in its place
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	usr2 := make(chan os.Signal, 1)
	signal.Notify(usr2, syscall.SIGUSR2)
	defer signal.Stop(usr2)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	f, err := agent.NewFleet(ctx, cfg, log, version())
	switch {
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return nil // stopped while it started
	case err != nil:
		return err
	}
	g := newGuard(c, log)
	f.GuardedBy(g)
	again := func() (agent.Config, error) {
		if err := rereadable(c.String("config")); err != nil {
			return agent.Config{}, err
		}
		return load(c)
	}
	s := &service{
		fleet: f, log: log, load: again, hup: hup, asks: make(chan chan<- error), notify: notifySystemd, watchdog: watchdog,
		usr2: usr2, become: func() error { return g.Without(func() error { return become(program) }) },
		metrics: metricsServer{collector: metrics.NewCollector(version(), f), log: log},
	}
	tasks, serving := errgroup.WithContext(context.Background())
	serving, done := context.WithCancel(serving)
	tasks.Go(func() error { defer done(); return f.Run(ctx) })
	tasks.Go(func() error { s.run(ctx, serving, cfg.WithDefaults()); return nil })
	tasks.Go(func() error {
		err := f.Serve(serving)
		if err != nil {
			stop()
		}
		return err
	})
	return errors.Join(tasks.Wait(), f.Close(), g.End())
}
