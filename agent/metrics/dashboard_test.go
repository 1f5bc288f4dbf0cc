package metrics

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDashboard holds Grafana's dashboard to the metrics.
func TestDashboard(t *testing.T) {
	shown, _ := holdDashboard(t, dashboard, recorded(rules(t)))
	for _, name := range []string{
		Coverages, CoverageMTUs, Holds, FeatureActive, Locks, Clones, LockMTUMin, LockMTUMax, Reaction, Contested, RestoresPending,
		ConnectionsLostOffload, Degraded, Actions, SourceEvents, SourceOverruns, SourceResyncs,
	} {
		if !slices.Contains(shown, name) {
			t.Errorf("no panel shows %s", name)
		}
	}
}

// TestDashboardOfFleets wants nothing asked that is not recorded, as each machine would be looked at for it, and each record shown.
func TestDashboardOfFleets(t *testing.T) {
	records := recorded(rulesOf(t, fleet))
	_, exprs := holdDashboard(t, fleetDashboard, records)
	all := strings.Join(exprs, "\n")
	for _, record := range records {
		if !strings.Contains(all, record+"{") && record != "job:tsoagent_config_last_reload_successful:sum" && record != "job:tsoagent_connections:sum" {
			t.Errorf("no panel shows %s", record)
		}
		all = strings.ReplaceAll(all, record, "")
	}
	if names := named(all); len(names) > 0 {
		t.Errorf("it asks each machine for %v", names)
	}
}

// holdDashboard holds a dashboard to the metrics and records, and returns which it names and its expressions. What a legend names has to be in
// its expression.
func holdDashboard(t *testing.T, file string, records []string) (shown, exprs []string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var d grafana
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		t.Fatalf("Grafana would pass over what it doesn't know: %v", err)
	}
	if len(d.UID) < 8 || len(d.UID) > 40 || d.Title == "" || d.SchemaVersion < 36 {
		t.Errorf("title %q, uid %q, schema %d", d.Title, d.UID, d.SchemaVersion)
	}
	variables := []string{"__rate_interval"}
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
		for _, name := range named(v.Definition) {
			if !slices.Contains(Names, name) {
				t.Errorf("the variable %s is of %s, which is no metric", v.Name, name)
			}
		}
	}
	ids, taken := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%q lies over %q, or beyond the edge", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Title == "" || p.Description == "" || p.Datasource.UID != "${datasource}" || len(p.Targets) == 0 {
			t.Errorf("panel %d (%q) is not whole", p.ID, p.Title)
		}
		for _, wrong := range p.wrong() {
			t.Errorf("panel %q: %s", p.Title, wrong)
		}
		for _, target := range p.Targets {
			mustExist(t, p.Title, target.Expr, records)
			shown = append(shown, named(target.Expr)...)
			exprs = append(exprs, target.Expr)
			for _, m := range regexp.MustCompile(`{{(\w+)}}`).FindAllStringSubmatch(target.LegendFormat, -1) {
				by := regexp.MustCompile(`by \(([^)]*)\)`).FindStringSubmatch(target.Expr)
				if len(by) > 1 && !slices.Contains(strings.Split(by[1], ", "), m[1]) {
					t.Errorf("%s: the legend has {{%s}}, and %s doesn't keep it", p.Title, m[1], target.Expr)
				}
			}
			for _, m := range regexp.MustCompile(`\$(\w+)`).FindAllStringSubmatch(target.Expr, -1) {
				if !slices.Contains(variables, m[1]) {
					t.Errorf("%s: there is no variable $%s", p.Title, m[1])
				}
			}
		}
	}
	promtool := needPromtool(t)
	asked := filepath.Join(t.TempDir(), "rules.yml")
	var text strings.Builder
	text.WriteString("groups:\n  - name: dashboard\n    rules:\n")
	for i, e := range exprs {
		fmt.Fprintf(&text, "      - record: r%d\n        expr: %q\n", i, strings.ReplaceAll(e, "$__rate_interval", "5m"))
	}
	if err := os.WriteFile(asked, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), promtool, "check", "rules", asked).CombinedOutput(); err != nil {
		t.Errorf("promtool doesn't like the expressions: %v\n%s", err, out)
	}
	return shown, exprs
}

// grafana is a dashboard, with those fields of Grafana's own description (kinds/dashboard/dashboard_kind.cue in its repository, and the options of
// each kind of panel) that ours uses. Grafana takes a field that it doesn't know without a word, so a misspelt one shows here only.
type grafana struct {
	Title, UID, Description, Timezone, Refresh string
	Tags                                       []string
	SchemaVersion, Version, GraphTooltip       int
	Editable                                   bool
	Time                                       struct{ From, To string }
	Annotations                                struct{ List []struct{} }
	Links                                      []struct{}
	Templating                                 struct{ List []variable }
	Panels                                     []panel
}

type variable struct {
	Name, Label, Type, Definition, AllValue string
	Query                                   any // a word for a datasource, else with an id
	Datasource                              source
	Current                                 struct{ Text, Value string }
	Refresh                                 int
	Multi, IncludeAll                       bool
}

type source struct{ Type, UID string }

type panel struct {
	ID                       int
	Type, Title, Description string
	Datasource               source
	GridPos                  struct{ X, Y, W, H int }
	Collapsed                bool
	Panels                   []struct{}
	Targets                  []struct {
		Datasource                source
		Expr, LegendFormat, RefID string
	}
	Options struct {
		ReduceOptions       struct{ Calcs []string }
		ColorMode, TextMode string
		Legend              struct{ DisplayMode, Placement string }
		Tooltip             struct{ Mode string }
	}
	FieldConfig struct {
		Overrides []struct{}
		Defaults  struct {
			Unit       string
			Min        float64
			Color      struct{ Mode, FixedColor string }
			Thresholds struct {
				Mode  string
				Steps []struct {
					Color string
					Value *float64
				}
			}
			Mappings []struct {
				Type    string
				Options map[string]struct{ Text, Color string }
			}
			Custom struct {
				DrawStyle, LineInterpolation, AxisLabel string
				FillOpacity                             int
				Stacking                                struct{ Mode string }
			}
		}
	}
}

// wrong is what Grafana would not take, or would show otherwise than it is meant.
func (p *panel) wrong() (out []string) {
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	oneOf := func(what, have string, allowed ...string) {
		if !slices.Contains(allowed, have) {
			say("%s is %q, not one of %q", what, have, allowed)
		}
	}
	f := p.FieldConfig.Defaults
	oneOf("type", p.Type, "stat", "timeseries", "state-timeline")
	oneOf("the unit", f.Unit, "short", "none", "s", "ops")
	oneOf("the mode of the colour", f.Color.Mode, "", "thresholds", "fixed")
	switch p.Type {
	case "stat":
		oneOf("options.colorMode", p.Options.ColorMode, "none", "value", "background")
		oneOf("options.textMode", p.Options.TextMode, "auto", "value", "value_and_name", "name", "none")
		if !slices.Equal(p.Options.ReduceOptions.Calcs, []string{"lastNotNull"}) {
			say("it shows %q of a series", p.Options.ReduceOptions.Calcs)
		}
	case "timeseries":
		oneOf("the legend's displayMode", p.Options.Legend.DisplayMode, "list", "table", "hidden")
		oneOf("the legend's placement", p.Options.Legend.Placement, "bottom", "right")
		oneOf("the tooltip's mode", p.Options.Tooltip.Mode, "single", "multi", "none")
		oneOf("custom.drawStyle", f.Custom.DrawStyle, "line", "bars", "points")
		oneOf("custom.lineInterpolation", f.Custom.LineInterpolation, "linear", "smooth", "stepBefore", "stepAfter")
		oneOf("custom.stacking.mode", f.Custom.Stacking.Mode, "none", "normal", "percent")
	}
	for i, s := range f.Thresholds.Steps {
		if (s.Value == nil) != (i == 0) || i > 1 && *s.Value <= *f.Thresholds.Steps[i-1].Value {
			say("the thresholds don't rise from null")
		}
	}
	refs := map[string]bool{}
	for _, target := range p.Targets {
		if refs[target.RefID] || target.RefID == "" || target.Datasource != p.Datasource || p.Datasource.Type != "prometheus" {
			say("query %q has no name of its own, or another datasource", target.RefID)
		}
		refs[target.RefID] = true
		if strings.Contains(target.Expr, "_mtu_") && f.Unit != "none" {
			say("the unit %q rounds an MTU: 1446 and 1438 look alike", f.Unit)
		}
		ofFleet := strings.HasPrefix(target.Expr, "job:") // which has no other label
		if ofFleet && !strings.Contains(target.LegendFormat, "{{job}}") {
			say("the legend %q does not tell jobs apart, and %s does", target.LegendFormat, target.Expr)
		}
		if !ofFleet && !strings.Contains(target.Expr, "by (") && (!strings.Contains(target.LegendFormat, "{{instance}}") || !strings.Contains(target.LegendFormat, "{{netns}}")) {
			say("the legend %q does not tell machines and namespaces apart, and %s does", target.LegendFormat, target.Expr)
		}
	}
	return out
}
