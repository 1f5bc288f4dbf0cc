package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/api"
	"tsoagent/agent/client"
)

// post sends a body, and returns the status and the error's text.
func post(t *testing.T, c *client.Client, path, contentType string, body io.Reader) (int, string) {
	t.Helper()
	req := newRequest(t, http.MethodPost, path)
	req.Body, req.ContentLength = io.NopCloser(body), -1
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var e api.Error
	if res.StatusCode != http.StatusOK {
		if err := json.NewDecoder(res.Body).Decode(&e); err != nil || e.Text == "" {
			t.Errorf("%s: %s without an error (%v)", path, res.Status, err)
		}
	}
	return res.StatusCode, e.Text
}

// The loop is not asked: nobody runs it here, so that whatever reached it would hang.
func TestWrongRequestsAreRefusedAheadOfTheLoop(t *testing.T) {
	w := controlWorld(t)
	w.start()
	c := w.serve()
	const js = "application/json"
	for _, x := range []struct {
		path, contentType, body string
		code                    int
		text                    string
	}{
		{"/v1/pause", "", "{}", 415, "send JSON, with Content-Type: application/json"},
		{"/v1/pause", "application/x-www-form-urlencoded", "for=10m", 415, "send JSON"},
		{"/v1/pause", js, "", 400, "the request can't be read: EOF"},
		{"/v1/pause", js, "{", 400, "the request can't be read: unexpected EOF"},
		{"/v1/pause", js, "[]", 400, "the request can't be read: json: cannot unmarshal array"},
		{"/v1/pause", js, `{"for":10}`, 400, "cannot unmarshal number"},
		{"/v1/pause", js, `{"fro":"10m"}`, 400, `unknown field "fro"`},
		{"/v1/pause", js, `{} {}`, 400, "something behind the JSON"},
		{"/v1/pause", js, `{"for":"10"}`, 400, `for: "10" is no time above 0 with a unit, as 90s, 10m or 2h`},
		{"/v1/pause", js, `{"for":"-1s"}`, 400, "is no time above 0"},
		{"/v1/pause", js, `{"for":"` + strings.Repeat("1", maxBody) + `s"}`, 413, "larger than 4096 bytes"},
		{"/v1/pause", js, "{}" + strings.Repeat(" ", maxBody), 413, "larger than 4096 bytes"},
		{"/v1/pause?netns=blue", js, "{}", 404, `does not follow namespace "blue"`},
		{"/v1/resume", js, `{"all":true}`, 400, `unknown field "all"`},
		{"/v1/resume", "", "", 415, "send JSON"},
		{"/v1/report", js, "{}", 405, "/v1/report takes GET, not POST"},
	} {
		code, text := post(t, c, x.path, x.contentType, strings.NewReader(x.body))
		if code != x.code || !strings.Contains(text, x.text) {
			t.Errorf("POST %s %q %.40q: %d %q, want %d %q", x.path, x.contentType, x.body, code, text, x.code, x.text)
		}
	}
	for path, want := range map[string]string{
		"/v1/events?since=-1": `since: "-1" is no number of an event`, "/v1/events?follow=maybe": `follow: "maybe" is neither true nor false`,
		"/v1/devices?all=2": `all: "2" is neither true nor false`,
	} {
		res, err := c.Do(newRequest(t, http.MethodGet, path))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if res.StatusCode != 400 || !strings.Contains(string(body), strings.ReplaceAll(want, `"`, `\"`)) {
			t.Errorf("%s: %s %s", path, res.Status, body)
		}
	}
	if len(w.a.inbox.take()) > 0 {
		t.Error("something came to the loop")
	}
}

// endlessBody is a body without an end.
type endlessBody struct{ sent atomic.Int64 } // it may still be read after the answer is there

// Read writes blanks.
func (e *endlessBody) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	e.sent.Add(int64(len(b)))
	return len(b), nil
}

func TestEndlessBodyIsCutOff(t *testing.T) {
	w := controlWorld(t)
	w.start()
	c := w.serve()
	body := &endlessBody{}
	req := newRequest(t, http.MethodPost, "/v1/pause")
	req.Body, req.ContentLength = io.NopCloser(body), -1
	req.Header.Set("Content-Type", "application/json")
	res, err := c.Do(req)
	if err == nil { // else the server hung up while it was still sent
		_ = res.Body.Close()
		if res.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("%s", res.Status)
		}
	}
	if sent := body.sent.Load(); sent > 1<<20 {
		t.Errorf("%d bytes were taken", sent)
	}
	if _, err := c.Report(t.Context()); err != nil {
		t.Error(err)
	}
}

// raw is a connection to the control socket.
func (w *world) raw() net.Conn {
	w.t.Helper()
	conn, err := net.Dial("unix", SocketPath(w.a.cfg.RunDir))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestGarbageCostsTheConnection(t *testing.T) {
	w := controlWorld(t)
	w.start()
	c := w.serve()
	for name, text := range map[string]string{
		"no HTTP":        "\x00\xff\x16\x03\x01\r\n\r\n",
		"a huge header":  "GET /v1/report HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n",
		"no host":        "GET /v1/report HTTP/1.1\r\n\r\n",
		"a huge request": "GET /" + strings.Repeat("x", 64<<10) + " HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		conn := w.raw()
		go func() { _, _ = io.WriteString(conn, text) }()
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			_ = res.Body.Close()
		}
		if err == nil && res.StatusCode < 400 {
			t.Errorf("%s: %s", name, res.Status)
		}
	}
	if _, err := c.Report(t.Context()); err != nil {
		t.Error(err)
	}
}

// One user's idle connections don't keep others out, nor do they use up the agent's files: the next one is told so
// at once, and there is room again when one goes.
func TestConnectionsOfOneUserAreBounded(t *testing.T) {
	w := controlWorld(t)
	w.start()
	c := w.serve()
	c.Close()
	var conns []net.Conn
	for range maxConns {
		conns = append(conns, w.raw())
	}
	refused := func() bool {
		conn := w.raw()
		defer conn.Close()
		_, _ = io.WriteString(conn, "GET /v1/report HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			return true // hung up ahead of our request
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		if res.StatusCode == http.StatusServiceUnavailable && !strings.Contains(string(body), "too many connections of this user") {
			t.Errorf("refused with %s", body)
		}
		return res.StatusCode == http.StatusServiceUnavailable
	}
	within(t, 5*time.Second, "too many are refused", refused)
	for _, conn := range conns {
		_ = conn.Close()
	}
	within(t, 5*time.Second, "there is room again", func() bool { return !refused() })
}

func TestBoundedKeepsRoomForRoot(t *testing.T) {
	b := &bounded{byUID: map[uint32]int{}}
	for uid := range uint32(maxUsers) {
		if !b.take(1000 + uid) {
			t.Fatalf("user %d of %d is refused", uid+1, maxUsers)
		}
	}
	if b.take(2000) {
		t.Error("one user more is served")
	}
	for range maxConns {
		if !b.take(0) {
			t.Fatal("root is kept out")
		}
	}
	if b.take(0) {
		t.Error("root has more than the bound")
	}
	b.give(1000)
	if !b.take(2000) {
		t.Error("no room after one has gone")
	}
}

// Whoever may open the socket may look; nobody but root may change anything.
func TestOnlyRootPauses(t *testing.T) {
	if dir := os.Getenv("TSO_TEST_PAUSE"); dir != "" {
		c := client.New(dir)
		_, err := c.Report(t.Context())
		t.Logf("report: %v", err)
		for name, do := range map[string]func() (*api.PauseAnswer, error){
			"pause":  func() (*api.PauseAnswer, error) { return c.Pause(t.Context(), "", api.PauseRequest{}) },
			"resume": func() (*api.PauseAnswer, error) { return c.Resume(t.Context(), "") },
		} {
			_, err = do()
			t.Logf("%s: %v; ErrPermission %v", name, err, errors.Is(err, client.ErrPermission))
		}
		return
	}
	dir := runDir(t)
	w := tunnelWorld(t, Config{RunDir: dir})
	w.start()
	w.serve()
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(SocketPath(dir), 0o666)); err != nil {
		t.Fatal(err)
	}
	out := asNobody(t, "TestOnlyRootPauses", "TSO_TEST_PAUSE="+dir)
	for _, what := range []string{"pause", "resume"} {
		want := what + ": only root may do this, and you are uid 65534: run it with sudo; ErrPermission true"
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if !strings.Contains(out, "report: <nil>") {
		t.Errorf("no report:\n%s", out)
	}
	if len(w.a.inbox.take()) > 0 {
		t.Error("something came to the loop")
	}
}

// A connection of which the kernel doesn't tell whose it is changes nothing.
func TestUnknownPeerChangesNothing(t *testing.T) {
	w := controlWorld(t)
	w.start()
	rec := newRecorder()
	req := newRequest(t, http.MethodPost, "/v1/pause")
	handler(w.a, nil).ServeHTTP(rec, req)
	if rec.code != http.StatusForbidden {
		t.Errorf("status %d", rec.code)
	}
	if credOf(&net.TCPConn{}) != nil {
		t.Error("a TCP connection has a peer")
	}
}

type recorder struct {
	header http.Header
	code   int
}

func newRecorder() *recorder { return &recorder{header: http.Header{}} }

// Header is the answer's.
func (r *recorder) Header() http.Header { return r.header }

// WriteHeader takes the status.
func (r *recorder) WriteHeader(code int) { r.code = code }

// Write takes all.
func (r *recorder) Write(b []byte) (int, error) { return len(b), nil }

// One who sends a byte now and then, and one who never reads, cost nothing but their connection.
func TestSlowClientsAreLeftBehind(t *testing.T) {
	w := controlWorld(t)
	w.start()
	c := w.serve()
	slow := w.raw()
	_, _ = io.WriteString(slow, "GET /v1/rep")
	deaf := w.raw()
	for range 4 {
		_, _ = fmt.Fprint(deaf, "GET /v1/report HTTP/1.1\r\nHost: x\r\n\r\n")
	}
	w.xfrm(tunnelPolicy, tunnelSA)
	w.settle() // the loop does not wait for anybody
	w.mustProtect()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if r, err := c.Report(ctx); err != nil || len(r.Coverages) != 1 {
		t.Errorf("others: %v", err)
	}
	// The slow one is cut off when the head of its request is overdue.
	_ = slow.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadAll(slow); err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the slow one: %v", err)
	}
}

// The kernel tells who asks.
func TestPauseSaysWhoAsked(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: only root may pause")
	}
	w := controlWorld(t)
	w.live = true
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- w.a.loop(ctx, nil) }()
	w.resync()
	w.dumpXFRM(tunnelPolicy, tunnelSA)
	c := serveAgent(t, w.a)
	within(t, 5*time.Second, "a report", func() bool { _, err := c.Report(t.Context()); return err == nil })
	got, err := c.Pause(t.Context(), "", api.PauseRequest{For: "10m"})
	if err != nil || len(got.Namespaces) != 1 || got.Namespaces[0].Name != "host" || got.Namespaces[0].Paused == nil {
		t.Fatalf("paused %+v, %v", got, err)
	}
	p := got.Namespaces[0].Paused
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	if p.By.UID != 0 || int(p.By.PID) != os.Getpid() || p.By.Process != strings.TrimSpace(string(comm)) {
		t.Errorf("by %+v", p.By)
	}
	if d := time.Until(p.Until); d <= 9*time.Minute || d > 10*time.Minute {
		t.Errorf("for %s", d)
	}
	if r, err := c.Report(t.Context()); err != nil || r.Paused == nil || r.Paused.By != p.By {
		t.Errorf("the report says %+v, %v", r.Paused, err)
	}
	if got, err := c.Resume(t.Context(), "host"); err != nil || len(got.Namespaces) != 1 || got.Namespaces[0].Paused != nil {
		t.Errorf("resumed %+v, %v", got, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// serveAgent runs an agent's control socket until the test ends.
func serveAgent(t *testing.T, a *Agent) *client.Client {
	t.Helper()
	return serveIn(t, a.cfg.RunDir, a.Serve)
}

// serveIn has somebody serve the socket of a run directory.
func serveIn(t *testing.T, dir string, serve func(context.Context) error) *client.Client {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- serve(ctx) }()
	c := client.New(dir)
	t.Cleanup(func() {
		c.Close()
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return c
}
