package service

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tsoagent/e2e/harness"
)

const prometheusAddress = "127.0.0.1:19090"

// prometheus scrapes an agent, with the rules, until the test ends.
func prometheus(t *testing.T, a *agent) {
	t.Helper()
	rules, err := filepath.Abs("../../dashboards/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	harness.Prometheus(t, prometheusAddress, fmt.Sprintf(`global: { scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms }
rule_files: [%q]
scrape_configs: [{ job_name: tsoagent, static_configs: [{ targets: [%q] }] }]
`, rules, a.address))
	within(t, "Prometheus is ready", func() bool {
		res, err := http.Get("http://" + prometheusAddress + "/-/ready")
		return err == nil && res.Body.Close() == nil && res.StatusCode == http.StatusOK
	})
}

// ask is an answer of Prometheus's API.
func ask(t *testing.T, path string, query url.Values, into any) {
	t.Helper()
	res, err := http.Get("http://" + prometheusAddress + "/api/v1/" + path + "?" + query.Encode())
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: into}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		t.Fatal(err)
	}
	if answer.Status != "success" {
		t.Fatalf("%s %s: %s", path, query, answer.Error)
	}
}

// value is one series of an answer.
type value struct {
	Metric map[string]string
	Value  [2]any
}

func (v value) number() string { return fmt.Sprint(v.Value[1]) }

func query(t *testing.T, expr string) []value {
	t.Helper()
	var data struct{ Result []value }
	ask(t, "query", url.Values{"query": {expr}}, &data)
	return data.Result
}

// TestPrometheusScrapesAnAgent has a real one read what the agent does, evaluate all rules, and answer what the dashboard asks.
func TestPrometheusScrapesAnAgent(t *testing.T) {
	host.Need(t, map[string]string{"prometheus": "prometheus", "promtool": "prometheus", "ip": "iproute2"})
	network(t)
	cover(t, "10.3.0.0/16")
	cover(t, "2001:db8:3::/48")
	a := run(t, "--shared-nics", "off") // so that something is held off
	prometheus(t, a)
	is := func(expr, want string) {
		t.Helper()
		within(t, expr+" is "+want, func() bool { r := query(t, expr); return len(r) == 1 && r[0].number() == want })
	}
	is(`up{job="tsoagent"}`, "1")
	is(`instance_netns_kind:tsoagent_coverages:sum{kind="policy"}`, "2")
	is(`sum(tsoagent_clones{device="n0", state="in place"})`, "2")
	is(`tsoagent_lock_mtu_min_bytes{device="n0"}`, "1400")
	is(`tsoagent_reaction_seconds_count`, "0") // the start is none
	cover(t, "10.4.0.0/16")
	is(`instance_netns:tsoagent_mtus_in_place:sum`, "3")
	is(`tsoagent_reaction_seconds_count >= bool 1`, "1")
	is(`tsoagent_reaction_seconds_sum > bool 0`, "1")
	is(`tsoagent_actions_total{action="clone", result="done"}`, "3")
	is(`sum(tsoagent_actions_total{result="failed"})`, "0")
	is(`tsoagent_source_events_total{source="xfrm"} > bool 0`, "1")
	ip(t, "xfrm policy flush")
	is(`sum(tsoagent_actions_total{action="delete_clone"})`, "3")
	is(`tsoagent_journal_entries`, "1") // of our tables

	// Each rule is evaluated without an error, and none fires.
	type group struct {
		Rules []struct{ Name, Health, LastError, State string }
	}
	var groups struct{ Groups []group }
	within(t, "all rules are evaluated", func() bool {
		groups.Groups = nil
		ask(t, "rules", nil, &groups)
		n, unknown := 0, 0
		for _, g := range groups.Groups {
			for _, r := range g.Rules {
				if n++; r.Health == "unknown" {
					unknown++
				}
			}
		}
		return n > 0 && unknown == 0
	})
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			if r.Health != "ok" || r.State == "firing" {
				t.Errorf("rule %s: %s %s %s", r.Name, r.Health, r.State, r.LastError)
			}
		}
	}

	// What the dashboard asks has an answer.
	cover(t, "10.3.0.0/16")
	is(`instance_netns_kind:tsoagent_coverages:sum{kind="policy"}`, "1")
	b, err := os.ReadFile("../../dashboards/tsoagent.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &dashboard); err != nil {
		t.Fatal(err)
	}
	// The doctor asks for a diagnosis: the agent's own first one comes after a minute. No connection has lost anything here.
	empty := map[string]bool{"Connections that lost offload to somebody else's key": true}
	if out, err := exec.Command(mustStage(t)+"/usr/bin/tsoctl", "doctor", "--run-dir", a.dir).CombinedOutput(); err != nil {
		t.Logf("tsoctl doctor: %v\n%s", err, out) // findings are no failure
	}
	within(t, "a diagnosis", func() bool { return len(query(t, `tsoagent_connections_readable`)) == 1 })
	empty["Connections"] = query(t, `tsoagent_connections_readable`)[0].number() == "0"
	is(`sum(tsoagent_holds{device="n0", state="in place"}) > bool 0`, "1")
	fill := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$netns", ".*")
	for _, p := range dashboard.Panels {
		found := 0
		for _, target := range p.Targets {
			found += len(query(t, fill.Replace(target.Expr)))
		}
		if len(p.Targets) > 0 && found == 0 && !empty[p.Title] {
			t.Errorf("panel %q shows nothing", p.Title)
		}
	}
	page := filepath.Join(t.TempDir(), "page")
	_, text := a.get("/metrics")
	if err := os.WriteFile(page, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(page)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = in
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("promtool check metrics: %v: %s", err, out)
	}
}
