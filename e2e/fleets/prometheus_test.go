package fleets

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"tsoagent/e2e/harness"
)

const prometheusAddress = "127.0.0.1:19090"

// prometheus scrapes the agent as one of two machines, with the rules of the tree, until the test ends.
func prometheus(t *testing.T, target string) {
	t.Helper()
	host.Need(t, map[string]string{"prometheus": "prometheus"})
	dir := t.TempDir()
	var files []string
	for _, name := range []string{"alerts.yml", "fleet.yml"} { // a minute is long
		b, err := os.ReadFile("../../dashboards/" + name)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, filepath.Join(dir, name))
		if err := os.WriteFile(files[len(files)-1], []byte(strings.ReplaceAll(string(b), "interval: 1m", "interval: 250ms")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	harness.Prometheus(t, prometheusAddress, fmt.Sprintf(`global: { scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms }
rule_files: [%q, %q]
scrape_configs:
  - job_name: tsoagent
    static_configs: [{ targets: [%q], labels: { instance: one } }, { targets: [%q], labels: { instance: two } }]
`, files[0], files[1], target, target))
}

// query is the only value that an expression has, -1 for none.
func query(t *testing.T, expr string) float64 {
	t.Helper()
	res, err := http.Get("http://" + prometheusAddress + "/api/v1/query?" + url.Values{"query": {expr}}.Encode())
	if err != nil {
		return -1 // it starts
	}
	defer res.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct{ Result []struct{ Value [2]any } }
	}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil || answer.Status != "success" {
		return -1
	}
	if len(answer.Data.Result) == 0 {
		return -1
	}
	if len(answer.Data.Result) > 1 {
		t.Fatalf("%s has %d values", expr, len(answer.Data.Result))
	}
	v, err := strconv.ParseFloat(fmt.Sprint(answer.Data.Result[0].Value[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// figure is a number that docs/fleets.md says, without what groups its digits.
func figure(t *testing.T, pattern string) int {
	t.Helper()
	b, err := os.ReadFile("../../docs/fleets.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(pattern).FindStringSubmatch(string(b))
	if m == nil {
		t.Fatalf("docs/fleets.md has nothing like %s", pattern)
	}
	n, err := strconv.Atoi(strings.ReplaceAll(m[1], ",", ""))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestWhatAFleetCosts counts what a Prometheus keeps for each machine, and for all of them, and holds docs/fleets.md to it.
func TestWhatAFleetCosts(t *testing.T) {
	node(t)
	start(t, "192.0.2.1")
	// Rules fire no event, and what has none has no series: each kind of action once.
	run(t, "ip", "xfrm", "policy", "add", "src", "192.0.2.0/24", "dst", "10.4.0.0/16", "dir", "out", "tmpl", "src", "192.0.2.1", "dst", "192.0.2.2", "proto", "esp", "reqid", "1", "mode", "tunnel")
	prometheus(t, "192.0.2.1:15450")
	is := func(expr string, want float64) {
		t.Helper()
		within(t, fmt.Sprintf("%s is %v", expr, want), func() bool { return query(t, expr) == want })
	}
	is(`job:up:sum`, 2)
	is(`job_kind_cut:tsoagent_coverages:sum{kind="policy", cut!="socket"}`, 6)
	is(`sum(job_state:tsoagent_clones:sum{state="in place"})`, 6)
	is(`sum(job_state:tsoagent_holds:sum{state="in place"})`, 6)
	is(`job:tsoagent_enforcing:sum`, 2)
	within(t, "the rates", func() bool { return query(t, `count(job_le:tsoagent_reaction_seconds_bucket:rate5m)`) > 1 })

	within(t, "what is recorded for each machine", func() bool { return query(t, `count({instance="one", __name__=~"instance.*:.*"})`) >= 6 })
	each := int(query(t, `count({instance="one", __name__!~".*:.*|scrape_.*|up|ALERTS.*"})`))
	perNode := int(query(t, `count({instance="one", __name__=~"instance.*:.*"})`))
	device := int(query(t, `count({instance="one", device="n0"})`))
	all := int(query(t, `count({__name__=~"job.*:.*", instance=""})`))
	if file := os.Getenv("TSOAGENT_PAGE"); file != "" { // for a synthetic fleet
		if err := os.WriteFile(file, []byte(strings.TrimPrefix(get("192.0.2.1", "/metrics"), "200 ")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d series of a machine, %d of them of the device, %d that alerts.yml records for each, %d that fleet.yml records for all", each, device, perNode, all)
	if want := figure(t, `(\d+) series for a machine`); each > want || each < want*3/4 {
		t.Errorf("docs/fleets.md says %d series for a machine, and it has %d", want, each)
	}
	if want := figure(t, `(\d+) that alerts\.yml records`); perNode > want || perNode < want*3/4 {
		t.Errorf("docs/fleets.md says %d that alerts.yml records, and there are %d", want, perNode)
	}
	if want := figure(t, `(\d+) of them for each device`); device > want || device < want*3/4 {
		t.Errorf("docs/fleets.md says %d of them for each device, and it has %d", want, device)
	}
	if want := figure(t, `at most (\d+) that fleet\.yml records`); all > want {
		t.Errorf("docs/fleets.md says at most %d that fleet.yml records, and there are %d", want, all)
	}
	if got := query(t, `count({__name__=~"job.*:.*", instance!=""})`); got != -1 {
		t.Errorf("%v series of a fleet name a machine", got)
	}
}
