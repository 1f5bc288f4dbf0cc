package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
)

// defaultConfig is where the service's configuration is.
const defaultConfig = "/etc/tsoagent/tsoagent.yaml"

// keyUsage says what the flags of the configuration's keys mean.
var keyUsage = map[string]string{
	"mode":                    "enforce, or observe to compute and report and change nothing: `MODE`",
	"run_dir":                 "keep journal and control socket in `DIR`",
	"state_dir":               "keep what outlives a boot in `DIR`",
	"restore_after":           "give back after this `TIME` of quiet",
	"on_stop":                 "when told to stop, restore or keep holds and locks: `WHAT`",
	"resync_every":            "read the kernel's whole state again every `TIME`",
	"tcp_keys_every":          "look at the keys of TCP sockets every `TIME`",
	"tcp_keys_trust":          "keys of this `USER` count on shared NICs, besides root's; may be repeated",
	"namespaces":              "follow the network namespace `NAME`: host, all, a name in /run/netns, a path or pid:N; may be repeated",
	"metrics":                 "let Prometheus scrape at `ADDRESS:PORT`, or off",
	"metrics_web_config":      "serve metrics with TLS and users as this `FILE` says",
	"dedicated":               "on devices by which only covered flows can leave: auto, off or keep: `WHAT`",
	"shared_nics":             "on NICs that covered flows share: keep, lane or off: `WHAT`",
	"features":                "hold this `FEATURE` off; may be repeated",
	"mtu":                     "lock, advise or off: `WHAT` is done with route MTUs",
	"presume_mtu":             "the inner MTU in `BYTES` of a policy that never had a valid SA",
	"partial":                 "where a part of a route is covered: table, clamp or off: `WHAT`",
	"carrier_mtu":             "set the MTU of carriers on the route or the device: `WHERE`",
	"source_less_lookups":     "serve lookups without a source address, or off: `WHAT`",
	"table":                   "the first routing table of our own: `NUMBER`",
	"protocol":                "the route protocol of our own: `NUMBER`",
	"max_clones_per_coverage": "at most `NUMBER` routes in our tables for one coverage",
	"max_clones":              "at most `NUMBER` routes in our tables",
}

// flagOf is the flag of a key.
func flagOf(key string) string {
	if key == "namespaces" {
		return "netns"
	}
	return strings.ReplaceAll(key, "_", "-")
}

// variableOf is its environment variable.
func variableOf(key string) string {
	return "TSOAGENT_" + strings.ToUpper(strings.ReplaceAll(flagOf(key), "-", "_"))
}

// keyFlags are a flag and an environment variable for each key.
func keyFlags() []cli.Flag {
	var out []cli.Flag
	keys := agent.Keys()
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		const category = "these go before the keys of the file:"
		if env := []string{variableOf(key)}; keys[key] {
			out = append(out, &cli.StringSliceFlag{Name: flagOf(key), Usage: keyUsage[key], EnvVars: env, Category: category})
		} else {
			out = append(out, &cli.StringFlag{Name: flagOf(key), Usage: keyUsage[key], EnvVars: env, Category: category})
		}
	}
	return out
}

// setKeys sets what flags and the environment have.
func setKeys(cfg *agent.Config, c *cli.Context) error {
	keys := agent.Keys()
	for key, list := range keys {
		flag := flagOf(key)
		values := []string{c.String(flag)}
		if list {
			values = c.StringSlice(flag)
		}
		if values = slices.DeleteFunc(values, func(v string) bool { return v == "" }); len(values) == 0 {
			continue
		}
		if err := cfg.Set(key, values...); err != nil {
			return fmt.Errorf("--%s: %w", flag, err)
		}
	}
	return nil
}

const minimal = `# The configuration of tsoagent. A key that is left out has its default: each is explained in tsoagent.yaml and
# configuration.md of the documentation. After a change:
#   tsoagent check %[1]s
#   systemctl reload tsoagent

# enforce: hold features off and lock route MTUs. observe: compute and report, change nothing.
mode: %[2]s
`

// initialise writes a minimal configuration. One that is there is never touched.
func initialise(c *cli.Context) error {
	file := c.Args().First()
	if file == "" {
		file = defaultConfig
	}
	if c.Args().Len() > 1 {
		return cli.Exit("give one file: tsoagent init FILE", exitUsage)
	}
	cfg := agent.Config{Mode: agent.Mode(c.String("mode"))}
	if wrong := cfg.Validate(); len(wrong) > 0 {
		return cli.Exit(fmt.Sprintf("--%s: %s", wrong[0].Key, wrong[0].Text), exitUsage)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return cli.Exit(fmt.Sprintf("%s is there already, and stays as it is: `tsoagent check %s` says whether it is right", file, file), exitFailed)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, minimal, file, cfg.Mode)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(file))
	}
	fmt.Fprintf(c.App.Writer, "%s is written; next: tsoagent check %s, then systemctl enable --now tsoagent\n", file, file)
	return nil
}
