package metrics

import (
	"context"
	"net/http"
	"time"
)

// Health is what a supervisor asks over HTTP that can't be told by sd_notify(3). Both functions are called concurrently.
type Health struct {
	// Alive fails if a loop doesn't answer until the context ends.
	Alive func(context.Context) error
	// Ready says whether what is needed has been in place once.
	Ready func() bool
}

// aliveWithin is how long the loops may take to answer: one that reads a full table or writes very much takes its time.
const aliveWithin = 8 * time.Second

// healthy answers 200 while the loops go round, else 503 and why.
func (h Health) healthy(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), aliveWithin)
	defer cancel()
	if err := h.Alive(ctx); err != nil {
		http.Error(w, "a loop does not answer", http.StatusServiceUnavailable) // which one is for the log
		return
	}
	_, _ = w.Write([]byte("healthy\n"))
}

// ready answers 200 from the time on when what is needed is in place, else 503.
func (h Health) ready(w http.ResponseWriter, _ *http.Request) {
	if !h.Ready() {
		http.Error(w, "the kernel's state is being read, or what is needed is not in place yet", http.StatusServiceUnavailable)
		return
	}
	_, _ = w.Write([]byte("ready\n"))
}

// register has a mux answer them, a few at a time, and not in the turns of scrapes.
func (h Health) register(mux *http.ServeMux) {
	if h.Alive != nil {
		mux.Handle("GET /-/healthy", inTurn(http.HandlerFunc(h.healthy)))
	}
	if h.Ready != nil {
		mux.Handle("GET /-/ready", inTurn(http.HandlerFunc(h.ready)))
	}
}
