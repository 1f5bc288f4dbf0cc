package metrics

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"tsoagent/agent"
	"tsoagent/agent/api"
	"tsoagent/agent/flows"
)

var update = flag.Bool("update", false, "write the metrics page to testdata")

// fixture is a Source with a value for each metric.
type fixture struct{}

func (fixture) Status() agent.FleetStatus {
	return agent.FleetStatus{
		Since: time.Unix(1790000000, 0), Configured: time.Unix(1790000100, 250_000_000), ReloadError: "a.yaml:1: wrong",
		Namespaces: []agent.NamespaceReport{
			{Name: "host", State: agent.NetnsFollowed}, {Name: "blue", State: agent.NetnsFollowed}, {Name: "red", State: agent.NetnsWaiting},
		},
	}
}

func (fixture) Observations() []agent.Observation {
	at := time.Unix(1800000000, 500_000_000)
	policy := func(cut string, mtu int) agent.CoverageReport { return agent.CoverageReport{Cut: cut, MTU: mtu} }
	maybe, gone := policy("none", 1446), policy("device", 1446)
	maybe.Maybe, gone.Gone = true, true
	var busy agent.Tally
	busy.Actions[agent.ActHold] = [2]uint64{6, 1}
	busy.Actions[agent.ActUnlock][agent.Done] = 2
	busy.Reactions[2], busy.Reactions[len(agent.ReactionBounds)], busy.ReactionSum = 3, 1, 12500*time.Millisecond
	return []agent.Observation{
		{Report: &agent.Report{
			Mode: agent.Enforce, Paused: &api.Paused{}, Links: 7, Routes: 35, Policies: 8, SAs: 6, Findings: []string{"look"}, Stale: []string{"xfrm"},
			Coverages: []agent.CoverageReport{
				policy("device", 1446), policy("device", 1438), policy("socket", 1446), policy("none", 0), maybe, gone,
				{Key: "tcp-md5", Cut: "none"}, {Key: "tcp-ao", Cut: "none"},
			},
			Holds: []agent.HoldReport{
				{Device: "ipsec1", Feature: "tx-tcp-segmentation", State: agent.StateInPlace},
				{Device: "ipsec1", Feature: "tx-tcp6-segmentation", State: agent.StateContested},
				{Device: "ipsec2", Feature: "tx-tcp-segmentation", State: agent.StateReleasing},
			},
			Locks: []agent.LockReport{
				{Route: "10.2.0.0/16", MTU: 1446, Devices: []string{"ipsec1"}, State: agent.StateInPlace},
				{Route: "10.4.0.0/16", MTU: 1438, Devices: []string{"ipsec1", "ipsec2"}, State: agent.StateInPlace},
			},
			Clones: []agent.CloneReport{
				{Dst: "10.3.0.0/16", MTU: 1422, Devices: []string{"nic1"}, State: agent.StateInPlace},
				{Dst: "10.3.7.0/24", Throw: true, State: agent.StateInPlace},
			},
			Rules:      []agent.RuleReport{{Family: "ipv4", State: agent.StateInPlace}},
			Lanes:      []agent.LaneReport{{Device: "nic1", State: agent.StateReleasing}},
			Clamps:     []agent.ClampReport{{Dst: "10.3.0.0/16", State: agent.StateInPlace}},
			DeviceMTUs: []agent.DeviceMTUReport{{Device: "ipsec1", State: agent.StateContested}},
			Counters:   agent.Counters{Rounds: 99, Repairs: 3},
			Sources: []agent.SourceReport{
				{Source: "xfrm", Events: 1000, Dumps: 2, Overruns: 1, Undecodable: 1},
				{Source: "sockopt", Dumps: 12, Seconds: 0.25, Sockets: 90},
			},
			Diagnosis: &agent.Diagnosis{
				At: at, Connections: 40, Lost: 9, MoreCollateral: 3,
				Collateral: []flows.Collateral{
					{Listener: "0.0.0.0:179", Port: 179, Lost: 2}, {Listener: "[::]:179", Port: 179, Lost: 1}, {Listener: "0.0.0.0:646", Port: 646, Lost: 1}, {Lost: 2},
				},
			},
		}, Figures: &agent.Figures{
			Tally: busy, JournalEntries: 11, RestingLocks: 1, WithdrawnLocks: 2, StuckRestores: 1, ContestedClamp: true,
			Features: []agent.ManagedFeature{{Device: "ipsec1", Feature: "tx-tcp-segmentation"}, {Device: "ipsec1", Feature: "tx-tcp6-segmentation", Active: true}},
		}},
		{
			Report:  &agent.Report{Netns: "blue", Mode: agent.Observe, Diagnosis: &agent.Diagnosis{At: at, Unreadable: "no BTF"}},
			Figures: &agent.Figures{},
		},
	}
}

// only is a Source of one report.
type only agent.Observation

func (only) Status() agent.FleetStatus           { return agent.FleetStatus{} }
func (o only) Observations() []agent.Observation { return []agent.Observation{agent.Observation(o)} }

// scrape serves the collector on a port of the kernel's choice, and reads a page.
func scrape(t *testing.T, c prometheus.Collector) string {
	t.Helper()
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, l, "", c, Health{}, slog.New(slog.DiscardHandler)) }()
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
	for _, path := range []string{"/debug/pprof/", "/page/index.html", "/index.html", "/v1/report"} {
		if code, _ := get(path); code != http.StatusNotFound {
			t.Errorf("there is more than metrics and the page: %s: %d", path, code)
		}
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
	got := scrape(t, NewCollector("v1.2.3", fixture{}))
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
	c := NewCollector("v1", fixture{})
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c)
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
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

// TestLabelsAreBounded has a namespace with more devices, MTUs and whatever else than a label may have.
func TestLabelsAreBounded(t *testing.T) {
	var r agent.Report
	var f agent.Figures
	for i := range 500 {
		dev := fmt.Sprintf("dev%03d", i)
		r.Coverages = append(r.Coverages, agent.CoverageReport{MTU: 1000 + i, Src: dev, Dst: dev, Cut: "device"})
		r.Holds = append(r.Holds, agent.HoldReport{Device: dev, Feature: "tx-tcp-segmentation", State: agent.StateInPlace})
		f.Features = append(f.Features, agent.ManagedFeature{Device: dev, Feature: "tx-tcp-segmentation", Active: true})
		r.Locks = append(r.Locks, agent.LockReport{Route: dev, Devices: []string{dev, "l" + dev}, MTU: uint32(1000 + i), State: agent.StateInPlace})
		r.Clones = append(r.Clones, agent.CloneReport{Dst: dev, Devices: []string{"c" + dev}, MTU: 1400, State: agent.StateInPlace})
		r.Rules = append(r.Rules, agent.RuleReport{Text: dev, State: agent.StateInPlace})
	}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(NewCollector("v1", only{&r, &f}))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sums := map[string]float64{}
	for _, f := range families {
		if n := len(f.GetMetric()); n > MaxDevices+1 {
			t.Errorf("%s has %d series", f.GetName(), n)
		}
		for _, m := range f.GetMetric() {
			sums[f.GetName()] += m.GetGauge().GetValue()
		}
	}
	// None is lost. A lock is one on each of its devices.
	want := map[string]float64{CoverageMTUs: 500, Coverages: 500, Holds: 500, Locks: 1000, Clones: 500, FeatureActive: MaxDevices}
	for name, n := range want {
		if sums[name] != n {
			t.Errorf("%s: %v in all, want %v", name, sums[name], n)
		}
	}
}

// A device's name is bytes: those that are no UTF-8 can't be a label as they are, and one such device must not cost the whole page. Others
// would be obeyed by the terminal of who looks at it.
func TestNamesThatAreNoText(t *testing.T) {
	const odd = "n\xffx\"1"
	const wild = "a\x1b[31m\u009b\x7f\\é<"
	r := agent.Report{
		Holds:  []agent.HoldReport{{Device: odd, Feature: "tx-tcp-segmentation", State: agent.StateInPlace}},
		Locks:  []agent.LockReport{{Route: "10.2.0.0/16", MTU: 1400, Devices: []string{odd, "n\xfe", wild}, State: agent.StateInPlace}},
		Clones: []agent.CloneReport{{Dst: "10.3.0.0/16", MTU: 1300, Devices: []string{odd}, State: agent.StateInPlace}},
	}
	f := agent.Figures{Features: []agent.ManagedFeature{{Device: odd, Feature: "tx-tcp-segmentation", Active: true}}}
	page := scrape(t, NewCollector("v1", only{&r, &f}))
	for _, want := range []string{
		`tsoagent_holds{device="n\\xffx\"1",netns="host",state="in place"} 1`, `tsoagent_feature_active{device="n\\xffx\"1",feature="tx-tcp-segmentation",netns="host"} 1`,
		`tsoagent_locks{device="n\\xfe",netns="host",state="in place"} 1`, `tsoagent_locks{device="a\\x1b[31m\\u009b\\x7f\\é<",netns="host",state="in place"} 1`, `tsoagent_lock_mtu_min_bytes{device="n\\xffx\"1",netns="host"} 1300`,
	} {
		if !strings.Contains(page, want+"\n") {
			t.Errorf("the page doesn't have %s", want)
		}
	}
}

// TestNothingThatIsCoveredIsNamed has addresses, selectors and keys in a report: none may be on the page.
func TestNothingThatIsCoveredIsNamed(t *testing.T) {
	page := scrape(t, NewCollector("v1.2.3", fixture{}))
	for _, secret := range []string{"10.2.0.0", "10.3.0.0", "0.0.0.0", "a.yaml", "no BTF", "look\""} {
		if strings.Contains(page, secret) {
			t.Errorf("%q is on the page", secret)
		}
	}
}

// TestDocument holds docs/metrics.md to the names and their labels, both ways.
func TestDocument(t *testing.T) {
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string][]string{}
	words := func(cell string) (out []string) {
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
			out = append(out, m[1])
		}
		return out
	}
	for _, row := range regexp.MustCompile("(?m)^\\| (`tsoagent_[^|]*)\\|([^|]*)\\|").FindAllStringSubmatch(string(b), -1) {
		for _, name := range words(row[1]) {
			documented[name] = words(row[2])
		}
	}
	defined := map[string][]string{}
	for _, name := range Names {
		defined[name] = metrics[name].labels
	}
	if d := cmp.Diff(defined, documented); d != "" {
		t.Errorf("docs/metrics.md (-code +document):\n%s", d)
	}
	for _, name := range named(string(b)) {
		if !slices.Contains(Names, name) && name != "tsoagent_connections" {
			t.Errorf("docs/metrics.md names %s, which is no metric", name)
		}
	}
}

// TestAClientThatGoesAwayIsNoError has one hang up in the middle of the page.
func TestAClientThatGoesAwayIsNoError(t *testing.T) {
	var logged strings.Builder
	log := slog.New(warnings{slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})})
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(NewCollector("v1", fixture{}))
	h := promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorLog: gathering{log}})
	w := &goneAway{ResponseRecorder: httptest.NewRecorder()}
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.writes == 0 || logged.Len() > 0 {
		t.Errorf("%d writes; logged: %s", w.writes, logged.String())
	}
	gathering{log}.Println("error gathering metrics:", errors.New("two of a kind"))
	if got := logged.String(); !strings.Contains(got, `level=ERROR msg="metrics can't be sent" err="error gathering metrics: two of a kind"`) {
		t.Errorf("a mistake of ours is logged as %q", got)
	}
}

// goneAway is a client that does not read.
type goneAway struct {
	*httptest.ResponseRecorder
	writes int
}

func (g *goneAway) Write([]byte) (int, error) {
	g.writes++
	return 0, errors.New("broken pipe")
}

// TestPageLoadsNothingFromElsewhere reads the page's files: no address of another host, and no way for text to become markup.
func TestPageLoadsNothingFromElsewhere(t *testing.T) {
	used := map[string]bool{}
	for name, kind := range map[string]string{"/": "text/html; charset=utf-8", "/status.js": "text/javascript; charset=utf-8", "/status.css": "text/css; charset=utf-8"} {
		w := httptest.NewRecorder()
		file := strings.TrimPrefix(name, "/")
		if file == "" {
			file = "index.html"
		}
		pageHandler(file).ServeHTTP(w, httptest.NewRequest(http.MethodGet, name, nil))
		body := w.Body.String()
		if w.Code != http.StatusOK || w.Header().Get("Content-Type") != kind || !strings.HasPrefix(w.Header().Get("Content-Security-Policy"), "default-src 'none'; ") {
			t.Errorf("%s: %d %v", name, w.Code, w.Header())
		}
		for _, bad := range []string{"http:", "https:", "//cdn", "@import", "innerHTML", "insertAdjacentHTML", "document.write", "eval(", " onload=", " style="} {
			if strings.Contains(body, bad) {
				t.Errorf("%s has %q", name, bad)
			}
		}
		for _, m := range regexp.MustCompile(`"([a-z_]+)"`).FindAllStringSubmatch(body, -1) {
			used["tsoagent_"+m[1]] = true
		}
	}
	// What it shows exists, and it shows what matters.
	for _, name := range []string{
		BuildInfo, StartTimestamp, ReloadSuccess, Namespaces, Enforcing, Paused, Degraded, Findings, SourceStale, SourceEvents, SourceOverruns, Coverages,
		CoverageMTUs, Holds, FeatureActive, Locks, Clones, LockMTUMin, LockMTUMax, Contested, RestoresPending, Actions, Connections, ConnectionsLostOffload,
	} {
		if !used[name] {
			t.Errorf("the page doesn't show %s", name)
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
	if err := Serve(t.Context(), l, file, NewCollector("", fixture{}), Health{}, slog.New(slog.DiscardHandler)); err == nil || errors.Is(err, http.ErrServerClosed) {
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
	go func() {
		served <- Serve(ctx, l, file, NewCollector("v1", fixture{}), Health{}, slog.New(slog.DiscardHandler))
	}()
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
