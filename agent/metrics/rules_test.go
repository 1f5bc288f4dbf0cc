package metrics

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// named are the metrics that a text names. Of a histogram the series are its own.
func named(text string) []string {
	found := regexp.MustCompile(`\btsoagent_\w+`).FindAllString(text, -1)
	for i, name := range found {
		if base, ok := strings.CutSuffix(name, "_bucket"); ok {
			found[i] = base
		} else if base, ok := strings.CutSuffix(name, "_count"); ok {
			found[i] = base
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

const (
	alerts    = "../../dashboards/alerts.yml"
	fleet     = "../../dashboards/fleet.yml"
	dashboard = "../../dashboards/tsoagent.json"

	fleetDashboard = "../../dashboards/tsoagent-fleet.json"
)

// rule is a recording or an alerting rule.
type rule struct {
	Record, Alert, Expr, For string
	Labels, Annotations      map[string]string
}

func rules(t *testing.T) []rule { t.Helper(); return rulesOf(t, alerts) }

func rulesOf(t *testing.T, name string) (out []rule) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name, Interval string
			Rules          []rule
		}
	}
	dec := yaml.NewDecoder(strings.NewReader(string(b)))
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		out = append(out, g.Rules...)
	}
	if len(out) == 0 {
		t.Fatal("there is no rule")
	}
	return out
}

// mustExist fails if an expression uses a metric, a record or a label that is not there.
func mustExist(t *testing.T, where, expr string, records []string) {
	t.Helper()
	inRecords := regexp.MustCompile(`\w+:\w+:\w+`)
	names := named(inRecords.ReplaceAllString(expr, ""))
	for _, name := range names {
		if !slices.Contains(Names, name) {
			t.Errorf("%s names %s, which is no metric", where, name)
		}
	}
	known := []string{"instance", "job", "le", "__name__"}
	for _, record := range inRecords.FindAllString(expr, -1) {
		if names = append(names, record); !slices.Contains(records, record) {
			t.Errorf("%s names %s, which no rule records", where, record)
		}
		level, _, _ := strings.Cut(record, ":")
		known = append(known, strings.Split(level, "_")...)
	}
	if len(names) == 0 && !strings.Contains(expr, "up{") {
		t.Errorf("%s has nothing of ours: %s", where, expr)
	}
	for _, name := range names {
		known = append(known, metrics[name].labels...)
	}
	var used []string
	for _, m := range regexp.MustCompile(`by \(([^)]*)\)`).FindAllStringSubmatch(expr, -1) {
		used = append(used, strings.Split(m[1], ", ")...)
	}
	for _, m := range regexp.MustCompile(`(\w+)(?:=~|!=|!~|=)"`).FindAllStringSubmatch(expr, -1) {
		used = append(used, m[1])
	}
	for _, label := range used {
		if !slices.Contains(known, label) {
			t.Errorf("%s uses the label %s, which none of %v has", where, label, names)
		}
	}
}

func recorded(list []rule) (out []string) {
	for _, r := range list {
		if r.Record != "" {
			out = append(out, r.Record)
		}
	}
	return out
}

func TestAlertsNameMetricsThatExist(t *testing.T) {
	for name, tests := range map[string]string{alerts: "testdata/alerts_test.yml", fleet: "testdata/fleet_test.yml"} {
		t.Run(name, func(t *testing.T) { areTested(t, rulesOf(t, name), tests) })
	}
}

// TestRulesOfFleetsDoNotGrow wants what a fleet's rules record to have labels only whose values don't come with machines, devices,
// namespaces or peers.
func TestRulesOfFleetsDoNotGrow(t *testing.T) {
	bounded := []string{"job", "version", "kind", "cut", "state", "source", "action", "le"}
	for _, r := range rulesOf(t, fleet) {
		if r.Record == "" {
			continue
		}
		outer := regexp.MustCompile(`^(?:sum|count) by \(([^)]*)\) \(`).FindStringSubmatch(r.Expr)
		if outer == nil {
			t.Errorf("%s is no sum: %s", r.Record, r.Expr)
			continue
		}
		level, _, _ := strings.Cut(r.Record, ":")
		labels := strings.Split(outer[1], ", ")
		if level != strings.Join(labels, "_") {
			t.Errorf("%s is by %v", r.Record, labels)
		}
		for _, label := range labels {
			if !slices.Contains(bounded, label) {
				t.Errorf("%s grows with %s", r.Record, label)
			}
		}
	}
}

func areTested(t *testing.T, list []rule, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	tests := string(b)
	for _, r := range list {
		if r.Record != "" {
			mustExist(t, r.Record, r.Expr, recorded(list))
			if !strings.Contains(tests, r.Record) {
				t.Errorf("%s has no test in %s", r.Record, file)
			}
			continue
		}
		if r.Alert == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" || r.Labels["severity"] == "" {
			t.Errorf("rule %+v is not whole", r)
		}
		mustExist(t, r.Alert, r.Expr, recorded(list))
		// Once it is to be silent, and once to fire.
		if n := strings.Count(tests, "alertname: "+r.Alert+"\n"); n < 2 {
			t.Errorf("%s has %d tests in %s", r.Alert, n, file)
		}
	}
}

func needPromtool(t *testing.T) string {
	t.Helper()
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is missing (package prometheus)")
	}
	return promtool
}

// TestPromtool has Prometheus itself look at the page and at the rules, which also have to fire.
func TestPromtool(t *testing.T) {
	promtool := needPromtool(t)
	page, err := os.Open("testdata/page.prom")
	if err != nil {
		t.Fatal(err)
	}
	defer page.Close()
	for _, args := range [][]string{{"check", "metrics"}, {"check", "rules", alerts}, {"test", "rules", "testdata/alerts_test.yml"}, {"check", "rules", fleet}, {"test", "rules", "testdata/fleet_test.yml"}} {
		cmd := exec.CommandContext(t.Context(), promtool, args...)
		cmd.Stdin = page
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}
