package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/api"
	"tsoagent/agent/client"
	"tsoagent/agent/journal"
)

// runDir is a directory with a path short enough for a socket.
func runDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tso")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// serve runs the world's control socket, and takes calls as the loop would, until the test ends.
func (w *world) serve() *client.Client {
	w.t.Helper()
	w.a.reports.looping.Store(true)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	served := make(chan error, 1)
	wg.Go(func() { served <- w.a.Serve(ctx) })
	wg.Go(func() {
		for {
			select {
			case fn := <-w.a.calls:
				w.loops.Lock()
				fn()
				w.loops.Unlock()
			case <-ctx.Done():
				return
			}
		}
	})
	w.t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			w.t.Errorf("Serve: %v", err)
		}
		wg.Wait()
		if _, err := os.Lstat(SocketPath(w.a.cfg.RunDir)); !errors.Is(err, os.ErrNotExist) {
			w.t.Errorf("the socket is left: %v", err)
		}
	})
	c := client.New(w.a.cfg.RunDir)
	w.t.Cleanup(c.Close)
	// To connect is not enough: the socket takes connections before it has its mode.
	within(w.t, 5*time.Second, "the socket answers", func() bool {
		_, err := c.Namespaces(w.t.Context())
		return err == nil
	})
	return c
}

// within waits until ok is true.
func within(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(d)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", d, what)
		}
		time.Sleep(time.Millisecond)
	}
}

func controlWorld(t *testing.T) *world {
	t.Helper()
	cfg := dedicatedOff()
	cfg.RunDir = runDir(t)
	return tunnelWorld(t, cfg)
}

func TestControlAnswersReportsAndQuestions(t *testing.T) {
	w := controlWorld(t)
	w.start(tunnelPolicy, tunnelSA)
	c := w.serve()
	got, err := c.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(w.a.Report(), got); d != "" {
		t.Errorf("the report (-agent +client):\n%s", d)
	}
	q := Question{Dst: netip.MustParseAddr("10.2.0.1"), From: netip.MustParseAddr("10.1.0.1"), Proto: 6, Port: 443, Mark: 1}
	e, err := c.Explain(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	want, err := w.a.explain(q)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, e); d != "" {
		t.Errorf("the explanation (-agent +client):\n%s", d)
	}
	if e.MTU != 1446 || e.Policy != 9 {
		t.Errorf("explanation %+v", e)
	}
	if _, err := c.Explain(t.Context(), Question{Dst: netip.MustParseAddr("2001:db8::1")}); err == nil || !strings.Contains(err.Error(), "no route to 2001:db8::1") {
		t.Errorf("no route: %v", err)
	}
	st, err := os.Stat(SocketPath(w.a.cfg.RunDir))
	if err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestQuestionsSurviveTheWire(t *testing.T) {
	for _, q := range []Question{
		{Dst: netip.MustParseAddr("10.2.0.1")},
		{Dst: netip.MustParseAddr("2001:db8::1"), From: netip.MustParseAddr("2001:db8::2"), Proto: 255, Port: 65535, Mark: 0xffffffff},
	} {
		got, err := api.ParseQuestion(q.Values())
		if err != nil || got != q {
			t.Errorf("got %+v, %v; want %+v", got, err, q)
		}
	}
}

func TestControlSaysWhatIsWrong(t *testing.T) {
	w := controlWorld(t)
	c := w.serve()
	ask := func(method, path string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "http://tsoagent"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode == http.StatusOK {
			return res.StatusCode, ""
		}
		var e struct {
			Error string `json:"error"`
		}
		if err := json.Unmarshal(body, &e); err != nil || e.Error == "" {
			t.Errorf("%s %s: the error is no JSON: %q", method, path, body)
		}
		return res.StatusCode, e.Error
	}
	for _, path := range []string{"/v1/report", "/v1/explain?dst=10.2.0.1&from=10.1.0.1"} {
		if code, text := ask(http.MethodGet, path); code != http.StatusServiceUnavailable || !strings.Contains(text, "try again in a moment") {
			t.Errorf("%s before the first plan: %d %s", path, code, text)
		}
	}
	// The policies are known, and the rest is still read: an answer could only be wrong.
	w.dumpXFRM(partPolicy, partSA)
	w.settle()
	if code, _ := ask(http.MethodGet, "/v1/explain?dst=10.3.0.1&from=10.1.0.1"); code != http.StatusServiceUnavailable {
		t.Errorf("explain before the first plan: %d", code)
	}
	w.start(tunnelPolicy, tunnelSA)
	for _, x := range []struct {
		method, path string
		code         int
		text         string
	}{
		{"GET", "/v1/report", 200, ""},
		{"GET", "/v1/report?anything=else", 200, ""},
		{"GET", "/v1/explain?dst=10.2.0.1", 200, ""},
		{"GET", "/v1/explain?dst=::ffff:10.2.0.1", 200, ""},
		{"GET", "/v1/explain?dst=10.2.0.1&mark=0x10", 200, ""},
		{"GET", "/v1/explain", 400, "dst is missing"},
		{"GET", "/v1/explain?dst=example.org", 400, `dst: "example.org" is no IP address`},
		{"GET", "/v1/explain?dst=10.2.0.0/16", 400, `dst: "10.2.0.0/16" is no IP address`},
		{"GET", "/v1/explain?dst=fe80::1%25eth0", 400, `dst: "fe80::1%eth0" is no IP address`},
		{"GET", "/v1/explain?dst=%1b%5b31m", 400, `dst: "\x1b[31m" is no IP address`},
		{"GET", "/v1/explain?dst=10.2.0.1&from=::1", 400, "dst and from are of different families"},
		{"GET", "/v1/explain?dst=10.2.0.1&from=x&proto=tcp&port=65536&mark=-1", 400,
			"from: \"x\" is no IP address\nproto: \"tcp\" is no number of 8 bits\nport: \"65536\" is no number of 16 bits\nmark: \"-1\" is no number of 32 bits"},
		{"GET", "/v1/explain?dst=2001:db8::1", 400, "the kernel finds no route to 2001:db8::1: unreachable: network is unreachable"},
		{"POST", "/v1/report", 405, ""}, {"DELETE", "/v1/explain", 405, ""}, {"PUT", "/v1/report", 405, ""},
		{"GET", "/", 404, ""}, {"GET", "/v2/report", 404, ""}, {"GET", "/v1/report/x", 404, ""},
	} {
		code, text := ask(x.method, x.path)
		if code != x.code || x.text != "" && text != x.text {
			t.Errorf("%s %s: %d %q, want %d %q", x.method, x.path, code, text, x.code, x.text)
		}
	}
}

func TestClientSaysThatNoAgentRuns(t *testing.T) {
	dir := runDir(t)
	check := func(what string) {
		t.Helper()
		_, err := client.New(dir).Report(t.Context())
		if !errors.Is(err, client.ErrNoAgent) || !strings.Contains(err.Error(), SocketPath(dir)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	check("no socket")
	leaveSocket(t, dir)
	check("a socket that a dead agent left")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	check("no directory")
}

// leaveSocket leaves a socket file as a killed agent does.
func leaveSocket(t *testing.T, dir string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: SocketPath(dir), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestSocketOfADeadAgentIsTakenOver(t *testing.T) {
	w := controlWorld(t)
	leaveSocket(t, w.a.cfg.RunDir)
	w.start()
	if _, err := w.serve().Report(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestServeSaysWhereItCannotListen(t *testing.T) {
	w := controlWorld(t)
	w.a.cfg.RunDir = filepath.Join(w.a.cfg.RunDir, "missing")
	if err := w.a.Serve(t.Context()); err == nil || !strings.Contains(err.Error(), w.a.cfg.RunDir) {
		t.Errorf("got %v", err)
	}
}

// A client that asks while the agent stops gets an answer or an error, and does not hang.
func TestQuestionWhileTheAgentStopsEnds(t *testing.T) {
	w := controlWorld(t)
	w.start()
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- w.a.Serve(ctx) }()
	c := client.New(w.a.cfg.RunDir)
	defer c.Close()
	within(t, 5*time.Second, "the socket answers", func() bool { _, err := c.Report(t.Context()); return err == nil })
	asked := make(chan error, 1)
	go func() {
		_, err := c.Explain(t.Context(), Question{Dst: netip.MustParseAddr("10.2.0.1")})
		asked <- err
	}()
	// Nobody takes calls: the loop has ended.
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	select {
	case err := <-asked:
		if err == nil {
			t.Error("an answer from a loop that does not run")
		}
	case <-time.After(5 * time.Second):
		t.Error("the question hangs")
	}
}

// Between bind and chmod nobody may connect whom the mode keeps out.
func TestSocketIsNeverOpenToOthers(t *testing.T) {
	path := SocketPath(runDir(t))
	l, err := (&net.ListenConfig{Control: bindMode}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if mode := fi.Mode().Perm(); mode&^socketMode != 0 {
		t.Errorf("bind makes it with mode %o", mode)
	}
}

func TestClientWithoutPermissionIsToldSo(t *testing.T) {
	dir := runDir(t)
	if os.Getenv("TSO_TEST_CLIENT") != "" {
		_, err := client.New(os.Getenv("TSO_TEST_CLIENT")).Report(t.Context())
		t.Logf("client: %v; ErrPermission %v, ErrNoAgent %v", err, errors.Is(err, client.ErrPermission), errors.Is(err, client.ErrNoAgent))
		return
	}
	w := tunnelWorld(t, Config{RunDir: dir})
	w.start()
	w.serve()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	out := asNobody(t, "TestClientWithoutPermissionIsToldSo", "TSO_TEST_CLIENT="+dir)
	for _, want := range []string{"is not yours to open: run it as root", "ErrPermission true, ErrNoAgent false", SocketPath(dir)} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
}

func TestSecondAgentIsRefusedWithThePid(t *testing.T) {
	newNS(t) // should it not be refused, it is not the host's namespace that it works on
	dir := runDir(t)
	j, _, err := journal.Open(dir, journal.Scope{BootID: "b", NetnsCookie: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for name, open := range map[string]func() error{
		"New": func() error {
			a, err := New(Config{RunDir: dir}, slog.New(slog.DiscardHandler), "test")
			if err == nil {
				_ = a.Close()
			}
			return err
		},
		"Restore": func() error {
			_, err := Restore(t.Context(), Config{RunDir: dir}, slog.New(slog.DiscardHandler), "test", false)
			return err
		},
	} {
		err := open()
		locked := (*journal.LockedError)(nil)
		if !errors.Is(err, ErrRunning) || !errors.As(err, &locked) || locked.PID != os.Getpid() {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// newRequest is a bare request to the control API.
func newRequest(t testing.TB, method, path string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://tsoagent"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// TestServeStoppedAtOnce: an agent that is stopped while it starts has not failed.
func TestServeStoppedAtOnce(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := serve(ctx, filepath.Join(t.TempDir(), "control.sock"), http.NewServeMux(), discard()); err != nil {
		t.Errorf("stopped before it listened: %v", err)
	}
}
