package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"tsoagent/agent/api"
	"tsoagent/agent/client"
	"tsoagent/ethtool"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// described is docs/openapi.yaml.
type described struct {
	doc   *openapi3.T
	asked map[string]bool // operations that were answered with 200, by media type
}

func openDescription(t *testing.T) *described {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromFile("../docs/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// The description lets others add fields; this agent has none that are not in it.
	for _, s := range doc.Components.Schemas {
		if s.Value.AdditionalProperties.Schema == nil {
			no := false
			s.Value.AdditionalProperties.Has = &no
		}
	}
	return &described{doc, map[string]bool{}}
}

// ask sends a request, and holds the answer to the description.
func (d *described) ask(t *testing.T, c *client.Client, method, path, body string, want int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel() // ends a stream
	req := newRequest(t, method, path).WithContext(ctx)
	if body != "" {
		req.Body = io.NopCloser(strings.NewReader(body))
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != want {
		text, _ := io.ReadAll(res.Body)
		t.Fatalf("%s %s: %s, want %d: %s", method, path, res.Status, want, text)
	}
	item := d.doc.Paths.Value(req.URL.Path)
	if item == nil {
		t.Fatalf("%s is not described", req.URL.Path)
	}
	op := item.GetOperation(method)
	if op == nil && want == http.StatusMethodNotAllowed {
		for _, op = range item.Operations() { // any of the path's says so
		}
	}
	if op == nil {
		t.Fatalf("%s %s is not described", method, req.URL.Path)
	}
	for name := range req.URL.Query() {
		if op.Parameters.GetByInAndName("query", name) == nil {
			t.Errorf("%s: the parameter %s is not described", path, name)
		}
	}
	answer := op.Responses.Value(fmt.Sprint(res.StatusCode))
	if answer == nil {
		t.Fatalf("%s %s: %d is not described", method, path, res.StatusCode)
	}
	media, _, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if err != nil || answer.Value.Content[media] == nil {
		t.Fatalf("%s %s: %q is not described (%v)", method, path, media, err)
	}
	schema := answer.Value.Content[media].Schema.Value
	check := func(b []byte) {
		t.Helper()
		var v any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatalf("%s %s: %v: %s", method, path, err, b)
		}
		if err := schema.VisitJSON(v, openapi3.MultiErrors()); err != nil {
			t.Errorf("%s %s is not as described: %v\n%s", method, path, err, b)
		}
	}
	if res.StatusCode == http.StatusOK {
		d.asked[op.OperationID+" "+media] = true
	}
	if media == api.NDJSON {
		lines := bufio.NewScanner(res.Body)
		for n := 0; n < 3 && lines.Scan(); n++ {
			check(lines.Bytes())
		}
		return
	}
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	check(text)
}

// TestAnswersAreAsDescribed asks a busy agent for everything that there is.
func TestAnswersAreAsDescribed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: only root may pause")
	}
	d := openDescription(t)
	cfg := laneConfig()
	cfg.RunDir = runDir(t)
	w := tunnelWorld(t, cfg)
	w.a.noLanes = "no lanes here"
	w.refuse = map[ethtool.Feature]bool{ethtool.TCP6Segmentation: true}
	w.a.findings = []string{"a finding"}
	w.a.st.keys.Keys = []sockopt.Key{{Kind: sockopt.MD5, Peer: netip.MustParsePrefix("192.0.2.9/32"), Port: 179}}
	larval := policy(105, "0.0.0.0/0", "10.7.0.0/16", 2)
	port := *policy(97, "10.1.0.0/16", "10.6.0.0/16", 0).Policy
	port.Selector.Proto, port.Selector.Dport = 6, xfrmwatch.PortMatch{Port: 443, Mask: 0xffff}
	port.Mark = xfrmwatch.Mark{Value: 1, Mask: 0xff}
	w.live = true
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	c := serveAgent(t, w.a)
	within(t, 5*time.Second, "the socket answers", func() bool { _, err := c.Namespaces(t.Context()); return err == nil })
	for _, path := range []string{"/v1/report", "/v1/locks"} {
		d.ask(t, c, "GET", path, "", 503)
	}
	d.ask(t, c, "GET", "/v1/namespaces", "", 200)
	go func() { ended <- w.a.loop(ctx, nil) }()
	w.resync()
	w.dumpXFRM(tunnelPolicy, tunnelSA, partPolicy, partSA, larval, xfrmwatch.PolicySet{Policy: &port})
	within(t, 5*time.Second, "a report", func() bool { _, err := c.Report(t.Context()); return err == nil })
	for _, x := range []struct {
		method, path, body string
		want               int
	}{
		{"GET", "/v1/report", "", 200}, {"GET", "/v1/report?netns=host", "", 200}, {"GET", "/v1/report?netns=blue", "", 404},
		{"POST", "/v1/report", "{}", 405}, {"GET", "/v1/namespaces", "", 200},
		{"GET", "/v1/explain?dst=10.2.0.1&from=10.1.0.1&proto=6&port=443&mark=0", "", 200},
		{"GET", "/v1/explain?dst=10.3.0.1", "", 200}, {"GET", "/v1/explain", "", 400}, {"GET", "/v1/explain?dst=10.2.0.1&netns=blue", "", 404},
		{"GET", "/v1/devices", "", 200}, {"GET", "/v1/devices?all=true", "", 200}, {"GET", "/v1/devices?all=x", "", 400},
		{"GET", "/v1/locks", "", 200}, {"GET", "/v1/locks?netns=blue", "", 404},
		{"GET", "/v1/events", "", 200}, {"GET", "/v1/events?since=2", "", 200}, {"GET", "/v1/events?since=x", "", 400},
		{"GET", "/v1/events?follow=true&since=1", "", 200},
		{"GET", "/v1/flows?state=x", "", 400}, {"GET", "/v1/flows?netns=blue", "", 404},
		{"GET", "/v1/world", "", 200}, {"GET", "/v1/world?netns=blue", "", 404},
		{"POST", "/v1/pause", `{"for":"10m","restore":true}`, 200}, {"GET", "/v1/report", "", 200}, {"GET", "/v1/namespaces", "", 200},
		{"POST", "/v1/pause", `{"for":"x"}`, 400}, {"POST", "/v1/pause?netns=blue", `{}`, 404}, {"POST", "/v1/pause", "", 415},
		{"POST", "/v1/pause", strings.Repeat(" ", maxBody+1), 413}, {"GET", "/v1/pause", "", 405},
		{"POST", "/v1/resume", `{}`, 200}, {"POST", "/v1/resume", `{"x":1}`, 400}, {"POST", "/v1/reload", `{}`, 501}, {"POST", "/v1/reload", `{"x":1}`, 400},
	} {
		d.ask(t, c, x.method, x.path, x.body, x.want)
	}
	// What the kernel's sockets say needs privileges that a test may lack; without them it is described, too.
	for _, path := range []string{"/v1/flows?state=all", "/v1/diagnosis"} {
		res, err := c.Do(newRequest(t, "GET", path))
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		d.ask(t, c, "GET", path, "", res.StatusCode)
		if res.StatusCode == http.StatusNotImplemented {
			d.asked["flows "+api.NDJSON] = true
		}
	}
	for _, x := range []struct {
		err  error
		want int
	}{{nil, 200}, {&refusedError{errors.New("tsoagent.yaml:2: mtu: no")}, 409}, {errEndedAgent, 503}, {ErrStopping, 503}} {
		dir := runDir(t)
		c := serveIn(t, dir, func(ctx context.Context) error {
			return serve(ctx, SocketPath(dir), handler(reloading{w.a, x.err}, ctx.Done()), discard())
		})
		within(t, 5*time.Second, "the socket answers", func() bool { _, err := c.Namespaces(t.Context()); return err == nil })
		d.ask(t, c, "POST", "/v1/reload", "{}", x.want)
	}
	for i := range api.Operations {
		op := &api.Operations[i]
		if op.Answer != nil && !d.asked[op.Name+" application/json"] || op.Line != nil && !d.asked[op.Name+" "+api.NDJSON] {
			t.Errorf("nobody has asked for %s", op.Name)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// reloading is an agent that has something to read again.
type reloading struct {
	*Agent
	err error
}

func (r reloading) reloaded(context.Context, api.Peer) (*api.ReloadAnswer, error) {
	if r.err != nil {
		return nil, r.err
	}
	return &api.ReloadAnswer{Version: api.Version, Changed: true, Configured: time.Now()}, nil
}

// Each operation has a handler, and the paths take nothing else.
func TestHandlersAreTheOperations(t *testing.T) {
	w := controlWorld(t)
	w.start()
	h := handler(w.a, nil)
	methods := []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
	for i := range api.Operations {
		op := &api.Operations[i]
		for _, method := range methods {
			rec := newRecorder()
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // nobody runs the loop
			req := newRequest(t, method, op.Path).WithContext(ctx)
			h.ServeHTTP(rec, req)
			takes := method == op.Method || method == "HEAD" && op.Method == "GET"
			if (rec.code == http.StatusMethodNotAllowed) == takes || rec.code == http.StatusNotFound {
				t.Errorf("%s %s: %d", method, op.Path, rec.code)
			}
			if allow := rec.header.Get("Allow"); !takes && !strings.Contains(allow, op.Method) {
				t.Errorf("%s %s allows %q", method, op.Path, allow)
			}
		}
	}
}

// TestPageHasAllOperations holds docs/control-api.md to the operations and the bounds.
func TestPageHasAllOperations(t *testing.T) {
	b, err := os.ReadFile("../docs/control-api.md")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(string(b)), " ")
	rows := strings.Count(string(b), "/v1/") - strings.Count(string(b), "http://tsoagent/v1/")
	if rows != len(api.Operations) {
		t.Errorf("it has %d requests, there are %d", rows, len(api.Operations))
	}
	for _, op := range api.Operations {
		if !strings.Contains(text, "| `"+op.Method+" "+op.Path+"` |") {
			t.Errorf("%s %s is missing", op.Method, op.Path)
		}
		for _, code := range op.Errors {
			if !regexp.MustCompile(fmt.Sprintf(`\| (\d+, )?%d(, \d+)? \|`, code)).MatchString(text) {
				t.Errorf("status %d is missing", code)
			}
		}
	}
	for _, want := range []string{
		fmt.Sprintf("at most %d KiB and no field", maxBody>>10), fmt.Sprintf("at most %d connections", maxConns), fmt.Sprintf("at most %d users", maxUsers),
		fmt.Sprintf("At most %d requests", maxAsking), fmt.Sprintf("%d clients can follow", maxFollows), fmt.Sprintf("read for %.0f seconds", followPatience.Seconds()),
		fmt.Sprintf("newest %d events", maxEvents), fmt.Sprintf("large, %d are written at a time, and others wait %.0f seconds", maxAnswers, answerPatience.Seconds()),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("it does not say %q", want)
		}
	}
}
