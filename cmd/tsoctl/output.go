package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"

	"tsoagent/cmd/internal/inert"
)

// show prints v as the format asks, with table for people.
func show(c *cli.Context, v any, table func(page)) error {
	switch f := option(c, "output"); f {
	case "table":
		table(pageOf(c.App.Writer))
		return nil
	case "json":
		return showJSON(c.App.Writer, v)
	case "yaml":
		return showYAML(c.App.Writer, v)
	default:
		return knownOutput(c)
	}
}

// showJSON prints a document.
func showJSON(w io.Writer, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = w.Write(append(inert.JSON(b), '\n'))
	return err
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
	// YAML takes JSON, but for control characters that JSON has as they are, and for escapes in pairs.
	b = inert.Escaped(b, escapeYAML)
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return err
	}
	blockStyle(&n)
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := errors.Join(enc.Encode(&n), enc.Close()); err != nil {
		return err
	}
	_, err = w.Write(inert.Escaped(out.Bytes(), escapeYAML))
	return err
}

func escapeYAML(out []byte, r rune) []byte { return fmt.Appendf(out, `\U%08x`, r) }

// blockStyle has all as people write it. What has an escape has to be in quotes, also where YAML itself would let a character stand that
// can't be printed, as one that turns the direction of what follows.
func blockStyle(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle | yaml.DoubleQuotedStyle
	if n.Kind == yaml.ScalarNode && !inert.Is(n.Value) {
		n.Style |= yaml.DoubleQuotedStyle
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}
