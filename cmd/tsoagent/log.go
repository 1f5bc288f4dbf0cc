package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"tsoagent/cmd/internal/inert"
)

// toJournal reports whether a file is the journal's own (JOURNAL_STREAM, systemd.exec(5)), which notes the time
// of each line itself.
func toJournal(f *os.File, stream string) bool {
	var st unix.Stat_t
	if stream == "" || unix.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	return stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// newHandler logs as text or json. For the journal the lines have no time, and begin with their priority as
// sd-daemon(3) has it, which the journal takes off.
func newHandler(w io.Writer, format string, level slog.Level, journal bool) (slog.Handler, error) {
	opts := &slog.HandlerOptions{Level: level}
	var p *priorities
	if journal {
		p = &priorities{w: w}
		w = p
		opts.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	var h slog.Handler
	switch format {
	case "text":
		h = slog.NewTextHandler(w, opts)
	case "json":
		h = slog.NewJSONHandler(inert.JSONWriter{Writer: w}, opts)
	default:
		return nil, fmt.Errorf("--log-format: %q is not one of text, json", format)
	}
	if journal {
		h = &journalHandler{h, p}
	}
	return h, nil
}

// journalHandler writes one line at a time, whose priority the writer has to know.
type journalHandler struct {
	slog.Handler
	out *priorities
}

var _ slog.Handler = (*journalHandler)(nil)

// Handle writes a line with its priority.
func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	switch {
	case r.Level >= slog.LevelError:
		h.out.prefix = "<3>"
	case r.Level >= slog.LevelWarn:
		h.out.prefix = "<4>"
	case r.Level >= slog.LevelInfo:
		h.out.prefix = "<6>"
	default:
		h.out.prefix = "<7>"
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs keeps the priorities.
func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &journalHandler{h.Handler.WithAttrs(attrs), h.out}
}

// WithGroup keeps the priorities.
func (h *journalHandler) WithGroup(name string) slog.Handler {
	return &journalHandler{h.Handler.WithGroup(name), h.out}
}

// priorities puts a priority ahead of each line. slog's handlers write a line at once.
type priorities struct {
	w      io.Writer
	mu     sync.Mutex // of what follows, and of each write
	prefix string
}

// Write writes one line.
func (p *priorities) Write(line []byte) (int, error) {
	if _, err := p.w.Write(append([]byte(p.prefix), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}
