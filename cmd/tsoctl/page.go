package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"tsoagent/cmd/internal/inert"
)

// Tables are plain text that fits 80 columns wherever the values allow it. On a terminal,
// sentences are wrapped to its width; elsewhere each stays on one line, so that it can be
// searched for.

// page is where tables are printed.
type page struct {
	io.Writer
	width int // in columns, 0 for no wrapping
}

// widest is the longest line of a sentence: longer ones are hard to read. Tables use all the width there is.
const widest = 100

// pageOf is the page for a command's output.
func pageOf(w io.Writer) page {
	if f, ok := w.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			if os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" {
				w = &painter{w: w}
			}
			return page{inert.Writer{Writer: w}, int(size.Col)}
		}
	}
	return page{inert.Writer{Writer: w}, 0}
}

// text prints a line after an indent. Where it is wrapped, the rest is indented by two more.
func (p page) text(indent int, format string, args ...any) {
	line := strings.Repeat(" ", indent)
	width := min(p.width, widest)
	fresh := true
	for word := range strings.SplitSeq(fmt.Sprintf(format, args...), " ") {
		switch {
		case fresh:
		case width > 0 && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width:
			fmt.Fprintln(p, line)
			line = strings.Repeat(" ", indent+2)
		default:
			line += " "
		}
		line += word
		fresh = false
	}
	fmt.Fprintln(p, line)
}

// table prints rows in columns, the first one being their heads, after an empty line. On a terminal the last column is
// wrapped to the width; where there is no room for it, it stands below.
func (p page) table(rows [][]string) {
	wide := make([]int, len(rows[0]))
	for _, cells := range rows {
		for i, c := range cells {
			wide[i] = max(wide[i], utf8.RuneCountInString(c))
		}
	}
	last := len(wide) - 1
	at := 0 // where the last column begins
	for _, w := range wide[:last] {
		at += w + len(gap)
	}
	const least = 12 // columns, else wrapping makes it no better
	room := p.width - at
	below := false
	switch needs := at + wide[last]; {
	case p.width == 0 || needs <= p.width:
		room = wide[last]
	case room < least:
		below, at, room = true, 2, p.width-2
	}
	var b []byte
	b = append(b, '\n')
	for i, cells := range rows {
		var line []byte
		for i, c := range cells[:last] {
			line = append(line, c...)
			line = append(line, strings.Repeat(" ", wide[i]-utf8.RuneCountInString(c)+len(gap))...)
		}
		if below {
			b = append(append(b, bytes.TrimRight(line, " ")...), '\n')
			if i == 0 || cells[last] == "" {
				continue // the sentence below needs no head
			}
			line = []byte("  ")
		}
		for i, text := range wrap(cells[last], room) {
			if i > 0 {
				line = []byte(strings.Repeat(" ", at))
			}
			// No blanks at the end of a line.
			b = append(append(b, bytes.TrimRight(append(line, text...), " ")...), '\n')
		}
	}
	_, _ = p.Write(b) // as with Fprintln, nothing helps where stdout is gone
}

// wrap cuts text between words into lines of up to so many columns. There is at least one.
func wrap(text string, columns int) []string {
	var out []string
	line := ""
	for word := range strings.SplitSeq(text, " ") {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > columns {
			out, line = append(out, line), word
			continue
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(out, line)
}

// gap is between columns.
const gap = "  "

// pad fills a line with blanks to a width.
func pad(b []byte, width int) []byte {
	for n := utf8.RuneCount(b); n < width; n++ {
		b = append(b, ' ')
	}
	return b
}

func count[N int | uint64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func short(list []string) string {
	const most = 2
	if len(list) > most {
		return strings.Join(list[:most], ", ") + fmt.Sprintf(" and %d more", len(list)-most)
	}
	return strings.Join(list, ", ")
}

// timeText is a time where the reader is: the agent's own zone may be another one.
func timeText(t time.Time) string { return t.Local().Format(time.DateTime) }

// some joins what there is any of.
func some(counts ...string) string {
	return strings.Join(slices.DeleteFunc(counts, func(s string) bool { return strings.HasPrefix(s, "0 ") }), ", ")
}
