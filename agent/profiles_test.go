package agent

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
)

// getLocal asks a control socket for a path.
func getLocal(t *testing.T, dir, path string) (code int, body []byte) {
	t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", SocketPath(dir))
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://tsoagent"+path, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, body
}

// everyProfile are some of the names, those with handlers of their own among them.
var everyProfile = []string{"", "heap", "allocs", "goroutine", "profile?seconds=1", "trace?seconds=0.1"}

func TestRootTakesProfiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: only root may take profiles")
	}
	dir := runDir(t)
	w := tunnelWorld(t, Config{RunDir: dir})
	w.start()
	w.serve()
	for _, name := range everyProfile {
		code, body := getLocal(t, dir, profilesPath+name)
		if code != http.StatusOK || len(body) == 0 {
			t.Errorf("%s: status %d, %d bytes", name, code, len(body))
		}
		if name == "heap" || strings.HasPrefix(name, "profile") {
			if _, err := gzip.NewReader(bytes.NewReader(body)); err != nil {
				t.Errorf("%s is no profile: %v", name, err)
			}
		}
	}
	if code, _ := getLocal(t, dir, profilesPath+"nothing"); code != http.StatusNotFound {
		t.Errorf("a profile that is not there: status %d", code)
	}
}

func TestOnlyRootTakesProfiles(t *testing.T) {
	if dir := os.Getenv("TSO_TEST_PROFILES"); dir != "" {
		for _, name := range everyProfile {
			code, body := getLocal(t, dir, profilesPath+name)
			t.Logf("%q: %d %s", name, code, body)
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
	out := asNobody(t, "TestOnlyRootTakesProfiles", "TSO_TEST_PROFILES="+dir)
	if n := strings.Count(out, `: 403 {"error":"only root may do this, and you are uid 65534`); n != len(everyProfile) {
		t.Errorf("%d of %d are refused:\n%s", n, len(everyProfile), out)
	}
}
