package metrics

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"sync/atomic"
	"testing"
)

// TestHealthIsTold asks as a supervisor does: of loops that go round, of one that hangs, and before and after what is needed is in place.
func TestHealthIsTold(t *testing.T) {
	var hangs, ready atomic.Bool
	health := Health{
		Alive: func(context.Context) error {
			if hangs.Load() {
				return errors.New("the loop of namespace blue doesn't answer")
			}
			return nil
		},
		Ready: ready.Load,
	}
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, l, "", NewCollector("v1", fixture{}), health, slog.New(slog.DiscardHandler))
	}()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	want := func(path string, status int, text string) {
		t.Helper()
		res, err := http.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != status || string(b) != text {
			t.Errorf("%s: %d %q %v, want %d %q", path, res.StatusCode, b, err, status, text)
		}
	}
	want("/-/healthy", 200, "healthy\n")
	want("/-/ready", 503, "the kernel's state is being read, or what is needed is not in place yet\n")
	ready.Store(true)
	want("/-/ready", 200, "ready\n")
	hangs.Store(true)
	want("/-/healthy", 503, "a loop does not answer\n") // no namespace is named
	want("/-/ready", 200, "ready\n")
}
