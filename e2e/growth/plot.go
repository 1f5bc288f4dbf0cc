package growth

import (
	"fmt"
	"math"
	"strings"
)

// The plot's measures, in pixels.
const (
	width, height            = 760, 430
	left, right, top, bottom = 70, 20, 20, 120
)

// look is how a series is drawn. The colours can be told apart by people who don't see all of them, on white and on black
// (Okabe and Ito's); routes are dashed.
var look = map[string]string{"route": "#0072b2", "covered-route": "#e69f00", "policy": "#cc79a7"}

// axes are powers of ten, inclusive.
type axes struct{ x0, x1, y0, y1 int }

func axesOf(series []Series) axes {
	a := axes{math.MaxInt, math.MinInt, math.MaxInt, math.MinInt}
	for _, s := range series {
		for _, p := range s.Points {
			x, y := math.Log10(float64(p.N)), math.Log10(p.Nanos)
			a.x0, a.x1 = min(a.x0, int(math.Floor(x))), max(a.x1, int(math.Ceil(x)))
			a.y0, a.y1 = min(a.y0, int(math.Floor(y))), max(a.y1, int(math.Ceil(y)))
		}
	}
	// One that has no width can't be scaled.
	a.x1, a.y1 = max(a.x1, a.x0+1), max(a.y1, a.y0+1)
	return a
}

func (a axes) x(n float64) float64 {
	return left + (math.Log10(n)-float64(a.x0))/float64(a.x1-a.x0)*(width-left-right)
}

func (a axes) y(nanos float64) float64 {
	return height - bottom - (math.Log10(nanos)-float64(a.y0))/float64(a.y1-a.y0)*(height-top-bottom)
}

// Plot draws the series in one log-log plot, as SVG, with a line that grows as their number does.
func Plot(series []Series) string {
	a := axesOf(series)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", width, height)
	grid(&b, a)
	guide(&b, a)
	for i, s := range series {
		draw(&b, a, s)
		legend(&b, s, i)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func grid(b *strings.Builder, a axes) {
	for e := a.x0; e <= a.x1; e++ {
		x := a.x(math.Pow10(e))
		fmt.Fprintf(b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#dddddd"/>`+"\n", x, top, x, height-bottom)
		fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", x, height-bottom+18, thousands(int(math.Pow10(e))))
	}
	for e := a.y0; e <= a.y1; e++ {
		y := a.y(math.Pow10(e))
		fmt.Fprintf(b, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#dddddd"/>`+"\n", left, y, width-right, y)
		fmt.Fprintf(b, `<text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n", left-8, y+4, strings.Replace(span(math.Pow10(e)), ".0", "", 1))
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="middle">coverages (lines), routes that nobody covers (dashes)</text>`+"\n", (left+width-right)/2, height-bottom+38)
}

// guide is what work over all objects would look like: ten times as much for ten times as many.
func guide(b *strings.Builder, a axes) {
	n := min(a.x1-a.x0, a.y1-a.y0)
	fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#888888" stroke-dasharray="2 4"/>`+"\n",
		a.x(math.Pow10(a.x0)), a.y(math.Pow10(a.y0)), a.x(math.Pow10(a.x0+n)), a.y(math.Pow10(a.y0+n)))
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="end" fill="#666666">as their number</text>`+"\n", a.x(math.Pow10(a.x0+n))-8, a.y(math.Pow10(a.y0+n))+16)
}

func draw(b *strings.Builder, a axes, s Series) {
	var line []string
	for _, p := range s.Points {
		x, y := a.x(float64(p.N)), a.y(p.Nanos)
		line = append(line, fmt.Sprintf("%.1f,%.1f", x, y))
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"><title>%s: %s</title></circle>`+"\n", x, y, look[s.Event], thousands(p.N), span(p.Nanos))
	}
	fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", strings.Join(line, " "), look[s.Event], dash(s))
}

func dash(s Series) string {
	if s.Among == "routes" {
		return ` stroke-dasharray="6 4"`
	}
	return ""
}

// legend has two columns: coverages, routes.
func legend(b *strings.Builder, s Series, i int) {
	x, y := left+i/len(look)*350, height-bottom+60+i%len(look)*18
	fmt.Fprintf(b, `<line x1="%d" y1="%d" x2="%d" y2="%d" stroke="%s" stroke-width="2"%s/>`+"\n", x, y-4, x+28, y-4, look[s.Event], dash(s))
	fmt.Fprintf(b, `<text x="%d" y="%d">%s (×%s)</text>`+"\n", x+34, y, title[s.Event], digits(s.Factor()))
}
