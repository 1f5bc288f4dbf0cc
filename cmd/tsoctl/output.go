package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"unicode/utf16"
	"unicode/utf8"

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
	_, err = w.Write(append(inert(b), '\n'))
	return err
}

// inert is JSON with an escape for each character that can't be printed. Go's encoder leaves some that a terminal would obey: U+009B begins
// a command as ESC [ does, and names are chosen by others. Outside of strings there are none.
func inert(b []byte) []byte {
	return escaped(b, func(out []byte, r rune) []byte {
		for _, unit := range utf16.AppendRune(nil, r) {
			out = fmt.Appendf(out, `\u%04x`, unit)
		}
		return out
	})
}

// escaped has an escape in place of each character that can't be printed.
func escaped(b []byte, escape func([]byte, rune) []byte) []byte {
	wild := func(r rune) bool { return harmless(r) != r }
	if !bytes.ContainsFunc(b, wild) {
		return b
	}
	var out []byte
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if wild(r) {
			out = escape(out, r)
		} else {
			out = append(out, b[:n]...)
		}
		b = b[n:]
	}
	return out
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
	b = escaped(b, func(out []byte, r rune) []byte { return fmt.Appendf(out, `\U%08x`, r) })
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
