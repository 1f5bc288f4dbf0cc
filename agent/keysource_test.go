package agent

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A log can be slow, and its handler can ask for what the lock guards.
func TestWhatTheKernelLacksIsLoggedOutsideOfTheLock(t *testing.T) {
	for errno, want := range map[unix.Errno]string{unix.ENOPROTOOPT: "no TCP-MD5", unix.EPROTONOSUPPORT: "are not seen"} {
		s := new(sources)
		var told []string
		s.log = slog.New(handlerFunc(func(r slog.Record) {
			if !s.mu.TryLock() {
				t.Errorf("%q is logged with the lock held", r.Message)
				return
			}
			s.mu.Unlock()
			told = append(told, r.Message)
		}))
		if err := s.dialledKeys(nil, fmt.Errorf("sockopt: %w", errno)); err != nil {
			t.Errorf("%v: %v", errno, err)
		}
		if len(told) != 1 || !strings.Contains(told[0], want) {
			t.Errorf("%v: logged %q", errno, told)
		}
		if seen := len(s.missing()) == 0; seen != (errno == unix.ENOPROTOOPT) {
			t.Errorf("%v: keys are seen: %v", errno, seen)
		}
	}
	if err := new(sources).dialledKeys(nil, unix.ENOMEM); err == nil {
		t.Error("another error is none")
	}
}

// handlerFunc is a handler that calls a function.
type handlerFunc func(slog.Record)

func (f handlerFunc) Enabled(context.Context, slog.Level) bool      { return true }
func (f handlerFunc) Handle(_ context.Context, r slog.Record) error { f(r); return nil }
func (f handlerFunc) WithAttrs([]slog.Attr) slog.Handler            { return f }
func (f handlerFunc) WithGroup(string) slog.Handler                 { return f }
