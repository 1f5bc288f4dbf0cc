package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/probe"
)

// progress tells a person how far long work is: a bar on a terminal, else nothing, or a line for each case of a probe.
type progress struct {
	w     io.Writer
	width int // in columns, 0 where it is no terminal
}

func progressOn(f *os.File) *progress {
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
		return &progress{f, max(int(size.Col), 40)}
	}
	return &progress{f, 0}
}

func (b *progress) tell(p probe.Progress) {
	if b.width > 0 {
		b.bar(p.Done, p.Total, fmt.Sprintf("%d/%d %s", p.Done, p.Total, p.Next))
		return
	}
	if c := p.Case; c != nil {
		fmt.Fprintf(b.w, "%d/%d %s %s %s: %s\n", p.Done, p.Total, c.Kind, c.Outer, c.Mode, c.Verdict)
	}
}

// bar draws how much is done of a whole.
func (b *progress) bar(done, of int, text string) {
	const cells = 20
	full := cells * done / of
	line := fmt.Sprintf("[%s%s] %s", strings.Repeat("#", full), strings.Repeat(".", cells-full), text)
	fmt.Fprintf(b.w, "\r%-*s", b.width-1, line[:min(len(line), b.width-1)])
}

// waiting tells a person, from the second second on and on a terminal only, what is being waited for. What it returns ends that.
func (b *progress) waiting(what string) (stop func()) {
	if b.width == 0 {
		return func() {}
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for n := 1; ; n++ {
			select {
			case <-end:
				if n > 1 {
					b.end()
				}
				return
			case <-tick.C:
				line := fmt.Sprintf("%s: %d s", what, n)
				fmt.Fprintf(b.w, "\r%-*s", b.width-1, line[:min(len(line), b.width-1)])
			}
		}
	}()
	return func() {
		close(end)
		<-ended
	}
}

// end takes the bar away.
func (b *progress) end() {
	if b.width > 0 {
		fmt.Fprintf(b.w, "\r%*s\r", b.width-1, "")
	}
}

// look shows how far a look is: on a terminal only.
func (b *progress) look(done, of time.Duration, packets int) {
	if b.width > 0 {
		b.bar(int(done.Milliseconds()), int(of.Milliseconds()), fmt.Sprintf("%.1f of %.3g s, %s", done.Seconds(), of.Seconds(), count(packets, "packet", "packets")))
	}
}
