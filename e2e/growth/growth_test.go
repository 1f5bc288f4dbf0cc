package growth

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

const sample = `goos: linux
BenchmarkStep/other-2   	     100	    99 ns/op
BenchmarkGrowth/event=route/coverages=100-2   	  20000	     7500 ns/op	     512 B/op	       9 allocs/op
BenchmarkGrowth/event=route/coverages=10-2    	  20000	     7000 ns/op	     500 B/op	       9 allocs/op
BenchmarkGrowth/event=policy/coverages=10     	   2000	   120000 ns/op	   20480 B/op	      90 allocs/op
BenchmarkGrowth/event=policy/coverages=100    	   2000	  1200000 ns/op	   20480 B/op	      90 allocs/op
BenchmarkGrowth/event=route/routes=10-2       	   2000	  1200000000 ns/op	   20480 B/op	      90 allocs/op
PASS
`

func TestReadSortsAndTells(t *testing.T) {
	series, err := Read(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	if len(series) != 3 || series[0].Points[0] != (Point{10, 7000, 500}) || series[0].Points[1].N != 100 || series[1].Factor() != 10 {
		t.Errorf("%+v", series)
	}
	want := `| coverages | a route that nobody covers is replaced | a policy and its SA come or go |
| ---: | ---: | ---: |
| 10 | 7.0 µs, 500 B | 120 µs, 20 KiB |
| 100 | 7.5 µs, 512 B | 1.2 ms, 20 KiB |

| routes | a route that nobody covers is replaced |
| ---: | ---: |
| 10 | 1.2 s, 20 KiB |
`
	if got := Table(series); got != want {
		t.Errorf("table\n%swant\n%s", got, want)
	}
}

func TestReadRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, text := range []string{"", "PASS\n", "BenchmarkGrowth/event=route/coverages=x-2 1 5 ns/op\n", "BenchmarkGrowth/event=route/coverages=10-2 1 0 ns/op\n"} {
		if s, err := Read(strings.NewReader(text)); err == nil {
			t.Errorf("%q: %v", text, s)
		}
	}
}

// What costs the same is level, ten times as much is as far up as ten times as many is to the right of it, and all is inside.
func TestPlotIsToScale(t *testing.T) {
	series, err := Read(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	a := axesOf(series)
	if a != (axes{1, 2, 3, 10}) {
		t.Errorf("axes %+v", a)
	}
	if a.x(10) != left || a.x(100) != width-right || a.y(1e3) != height-bottom || a.y(1e10) != top {
		t.Errorf("corners %g %g, %g %g", a.x(10), a.y(1e3), a.x(100), a.y(1e10))
	}
	plot := Plot(series)
	d, circles := xml.NewDecoder(strings.NewReader(plot)), 0
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, plot)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "circle" {
			circles++
		}
	}
	if circles != 5 {
		t.Errorf("%d points are drawn, want 5", circles)
	}
}
