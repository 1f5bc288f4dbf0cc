package main

import (
	"bytes"
	"io"
	"regexp"
)

// painter colours whole lines on their way to a terminal, after they were laid out and cleaned: what is in them
// doesn't change, so that the columns stay and nothing in a name can be a colour.
type painter struct {
	w    io.Writer
	line []byte // that has no end yet
}

// The colours of a terminal's own palette (ECMA-48, SGR), so that they fit it.
const (
	plainly = "\x1b[0m"
	bold    = "\x1b[1m"
	red     = "\x1b[31m"
	green   = "\x1b[32m"
	yellow  = "\x1b[33m"
)

var (
	// heads are the first line of a table: words in capitals.
	heads = regexp.MustCompile(`^[A-Z][A-Z/ ]+$`)
	// stateCell is a state in a column of its own.
	stateCell = regexp.MustCompile(`(  |^)(in place|off already|wanted|releasing|contested|refused|followed|failed|waiting)(,|  |$)`)
	stateIs   = map[string]string{
		"in place": green, "off already": green, "followed": green, "wanted": yellow, "releasing": yellow, "waiting": yellow,
		"contested": red, "refused": red, "failed": red,
	}
)

// Write writes the lines of b that have an end, in colour.
func (p *painter) Write(b []byte) (int, error) {
	p.line = append(p.line, b...)
	end := bytes.LastIndexByte(p.line, '\n') + 1
	var out []byte
	for line := range bytes.Lines(p.line[:end]) {
		out = append(append(out, paint(bytes.TrimSuffix(line, []byte("\n")))...), '\n')
	}
	p.line = p.line[:copy(p.line, p.line[end:])]
	if len(out) > 0 {
		if _, err := p.w.Write(out); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// paint colours a line.
func paint(line []byte) []byte {
	trimmed := bytes.TrimLeft(line, " ")
	switch {
	case bytes.HasPrefix(trimmed, []byte("! ")):
		return in(yellow, line)
	case heads.Match(line):
		return in(bold, line)
	}
	return stateCell.ReplaceAllFunc(line, func(cell []byte) []byte {
		m := stateCell.FindSubmatch(cell)
		return append(append(append([]byte{}, m[1]...), in(stateIs[string(m[2])], m[2])...), m[3]...)
	})
}

func in(colour string, text []byte) []byte {
	return append(append([]byte(colour), text...), plainly...)
}
