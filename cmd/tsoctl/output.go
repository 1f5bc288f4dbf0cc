package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"
)

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
