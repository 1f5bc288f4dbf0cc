// Package inert keeps terminals from obeying text that others chose: a device's name may have any byte but blanks, '/' and ':'
// (dev_valid_name, net/core/dev.c), and a process's any at all.
package inert

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// A Writer is for text. A terminal gets nothing that it would obey.
type Writer struct{ io.Writer }

// Write writes b with a question mark for each character that a terminal could obey.
func (w Writer) Write(b []byte) (int, error) {
	if utf8.Valid(b) && !bytes.ContainsFunc(b, wild) {
		return w.Writer.Write(b)
	}
	if _, err := w.Writer.Write(bytes.Map(harmless, b)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// A JSONWriter is for JSON that is written in whole values.
type JSONWriter struct{ io.Writer }

// Write writes b as JSON has it.
func (w JSONWriter) Write(b []byte) (int, error) {
	if _, err := w.Writer.Write(JSON(b)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// JSON is JSON with an escape for each character that can't be printed. Go's encoder leaves some that a terminal would obey: U+009B begins
// a command as ESC [ does, and names are chosen by others. Outside of strings there are none.
func JSON(b []byte) []byte {
	return Escaped(b, func(out []byte, r rune) []byte {
		for _, unit := range utf16.AppendRune(nil, r) {
			out = fmt.Appendf(out, `\u%04x`, unit)
		}
		return out
	})
}

// Escaped has an escape in place of each character that can't be printed.
func Escaped(b []byte, escape func([]byte, rune) []byte) []byte {
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

// Is reports whether nothing in a text has to be escaped.
func Is(s string) bool { return !strings.ContainsFunc(s, wild) }

func wild(r rune) bool { return harmless(r) != r }

// harmless is the rune itself, or a question mark for one that can't be printed.
func harmless(r rune) rune {
	switch {
	case r >= ' ' && r <= '~', r == '\n', r == '\t': // nearly all there is
	case !strconv.IsPrint(r):
		return '?'
	}
	return r
}
