package agent

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"tsoagent/agent/client"
	"tsoagent/agent/verify"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// What packets are sorted by comes over the socket as the agent knows it, in as many pieces as it takes.
func TestWorldOverTheSocket(t *testing.T) {
	w := controlWorld(t)
	w.addLink(&routes.Link{Index: 20, Name: "port1", SlaveKind: "bridge", Type: 1, MTU: 1500, Up: true})
	w.addLink(&routes.Link{Index: 21, Name: "moved", Kind: "xfrm", Type: 65534, MTU: 1500, Up: true, IfID: 3, ParentElsewhere: true})
	w.addLink(&routes.Link{Index: 22, Name: "vti1", Kind: "vti", Type: 768, MTU: 1500, Up: true, Encap: routes.Encap{Key: 7}})
	w.addLink(&routes.Link{Index: 23, Name: "mac1", Kind: "macvlan", Type: 1, MTU: 1500, Up: true, Parent: 2})
	w.queue = nil
	events := []xfrmwatch.Event{tunnelPolicy, tunnelSA}
	const many = 3*worldPieces + 5
	for i := range many {
		p := policy(1000+8*i, fmt.Sprintf("10.9.%d.%d/32", i>>8, i&255), "10.7.0.0/16", 9)
		p.Policy.Templates = nil
		events = append(events, p)
	}
	w.start(events...)
	c := w.serve()
	got, err := c.WorldIn(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	want, err := w.a.verifyWorld(t.Context(), w.a.call)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
		t.Errorf("(-agent +client)\n%s", d)
	}
	if len(got.Policies) != many+1 || got.Policies[0].Index != 9 && got.Policies[many].Index != 9 || !got.Live || got.Version != verify.Version {
		t.Errorf("%d policies, live %v, version %d", len(got.Policies), got.Live, got.Version)
	}
	if len(got.SAs) != 1 || got.SAs[0].Policy != 9 || got.SAs[0].SPI != 0x100 {
		t.Errorf("SAs %+v", got.SAs)
	}
	if text := strings.Join(got.Carriers, " "); !strings.Contains(text, "ipsec1") || strings.Contains(text, "ipsec2") {
		t.Errorf("carriers %v", got.Carriers)
	}
	devices := map[string]verify.Device{}
	for _, d := range got.Devices {
		devices[d.Name] = d
	}
	if d := devices["ipsec1"]; d.IfID != 1 || !d.TSO4.Planned || !d.TSO4.Held || d.TSO4.Active || d.Elsewhere || d.Passing {
		t.Errorf("ipsec1: %+v", d)
	}
	if d := devices["ipsec2"]; d.TSO4.Planned || d.TSO4.Held || !d.TSO4.Active {
		t.Errorf("ipsec2: %+v", d)
	}
	if !devices["port1"].Passing || !devices["moved"].Elsewhere || !devices["vti1"].VTI || devices["vti1"].Mark != 7 {
		t.Errorf("devices %+v", devices)
	}
	below := false
	for _, d := range got.Devices {
		below = below || d.Index == 2 && d.Passing
	}
	if !below {
		t.Errorf("the device below a macvlan is not one that others' packets pass: %+v", got.Devices)
	}
}

// Who asks while others read has to wait, and in the end to ask again; who reads on and on is not served to the end.
func TestWorldTakesATurn(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	w.a.conns.wait = 0
	c := w.serve()
	for range maxLists {
		w.a.conns.slots <- struct{}{}
	}
	if _, err := c.WorldIn(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "try again in 5s") {
		t.Errorf("while others read: %v", err)
	}
	for range maxLists {
		<-w.a.conns.slots
	}
	for range 2 * maxLists { // a turn ends
		if _, err := c.WorldIn(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
	}
	w.a.conns.whole = -1
	if _, err := c.WorldIn(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "it ended early") {
		t.Errorf("after the time for all of it: %v", err)
	}
}

func TestWorldBeforeTheFirstPlan(t *testing.T) {
	w := controlWorld(t)
	c := w.serve()
	if _, err := c.WorldIn(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "still reading") {
		t.Errorf("got %v", err)
	}
	if _, err := c.WorldIn(t.Context(), "blue"); err == nil || !strings.Contains(err.Error(), "does not follow namespace") {
		t.Errorf("got %v", err)
	}
}

// An answer that breaks off, or that has no beginning, is none.
func TestWorldThatBreaksOff(t *testing.T) {
	for answer, want := range map[string]string{
		"":                                      "it ended early",
		`{"world":{"version":1}}`:               "it ended early",
		`{"world":{"version":1}}{"policies":[`:  "it ended early",
		`{"end":true}`:                          "it has no beginning",
		`{"policies":[{"index":1}]}`:            "it has no beginning",
		`{"world":{"version":1}}{"end":"maybe"`: "it ended early",
	} {
		dir := runDir(t)
		l, err := new(net.ListenConfig).Listen(t.Context(), "unix", SocketPath(dir))
		if err != nil {
			t.Fatal(err)
		}
		srv := &httptest.Server{Listener: l, Config: &http.Server{
			Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(answer)) }),
		}}
		srv.Start()
		c := client.New(dir)
		if _, err := c.WorldIn(t.Context(), ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", answer, err, want)
		}
		c.Close()
		srv.Close()
	}
}
