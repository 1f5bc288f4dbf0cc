package metrics

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.yaml.in/yaml/v3"

	"tsoagent/agent"
	"tsoagent/agent/flows"
)

var update = flag.Bool("update", false, "write the metrics page to testdata")

func reports() []*agent.Report {
	at := time.Unix(1800000000, 500_000_000)
	return []*agent.Report{
		{Sources: []agent.SourceReport{{Source: "xfrm", Dumps: 1}, {Source: "sockopt", Dumps: 12, Seconds: 0.25, Sockets: 90}}, Diagnosis: &agent.Diagnosis{
			At: at, Connections: 40, Lost: 9, MoreCollateral: 3,
			Collateral: []flows.Collateral{
				{Listener: "0.0.0.0:179", Port: 179, Lost: 2}, {Listener: "[::]:179", Port: 179, Lost: 1}, {Listener: "0.0.0.0:646", Port: 646, Lost: 1}, {Lost: 2},
			},
		}},
		{Netns: "blue", Diagnosis: &agent.Diagnosis{At: at, Unreadable: "no BTF"}},
		{Netns: "green", Diagnosis: &agent.Diagnosis{At: at, Connections: 7}},
		{Netns: "young", Sources: []agent.SourceReport{{Source: "sockopt", Dumps: 1, Seconds: 0.004}}},
	}
}

// scrape serves the collector on a port of the kernel's choice, and reads a page.
func scrape(t *testing.T, c prometheus.Collector) string {
	t.Helper()
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, l, "", c, slog.New(slog.DiscardHandler)) }()
	get := func(path string) (int, string) {
		res, err := http.Get(fmt.Sprintf("http://%s%s", l.Addr(), path))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	code, page := get("/metrics")
	if code != http.StatusOK {
		t.Errorf("%d: %s", code, page)
	}
	if code, _ := get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("there is more than metrics: %d", code)
	}
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	return page
}

func TestPageGolden(t *testing.T) {
	const golden = "testdata/page.prom"
	got := scrape(t, NewCollector("v1.2.3", reports))
	got = strings.ReplaceAll(got, runtime.Version(), "GOVERSION")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("-update writes it (-want +got):\n%s", d)
	}
}

func TestNamesAndLint(t *testing.T) {
	c := NewCollector("v1", reports)
	problems, err := testutil.CollectAndLint(c)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		got = append(got, f.GetName())
	}
	if d := cmp.Diff(slices.Sorted(slices.Values(Names)), got); d != "" {
		t.Errorf("Names are not what is served (-names +served):\n%s", d)
	}
}

// TestDocument holds docs/metrics.md to the names, both ways.
func TestDocument(t *testing.T) {
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(slices.Sorted(slices.Values(Names)), named(string(b))); d != "" {
		t.Errorf("docs/metrics.md (-code +document):\n%s", d)
	}
}

// named are the metrics that a text names.
func named(text string) []string {
	found := regexp.MustCompile(`tsoagent_\w+`).FindAllString(text, -1)
	slices.Sort(found)
	return slices.Compact(found)
}

const alerts = "../../dashboards/alerts.yml"

func TestAlertsNameMetricsThatExist(t *testing.T) {
	b, err := os.ReadFile(alerts)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	dec := yaml.NewDecoder(strings.NewReader(string(b)))
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			n++
			names := named(r.Expr)
			if len(names) == 0 || r.Alert == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" || r.Labels["severity"] == "" {
				t.Errorf("rule %+v is not whole", r)
			}
			for _, name := range names {
				if !slices.Contains(Names, name) {
					t.Errorf("alert %s names %s, which is no metric", r.Alert, name)
				}
			}
		}
	}
	if n == 0 {
		t.Error("there is no rule")
	}
}

// TestPromtool has Prometheus itself look at the page and at the rules, which also have to fire.
func TestPromtool(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is missing (package prometheus)")
	}
	page, err := os.Open("testdata/page.prom")
	if err != nil {
		t.Fatal(err)
	}
	defer page.Close()
	for _, args := range [][]string{{"check", "metrics"}, {"check", "rules", alerts}, {"test", "rules", "testdata/alerts_test.yml"}} {
		cmd := exec.CommandContext(t.Context(), promtool, args...)
		cmd.Stdin = page
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

func TestWhatCannotBeServedIsSaid(t *testing.T) {
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), l.Addr().String()); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("an address that is taken: %v", err)
	}
	file := filepath.Join(t.TempDir(), "web.yml")
	if err := CheckWebConfig(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a web configuration that is not there: %v", err)
	}
	if err := os.WriteFile(file, []byte("basic_auth_users:\n  a: not a hash\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CheckWebConfig(file); err == nil {
		t.Error("a password in the clear is taken for a hash")
	}
	if err := Serve(t.Context(), l, file, NewCollector("", reports), slog.New(slog.DiscardHandler)); err == nil || errors.Is(err, http.ErrServerClosed) {
		t.Errorf("served with a wrong web configuration: %v", err)
	}
	if err := CheckWebConfig(""); err != nil {
		t.Errorf("none: %v", err)
	}
}

// With a web configuration, who has no password gets nothing.
func TestWebConfigIsObeyed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "web.yml")
	// The hash of "secret", by bcrypt with cost 4.
	if err := os.WriteFile(file, []byte("basic_auth_users:\n  a: $2a$04$KGBh43Zc0F2gsR2vK1eUr.ExmeU3xtGATtMv.ub0wTZTkFZer7qlC\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, l, file, NewCollector("v1", reports), slog.New(slog.DiscardHandler)) }()
	for password, want := range map[string]int{"secret": http.StatusOK, "wrong": http.StatusUnauthorized, "": http.StatusUnauthorized} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/metrics", l.Addr()), nil)
		if err != nil {
			t.Fatal(err)
		}
		if password != "" {
			req.SetBasicAuth("a", password)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("password %q: %d, want %d", password, res.StatusCode, want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
