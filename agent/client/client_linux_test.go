package client_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"testing"

	"tsoagent/agent"
	"tsoagent/agent/api"
	"tsoagent/agent/client"
	"tsoagent/agent/flows"
	"tsoagent/agent/netns/netnstest"
)

// TestRealAgent asks a real agent, in a namespace of its own, for all that there is.
func TestRealAgent(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, `link add n0 type veth peer name n1
link set n0 up
link set n1 up
addr add 192.0.2.1/24 dev n0
addr add 2001:db8::1/64 dev n0 nodad
xfrm policy add src 192.0.2.1/32 dst 198.51.100.0/24 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel
route add 198.51.100.0/24 via 192.0.2.2`)
	cfg := agent.Config{Mode: agent.Observe, RunDir: t.TempDir()}
	cfg.Plan.PresumeMTU = 1400
	c := client.New(cfg.RunDir)
	defer c.Close()
	if _, err := c.Report(t.Context()); !errors.Is(err, client.ErrNoAgent) {
		t.Errorf("before it is there: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	f, err := agent.NewFleet(ctx, cfg, slog.New(slog.DiscardHandler), "test")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	serving, served := context.WithCancel(t.Context())
	go func() { ended <- f.Run(ctx) }()
	go func() { ended <- f.Serve(serving) }()
	<-f.Ready()
	netnstest.Within(t, "the socket answers", func() bool { _, err := c.Report(t.Context()); return err == nil })

	documents(t, c)
	absences(t, c)
	orders(t, c, f)

	followed := make(chan error, 1)
	first := make(chan struct{})
	go func() {
		n := 0
		followed <- c.Follow(t.Context(), "", 0, func(api.EventLine) error {
			if n++; n == 1 {
				close(first)
			}
			return nil
		})
	}()
	<-first
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	served()
	if err := errors.Join(<-ended, <-followed, f.Close()); err != nil {
		t.Error(err)
	}
	if _, err := c.Report(t.Context()); !errors.Is(err, client.ErrNoAgent) {
		t.Errorf("after it has gone: %v", err)
	}
}

// documents asks for each.
func documents(t *testing.T, c *client.Client) {
	t.Helper()
	r, err := c.Report(t.Context())
	if err != nil || !r.Live || r.Mode != agent.Observe || len(r.Coverages) != 1 {
		t.Fatalf("report: %+v, %v", r, err)
	}
	if r, err = c.ReportIn(t.Context(), "host"); err != nil || r.Netns != "" {
		t.Errorf("report of host: %+v, %v", r, err)
	}
	if list, err := c.Namespaces(t.Context()); err != nil || len(list) != 1 || list[0].Name != "host" {
		t.Errorf("namespaces: %+v, %v", list, err)
	}
	for dst, action := range map[string]string{"198.51.100.1": "ipsec", "2001:db8::2": "none"} {
		if e, err := c.Explain(t.Context(), api.Question{Dst: netip.MustParseAddr(dst), Mark: 1 << 31}); err != nil || e.Device != "n0" || e.Action != action {
			t.Errorf("explain %s: %+v, %v", dst, e, err)
		}
	}
	if d, err := c.DevicesIn(t.Context(), "", true); err != nil || len(d.Devices) != 3 {
		t.Errorf("devices: %+v, %v", d, err)
	}
	if l, err := c.LocksIn(t.Context(), ""); err != nil || len(l.Locks)+len(l.Clones) == 0 {
		t.Errorf("locks: %+v, %v", l, err)
	}
	if l, err := c.EventsIn(t.Context(), "", 0); err != nil || len(l.Events) == 0 || l.Last == 0 {
		t.Errorf("events: %+v, %v", l, err)
	} else if l, err = c.EventsIn(t.Context(), "", l.Last); err != nil || len(l.Events) != 0 {
		t.Errorf("events after the last: %+v, %v", l, err)
	}
	if w, err := c.WorldIn(t.Context(), ""); err != nil || len(w.Policies) != 1 {
		t.Errorf("world: %+v, %v", w, err)
	}
	// What this kernel can't tell is said with a status of its own.
	var refused *client.Error
	res, err := c.FlowsIn(t.Context(), "", flows.Filter{}, func(*flows.Flow) error { return nil })
	if errors.As(err, &refused) && refused.Status == http.StatusNotImplemented {
		t.Logf("flows: %v", err)
	} else if err != nil || !res.Live {
		t.Errorf("flows: %+v, %v", res, err)
	}
	if d, err := c.DiagnosisIn(t.Context(), ""); err != nil || d.At.IsZero() {
		t.Errorf("diagnosis: %+v, %v", d, err)
	}
}

// absences are what is asked for in vain.
func absences(t *testing.T, c *client.Client) {
	t.Helper()
	var absent *api.AbsentError
	if _, err := c.ReportIn(t.Context(), "nope"); !errors.As(err, &absent) || absent.Of != api.AbsentNetns {
		t.Errorf("report of no namespace: %v", err)
	}
	if err := c.Follow(t.Context(), "nope", 0, nil); !errors.As(err, &absent) {
		t.Errorf("events of no namespace: %v", err)
	}
	var refused *client.Error
	if _, err := c.Explain(t.Context(), api.Question{}); !errors.As(err, &refused) || refused.Status != http.StatusBadRequest {
		t.Errorf("explain nothing: %v", err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://tsoagent/v2/report", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil || res.StatusCode != http.StatusNotFound {
		t.Fatalf("another version's path: %v, %v", res, err)
	}
	_, _ = io.Copy(io.Discard, res.Body)
	_ = res.Body.Close()
}

// orders are what only root may tell an agent.
func orders(t *testing.T, c *client.Client, f *agent.Fleet) {
	t.Helper()
	for _, paused := range []bool{true, false} {
		a, err := c.Resume(t.Context(), "")
		if paused {
			a, err = c.Pause(t.Context(), "host", api.PauseRequest{For: "1h"})
		}
		if err != nil || len(a.Namespaces) != 1 || (a.Namespaces[0].Paused != nil) != paused {
			t.Errorf("paused %v: %+v, %v", paused, a, err)
		}
	}
	var refused *client.Error
	if _, err := c.Pause(t.Context(), "", api.PauseRequest{For: "soon"}); !errors.As(err, &refused) || refused.Status != http.StatusBadRequest {
		t.Errorf("a pause of no length: %v", err)
	}
	wrong := errors.New("a.yaml:1: wrong\na.yaml:2: wrong, too")
	f.OnReload(func(context.Context) error { f.RefuseReload(wrong); return wrong })
	if _, err := c.Reload(t.Context()); !errors.As(err, &refused) || refused.Status != http.StatusConflict {
		t.Errorf("a wrong configuration: %v", err)
	}
	f.OnReload(func(ctx context.Context) error { return f.Reload(ctx, f.Config()) })
	if a, err := c.Reload(t.Context()); err != nil || a.Changed {
		t.Errorf("the same configuration: %+v, %v", a, err)
	}
}
