package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"tsoagent/agent/api"
	"tsoagent/agent/client"
)

func handoverCommand() *cli.Command {
	return &cli.Command{
		Name: "handover", Usage: "have the agent become the program that is installed now, with all in place",
		Description: "The agent's process executes the program anew, as after an upgrade. The new one adopts what is in place: nothing is given back,\n" +
			"and no rule or lock goes away and comes back. When the command ends with 0 the new one follows the kernel. It keeps its arguments, its\n" +
			"environment and its capabilities; what a unit says otherwise takes a restart. A paused agent doesn't hand over. Only root may ask for it.",
		OnUsageError: usage, Action: handover,
		Flags: []cli.Flag{&cli.DurationFlag{Name: "within", Value: time.Minute, Usage: "wait `TIME` for the new one, which reads all routes and policies first"}},
	}
}

// handedOver is what became of a handover.
type handedOver struct {
	Version int    `json:"version"`
	Was     string `json:"was"` // the version of the program before
	Program string `json:"program"`
	PID     int    `json:"pid"`
	// Since is when the new one was started.
	Since time.Time `json:"since"`
}

func handover(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	cfg, err := configOf(c)
	if err != nil {
		return err
	}
	cl := client.New(cfg.RunDir)
	before, err := cl.Report(c.Context)
	if err != nil {
		return withoutAgent(err, cfg.RunDir)
	}
	stop := progressOn(os.Stderr).waiting("waiting for the new program to follow the kernel")
	after, err := replaced(c.Context, cl, cfg.RunDir, before, c.Duration("within"))
	stop()
	if err != nil {
		return err
	}
	done := handedOver{api.Version, before.Program, after.Program, after.PID, after.Since}
	return show(c, done, func(p page) { handoverTable(p, &done) })
}

func handoverTable(p page, h *handedOver) {
	p.text(0, "handed over from %s to %s (pid %d)", h.Was, h.Program, h.PID)
}

// replaced asks the agent's process to hand over, and waits for the report of the new one.
func replaced(ctx context.Context, cl *client.Client, runDir string, before *api.Report, within time.Duration) (*api.Report, error) {
	if before.Paused != nil {
		return nil, cli.Exit("the agent is paused, and a pause ends with the program: `tsoctl resume` first", exitDegraded)
	}
	pid, err := listener(ctx, runDir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Kill(pid, syscall.SIGUSR2); errors.Is(err, syscall.EPERM) {
		return nil, errors.New("only root may do this")
	} else if err != nil {
		return nil, fmt.Errorf("ask pid %d to hand over: %w", pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	why := errors.New("the old one goes on")
	for {
		after, err := cl.Report(ctx)
		if err == nil && after.Since.After(before.Since) {
			return after, nil
		}
		if err != nil && ctx.Err() == nil {
			why = err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no new program follows the kernel within %s: %w; the agent's log says more", within, why)
		case <-again.C:
		}
	}
}

// listener is the process that has the control socket, as this PID namespace numbers it.
func listener(ctx context.Context, runDir string) (int, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", api.SocketPath(runDir))
	if err != nil {
		return 0, fmt.Errorf("find the agent's process: %w", err)
	}
	defer c.Close()
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("find the agent's process: %T is no unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("find the agent's process: %w", err)
	}
	var peer *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { peer, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, fmt.Errorf("find the agent's process: %w", err)
	}
	if credErr != nil {
		return 0, fmt.Errorf("find the agent's process: %w", credErr)
	}
	if peer.Pid <= 0 {
		return 0, errors.New("the agent's process is in another PID namespace: ask there")
	}
	return int(peer.Pid), nil
}
