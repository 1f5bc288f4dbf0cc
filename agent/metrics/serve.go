package metrics

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
)

// CheckWebConfig validates a web configuration file of the exporter toolkit (TLS and authentication).
// An empty name is none.
func CheckWebConfig(file string) error {
	if err := web.Validate(file); err != nil {
		return fmt.Errorf("metrics: web configuration %s: %w", file, err)
	}
	return nil
}

// Listen opens the socket for scrapes.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return l, nil
}

// The status page is a program of its own that reads /metrics, so it can show nothing that these don't.
//
//go:embed page
var files embed.FS

// pageHandler serves one file of the page, which may load nothing from anywhere else.
func pageHandler(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "+
			"base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-cache")
		http.ServeFileFS(w, r, files, path.Join("page", name))
	})
}

// gathering logs what goes wrong while metrics are made. That a client went away before it had read them all is its own
// affair.
type gathering struct{ log *slog.Logger }

var _ promhttp.Logger = gathering{}

// Println logs one mistake.
func (g gathering) Println(v ...any) {
	text := strings.TrimSpace(fmt.Sprintln(v...))
	level := slog.LevelError
	if strings.HasPrefix(text, "error encoding and sending metric family") {
		level = slog.LevelDebug
	}
	g.log.Log(context.Background(), level, "metrics can't be sent", "err", text)
}

// Serve answers scrapes of /metrics, and has a status page and what a supervisor asks (/-/healthy and /-/ready), until the context ends. webConfig is the name of a web configuration
// file of the exporter toolkit, or empty.
func Serve(ctx context.Context, l net.Listener, webConfig string, c prometheus.Collector, h Health, log *slog.Logger) error {
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(c); err != nil {
		return errors.Join(fmt.Errorf("metrics: %w", err), l.Close())
	}
	loud := slog.New(warnings{log.Handler()})
	errorLog := slog.NewLogLogger(loud.Handler(), slog.LevelDebug) // what clients do wrong is their own affair
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", inTurn(promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorLog: gathering{loud}})))
	mux.Handle("GET /{$}", pageHandler("index.html"))
	mux.Handle("GET /status.js", pageHandler("status.js"))
	mux.Handle("GET /status.css", pageHandler("status.css"))
	h.register(mux)
	srv := &http.Server{
		Handler: attended(mux), ErrorLog: errorLog, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10, ConnContext: withGuest,
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := web.Serve(newCrowd(l), srv, &web.FlagConfig{WebConfigFile: &webConfig}, loud); !errors.Is(err, http.ErrServerClosed) {
		return errors.Join(fmt.Errorf("metrics: %w", err), l.Close())
	}
	return nil
}

// warnings lets through what is at least a warning: the toolkit tells at its start what is no change of
// ours.
type warnings struct{ slog.Handler }

// Enabled says which levels are let through.
func (w warnings) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && w.Handler.Enabled(ctx, l)
}
