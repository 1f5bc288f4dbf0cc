// Package growth draws how the cost of an event grows: the results of agent's BenchmarkGrowth as a log-log plot (SVG) and as a table.
package growth

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/tools/benchmark/parse"
)

// Point is one measurement: what an event costs beside so many objects.
type Point struct {
	N     int     // coverages or routes
	Nanos float64 // of time for an event
	Bytes uint64  // allocated for an event
}

// Series is one kind of event beside more and more of one kind of object.
type Series struct {
	Event string // route, covered-route or policy
	Among string // coverages or routes
	Points
}

// Points are in the order of N.
type Points []Point

// Factor is by how much the cost grows from the first to the last point.
func (p Points) Factor() float64 { return p[len(p)-1].Nanos / p[0].Nanos }

// Read takes what `go test -bench Growth` prints.
func Read(r io.Reader) ([]Series, error) {
	var out []Series
	for lines := bufio.NewScanner(r); ; {
		if !lines.Scan() {
			if err := lines.Err(); err != nil {
				return nil, err
			}
			break
		}
		b, err := parse.ParseLine(lines.Text())
		if err != nil || !strings.HasPrefix(b.Name, prefix) {
			continue
		}
		event, among, n, err := name(b.Name)
		if err != nil {
			return nil, err
		}
		if b.NsPerOp <= 0 {
			return nil, fmt.Errorf("%s: %g ns", b.Name, b.NsPerOp)
		}
		i := slices.IndexFunc(out, func(s Series) bool { return s.Event == event && s.Among == among })
		if i < 0 {
			i = len(out)
			out = append(out, Series{Event: event, Among: among})
		}
		out[i].Points = append(out[i].Points, Point{N: n, Nanos: b.NsPerOp, Bytes: b.AllocedBytesPerOp})
	}
	if len(out) == 0 {
		return nil, errors.New("no line of BenchmarkGrowth")
	}
	for _, s := range out {
		slices.SortFunc(s.Points, func(a, b Point) int { return cmp.Compare(a.N, b.N) })
	}
	return out, nil
}

const prefix = "BenchmarkGrowth/event="

// name takes BenchmarkGrowth/event=policy/coverages=10-2 apart. The last part is missing on one processor.
func name(s string) (event, among string, n int, err error) {
	event, rest, _ := strings.Cut(strings.TrimPrefix(s, prefix), "/")
	among, number, _ := strings.Cut(rest, "=")
	number, _, _ = strings.Cut(number, "-")
	if n, err = strconv.Atoi(number); err != nil || n < 1 {
		return "", "", 0, fmt.Errorf("%q is no name of BenchmarkGrowth", s)
	}
	return event, among, n, nil
}

// Table is the points in Markdown, a line for each number.
func Table(series []Series) string {
	var b strings.Builder
	for _, among := range amongs(series) {
		var columns []Series
		for _, s := range series {
			if s.Among == among {
				columns = append(columns, s)
			}
		}
		fmt.Fprintf(&b, "| %s |", among)
		for _, s := range columns {
			fmt.Fprintf(&b, " %s |", title[s.Event])
		}
		b.WriteString("\n| ---: |" + strings.Repeat(" ---: |", len(columns)) + "\n")
		for i, p := range columns[0].Points {
			fmt.Fprintf(&b, "| %s |", thousands(p.N))
			for _, s := range columns {
				cell := ""
				if i < len(s.Points) {
					cell = span(s.Points[i].Nanos) + ", " + size(s.Points[i].Bytes)
				}
				fmt.Fprintf(&b, " %s |", cell)
			}
			b.WriteByte('\n')
		}
		b.WriteByte('\n')
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// title is what a reader calls an event.
var title = map[string]string{
	"route":         "a route that nobody covers is replaced",
	"covered-route": "a covered route is replaced",
	"policy":        "a policy and its SA come or go",
}

func amongs(series []Series) []string {
	var out []string
	for _, s := range series {
		if !slices.Contains(out, s.Among) {
			out = append(out, s.Among)
		}
	}
	return out
}

// thousands writes 100,000.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// span writes a time with two digits.
func span(nanos float64) string {
	for _, u := range []struct {
		of   float64
		name string
	}{{1e9, "s"}, {1e6, "ms"}, {1e3, "µs"}} {
		if nanos >= u.of {
			return digits(nanos/u.of) + " " + u.name
		}
	}
	return digits(nanos) + " ns"
}

// size writes bytes with two digits.
func size(n uint64) string {
	if n >= 1<<10 {
		return digits(float64(n)/(1<<10)) + " KiB"
	}
	return strconv.FormatUint(n, 10) + " B"
}

func digits(x float64) string {
	if x < 10 {
		return strconv.FormatFloat(x, 'f', 1, 64)
	}
	return strconv.FormatFloat(math.Round(x), 'f', 0, 64)
}
