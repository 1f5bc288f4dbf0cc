package agent

import (
	"context"
	"strings"
	"testing"

	"tsoagent/agent/api"
	"tsoagent/agent/client"
	"tsoagent/agent/netns/netnstest"
)

// A pause without a name is of all namespaces, and of those that come; with a name it is of one.
func TestFleetPausesAllAndThoseThatCome(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	named(t, "a", "b")
	cfg := fleetConfig(t, "all")
	s := sail(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	c := client.New(cfg.RunDir)
	defer c.Close()
	paused := func(names ...string) {
		t.Helper()
		var got []string
		list, err := c.Namespaces(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range list {
			if n.Paused {
				got = append(got, n.Name)
			}
		}
		if strings.Join(got, " ") != strings.Join(names, " ") {
			t.Errorf("paused: %v, want %v", got, names)
		}
	}
	followed := func(n int) {
		t.Helper()
		netnstest.Within(t, "all are followed", func() bool {
			list, err := c.Namespaces(ctx)
			if err != nil || len(list) != n {
				return false
			}
			for _, ns := range list {
				if ns.State != NetnsFollowed {
					return false
				}
			}
			return true
		})
	}
	followed(3)
	said, err := c.Pause(ctx, "", api.PauseRequest{})
	if err != nil || len(said.Namespaces) != 3 {
		t.Fatalf("paused %+v, %v", said, err)
	}
	for i, name := range []string{"host", "a", "b"} {
		if n := said.Namespaces[i]; n.Name != name || n.Paused == nil || n.Why != "" {
			t.Errorf("%s: %+v", name, n)
		}
	}
	paused("host", "a", "b")
	cover(t, "a")
	named(t, "c")
	cover(t, "c")
	followed(4)
	paused("host", "a", "b", "c")
	seen := func(ns string) bool {
		r, err := c.ReportIn(ctx, ns)
		return err == nil && len(r.Coverages) == 2
	}
	netnstest.Within(t, "the policies are seen", func() bool { return seen("a") && seen("c") })
	bare(t, "a", "b", "c")

	if said, err := c.Resume(ctx, "a"); err != nil || len(said.Namespaces) != 1 || said.Namespaces[0].Paused != nil {
		t.Errorf("resumed %+v, %v", said, err)
	}
	locked(t, "a")
	bare(t, "c")
	paused("host", "b", "c")
	if _, err := c.Resume(ctx, "nope"); err == nil || !strings.Contains(err.Error(), `"nope"`) {
		t.Errorf("a namespace that is not followed: %v", err)
	}
	if _, err := c.Resume(ctx, ""); err != nil {
		t.Error(err)
	}
	locked(t, "c")
	paused()
	named(t, "d")
	cover(t, "d")
	locked(t, "d")

	l, err := c.EventsIn(ctx, "a", 0)
	if err != nil || l.Netns != "a" || len(l.Events) == 0 {
		t.Errorf("events of a: %+v, %v", l, err)
	}
	if d, err := c.DevicesIn(ctx, "a", false); err != nil || d.Netns != "a" || len(d.Devices) != 1 || d.Devices[0].Device != "n0" || d.Devices[0].Driver != "veth" {
		t.Errorf("devices of a: %+v, %v", d, err)
	}
	if l, err := c.LocksIn(ctx, "a"); err != nil || l.Netns != "a" || len(l.Clones) != 2 {
		t.Errorf("locks of a: %+v, %v", l, err)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
