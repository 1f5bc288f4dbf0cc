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
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"tsoagent/agent"
	"tsoagent/agent/metrics"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	if err := newApp().Run(os.Args); err != nil {
		var code cli.ExitCoder
		fmt.Fprintln(os.Stderr, "tsoagent:", err)
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
				Flags: []cli.Flag{
					config,
					&cli.StringFlag{Name: "mode", Usage: "enforce, or observe to compute and report and change nothing: `MODE`", EnvVars: []string{"TSOAGENT_MODE"}},
					&cli.StringFlag{Name: "run-dir", Usage: "keep journal and control socket in `DIR`", EnvVars: []string{"TSOAGENT_RUN_DIR"}},
					&cli.StringSliceFlag{Name: "netns", Usage: "follow the network namespace `NAME`: host, all, a name in /run/netns, a path or pid:N; may be repeated", EnvVars: []string{"TSOAGENT_NETNS"}},
					&cli.StringFlag{Name: "log-format", Value: "text", Usage: "log on stderr as text or json: `FORMAT`", EnvVars: []string{"TSOAGENT_LOG_FORMAT"}},
					&cli.BoolFlag{Name: "debug", Usage: "log events too", EnvVars: []string{"TSOAGENT_DEBUG"}},
				},
			},
			{
				Name: "check", Usage: "validate a configuration; exit 2 and a line for each mistake if it is wrong",
				ArgsUsage: "[FILE]", OnUsageError: usage, Action: check, Flags: []cli.Flag{config},
			},
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
		if cfg, err = agent.LoadConfig(file); err != nil {
			return cfg, configError(file, err)
		}
	}
	if v := c.String("mode"); v != "" {
		cfg.Mode = agent.Mode(v)
	}
	if v := c.String("run-dir"); v != "" {
		cfg.RunDir = v
	}
	if v := c.StringSlice("netns"); len(v) > 0 {
		cfg.Namespaces = v
	}
	if err := metrics.CheckWebConfig(cfg.MetricsWebConfig); err != nil {
		return cfg, cli.Exit(err.Error(), exitUsage)
	}
	if wrong := cfg.Validate(); len(wrong) > 0 {
		flag := strings.ReplaceAll(wrong[0].Key, "_", "-")
		if flag == "namespaces" {
			flag = "netns"
		}
		return cfg, cli.Exit(fmt.Sprintf("--%s: %s", flag, wrong[0].Text), exitUsage)
	}
	return cfg, nil
}

func configError(file string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return cli.Exit(fmt.Sprintf("there is no configuration file %s", file), exitUsage)
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
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if c.Bool("debug") {
		opts.Level = slog.LevelDebug
	}
	switch f := c.String("log-format"); f {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	default:
		return nil, cli.Exit(fmt.Sprintf("--log-format: %q is not one of text, json", f), exitUsage)
	}
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
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	a, err := agent.NewFleet(ctx, cfg, log, version())
	switch {
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return nil // stopped while it started
	case err != nil:
		return err
	}
	g, serving := errgroup.WithContext(context.Background())
	serving, done := context.WithCancel(serving)
	g.Go(func() error { defer done(); return a.Run(ctx) })
	g.Go(func() error { serveMetrics(serving, cfg.WithDefaults(), a, log); return nil })
	g.Go(func() error {
		err := a.Serve(serving)
		if err != nil {
			stop()
		}
		return err
	})
	return errors.Join(g.Wait(), a.Close())
}

// serveMetrics lets Prometheus scrape until the context ends. Whatever goes wrong with that is no reason
// to leave the network alone.
func serveMetrics(ctx context.Context, cfg agent.Config, f *agent.Fleet, log *slog.Logger) {
	if cfg.Metrics == agent.MetricsOff {
		return
	}
	l, err := metrics.Listen(ctx, cfg.Metrics)
	if err == nil {
		err = metrics.Serve(ctx, l, cfg.MetricsWebConfig, metrics.NewCollector(version(), f.Reports), log)
	}
	if err != nil && ctx.Err() == nil {
		log.Warn("metrics are not served", "err", err, "do", "set another address as metrics in the configuration, or off")
	}
}
