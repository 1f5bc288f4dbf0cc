package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLinesForTheJournal(t *testing.T) {
	for format, want := range map[string]string{
		"text": `<7>level=DEBUG msg=a n=1
<6>level=INFO msg=b netns=x
<4>level=WARN msg="two lines" netns=x err="1\n2"
<3>level=ERROR msg=d netns=x g.time=kept
`,
		"json": `<7>{"level":"DEBUG","msg":"a","n":1}
<6>{"level":"INFO","msg":"b","netns":"x"}
<4>{"level":"WARN","msg":"two lines","netns":"x","err":"1\n2"}
<3>{"level":"ERROR","msg":"d","netns":"x","g":{"time":"kept"}}
`,
	} {
		var out bytes.Buffer
		h, err := newHandler(&out, format, slog.LevelDebug, true)
		if err != nil {
			t.Fatal(err)
		}
		log := slog.New(h)
		log.Debug("a", "n", 1)
		log = log.With("netns", "x")
		log.Info("b")
		log.Warn("two lines", "err", "1\n2")
		log.WithGroup("g").Error("d", "time", "kept")
		if d := cmp.Diff(want, out.String()); d != "" {
			t.Errorf("%s (-want +got):\n%s", format, d)
		}
	}
}

// TestLinesForAPerson have the time, and no priority.
func TestLinesForAPerson(t *testing.T) {
	var out bytes.Buffer
	h, err := newHandler(&out, "text", slog.LevelInfo, false)
	if err != nil {
		t.Fatal(err)
	}
	slog.New(h).Info("a")
	slog.New(h).Debug("b")
	if got := out.String(); !strings.HasPrefix(got, "time=") || !strings.HasSuffix(got, " level=INFO msg=a\n") {
		t.Errorf("got %q", got)
	}
	if _, err := newHandler(io.Discard, "xml", 0, false); err == nil {
		t.Error("there is a format xml")
	}
}

// TestLinesKeepTheirPriorities also where many write at once.
func TestLinesKeepTheirPriorities(t *testing.T) {
	var out bytes.Buffer
	h, err := newHandler(&out, "text", slog.LevelInfo, true)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(h)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 100 {
				if l := log.With("i", i); i%2 == 0 {
					l.Info("even")
				} else {
					l.Error("odd")
				}
			}
		})
	}
	wg.Wait()
	n := 0
	for line := range strings.Lines(out.String()) {
		n++
		if even := strings.HasPrefix(line, "<6>level=INFO msg=even i="); !even && !strings.HasPrefix(line, "<3>level=ERROR msg=odd i=") {
			t.Fatalf("line %q", line)
		}
	}
	if n != 800 {
		t.Errorf("%d lines, want 800", n)
	}
}

// A device's name has any byte but a few, and a process's any. A line stays one line, and a terminal obeys nothing in it.
func TestLogsObeyNoNames(t *testing.T) {
	const evil = "a\x1b]0;x\x07\n<3>b\u009b31m\u202ec\x9bd\x7f"
	for _, format := range []string{"text", "json"} {
		for _, journal := range []bool{false, true} {
			var out bytes.Buffer
			h, err := newHandler(&out, format, slog.LevelInfo, journal)
			if err != nil {
				t.Fatal(err)
			}
			slog.New(h).With("netns", evil).Info("held", "device", evil, "err", fmt.Errorf("%s: no", evil), "all", []string{evil})
			got, ended := strings.CutSuffix(out.String(), "\n")
			if i := strings.IndexFunc(got, func(r rune) bool { return !strconv.IsPrint(r) }); i >= 0 || !ended {
				t.Errorf("%s, to the journal %v: %q", format, journal, got)
			}
		}
	}
}

// TestJournalIsKnown by the device and the inode of the file, as systemd says them.
func TestJournalIsKnown(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(w.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	own := fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	for stream, want := range map[string]bool{own: true, "": false, own + "0": false, "1:2": false, "x": false} {
		if got := toJournal(w, stream); got != want {
			t.Errorf("%q: %v", stream, got)
		}
	}
}
