package main

import (
	"errors"
	"net/http"
	"os"

	"github.com/urfave/cli/v2"

	"tsoagent/agent/api"
	"tsoagent/agent/client"
)

func reloadCommand() *cli.Command {
	return &cli.Command{
		Name: "reload", Usage: "have the agent read its configuration again",
		Description: "The agent reads the file that it was started with, as at SIGHUP. What is right is in use when the command ends; what is wrong is\n" +
			"shown with its line, and the configuration before it stays in use (exit code 2). Only root may reload it.",
		OnUsageError: usage, Action: reload,
	}
}

func reload(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	cfg, err := configOf(c)
	if err != nil {
		return err
	}
	stop := progressOn(os.Stderr).waiting("waiting until the configuration is in use")
	a, err := client.New(cfg.RunDir).Reload(c.Context)
	stop()
	var refused *client.Error
	if errors.As(err, &refused) && refused.Status == http.StatusConflict {
		return cli.Exit(refused.Text, exitUsage)
	}
	if err != nil {
		return withoutAgent(err, cfg.RunDir)
	}
	return show(c, a, func(p page) { reloadTable(p, a) })
}

func reloadTable(p page, a *api.ReloadAnswer) {
	if a.Changed {
		p.text(0, "another configuration is in use since %s", timeText(a.Configured))
	} else {
		p.text(0, "the configuration is as it was")
	}
}
