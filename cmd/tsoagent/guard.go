package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"tsoagent/agent/guard"
)

// guardCommand is the process that `tsoagent run` starts beside itself. It is no use to anybody else.
func guardCommand() *cli.Command {
	return &cli.Command{
		Name: "guard", Usage: "take the rules of the agent that has started it away when that is killed", Hidden: true,
		OnUsageError: usage, Action: serveGuard,
		Flags: []cli.Flag{&cli.StringFlag{Name: "log-format", Value: "text", Hidden: true}},
	}
}

// newGuard is a guard whose process is this very program. It logs where we do; of our environment it has nothing but what says that.
func newGuard(c *cli.Context, log *slog.Logger) *guard.Guard {
	format := c.String("log-format")
	return guard.New(log, func() *exec.Cmd {
		cmd := exec.Command("/proc/self/exe", "guard", "--log-format", format)
		cmd.Args[0] = os.Args[0]
		cmd.Env = []string{"JOURNAL_STREAM=" + os.Getenv("JOURNAL_STREAM"), "GOMAXPROCS=1"}
		cmd.Stderr = os.Stderr
		return cmd
	})
}

func serveGuard(c *cli.Context) error {
	// Who ends the service tells all of its processes, and so does its watchdog. It is the agent's end that counts.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGABRT)
	log, err := logger(c)
	if err != nil {
		return err
	}
	agent := os.NewFile(guard.FD, "agent")
	if info, err := agent.Stat(); err != nil || info.Mode()&os.ModeSocket == 0 {
		return cli.Exit(fmt.Sprintf("guard is for tsoagent itself: file %d is no socket of an agent's", guard.FD), exitUsage)
	}
	syscall.CloseOnExec(guard.FD)
	return guard.Serve(agent, log)
}
