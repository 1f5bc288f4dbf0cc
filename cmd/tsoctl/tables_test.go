package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"golang.org/x/tools/txtar"

	"tsoagent/agent"
	"tsoagent/agent/api"
	"tsoagent/agent/verify"
	"tsoagent/cmd/internal/inert"
)

var update = flag.Bool("update", false, "write what is printed to the files in testdata")

// golden holds what is printed to a file of testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := "testdata/" + name
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s: -update writes it (-want +got)\n%s", file, diff)
	}
}

// covered has a bit of everything.
func covered() *agent.Report {
	return &agent.Report{
		Version: agent.ReportVersion, PID: 143, Mode: agent.Enforce, Live: true,
		Since: time.Date(2026, 11, 22, 10, 33, 18, 0, time.Local),
		Links: 7, Routes: 35, Policies: 8, SAs: 1,
		Coverages: []agent.CoverageReport{
			{
				Policy: 1, Src: "10.9.0.0/24", Dst: "10.2.0.0/16", IfID: 1, Priority: 100, MTU: 1422, Cut: "socket",
				Notes: []string{"no route leads to these flows, or another policy takes them first: nothing to lock"},
			},
			{
				Policy: 17, Src: "10.9.0.0/24", Dst: "10.2.0.0/16", IfID: 2, Priority: 100, MTU: 1446, Cut: "device",
				Carriers: []string{"ipsec2"}, Held: []string{"ipsec2 tx-tcp-segmentation", "ipsec2 tx-tcp-ecn-segmentation", "ipsec2 tx-tcp6-segmentation"},
				Locked: []string{"10.2.0.0/16 mtu 1446"},
			},
			{
				Policy: 49, Src: "10.9.0.0/24", Dst: "10.3.0.0/16", Proto: 6, Sport: 179, Dport: 443, Mark: "0x1/0xff", Priority: 100,
				MTU: 1446, Cut: "socket", Locked: []string{"10.3.0.0/16 table 5450 mtu 1446"},
			},
			{Policy: 57, Src: "fd09::/64", Dst: "fd02::/32", Priority: 100, Cut: "socket", Notes: []string{"no valid SA yet: no lock before the first one (presume_mtu sets one)"}},
		},
		Holds: []agent.HoldReport{
			{Device: "ipsec2", Feature: "tx-tcp-ecn-segmentation", State: agent.StateInPlace, Because: []string{"policy 17"}},
			{Device: "ipsec2", Feature: "tx-tcp-segmentation", State: agent.StateInPlace, Because: []string{"policy 17", "policy 18"}},
			{Device: "ipsec2", Feature: "tx-tcp6-segmentation", State: agent.StateInPlace, Because: []string{"policy 17", "policy 18", "policy 19", "policy 20"}},
			{Device: "old0", Feature: "tx-tcp-segmentation", State: agent.StateReleasing, Because: []string{}},
		},
		Locks: []agent.LockReport{
			{Route: "10.2.0.0/16", MTU: 1446, Locked: true, Devices: []string{"ipsec2"}, State: agent.StateInPlace},
			{Route: "10.4.0.0/16 metric 100", MTU: 1422, Devices: []string{"ipsec3", "ipsec4"}, State: agent.StateWanted},
		},
		Clones: []agent.CloneReport{
			{Table: 5450, Dst: "10.3.0.0/16", MTU: 1446, Locked: true, Devices: []string{"nic1"}, State: agent.StateInPlace},
			{Table: 5450, Dst: "10.3.7.0/24", Throw: true},
			{Table: 5451, Dst: "fd03:7::/48", Throw: true},
			{Table: 5451, Dst: "fd03:7::/48", Copy: true, Devices: []string{"nic1"}, Of: "fd03:7::/48", State: agent.StateInPlace},
		},
		Rules: []agent.RuleReport{
			{Family: "ipv4", Priority: 219, Table: 5451, Text: "from 10.9.0.0/24 ipproto 6 lookup 5451", State: agent.StateWanted},
			{Family: "ipv4", Priority: 32765, Table: 5450, Text: "from 10.9.0.0/24 lookup 5450", State: agent.StateInPlace},
		},
	}
}

// degradedReport is one that a person should look at.
func degradedReport() *agent.Report {
	r := covered()
	r.Coverages, r.Locks, r.Clones, r.Rules = r.Coverages[1:2], nil, nil, nil
	r.Stale = []string{"routes"}
	r.Findings = []string{"2 journal entries belong to another boot or network namespace and are left alone"}
	r.Holds = []agent.HoldReport{
		{Device: "ipsec2", Feature: "tx-tcp-segmentation", State: agent.StateContested, Why: "somebody turned it on again after it was overruled once", Because: []string{"policy 17"}},
		{Device: "ipsec2", Feature: "tx-tcp6-segmentation", State: agent.StateRefused, Why: "the device refuses to switch it off (it is on [fixed])", Because: []string{"policy 17"}},
		{Device: "nic1", Feature: "tx-tcp-segmentation", State: agent.StateNotOurs, Because: []string{"policy 17"}},
	}
	return r
}

func nested() *agent.Explanation {
	r := covered()
	return &agent.Explanation{
		Version: agent.ReportVersion, Dst: "10.2.0.1", From: "10.9.0.1", Device: "ipsec2", Table: 254, DeviceMTU: 1500,
		RouteMTU: 1406, RouteMTULocked: true, Policy: 17, Action: "ipsec", Selector: "src 10.9.0.0/24 dst 10.2.0.0/16",
		Losers: []string{"policy 49 priority 200 src 10.9.0.0/24 dst 10.0.0.0/8"},
		Costs: []agent.StepCost{
			{
				Template: "ah transport", SA: "10.1.2.2 spi 0x122 reqid 2", MTU: 1438, Inner: 1414,
				Items: []agent.CostItem{{Name: "AH header", Bytes: 24}},
			},
			{
				Template: "esp tunnel", SA: "10.1.2.2 spi 0x121 reqid 2", MTU: 1500, Inner: 1438, Losers: []string{"spi 0x111, older, leaves 1446"},
				Items: []agent.CostItem{
					{Name: "outer IP header", Bytes: 20}, {Name: "ESP header", Bytes: 8}, {Name: "IV", Bytes: 16},
					{Name: "ICV", Bytes: 16}, {Name: "ESP trailer", Bytes: 2},
				},
			},
		},
		MTU: 1414, MSS: 1374, Coverage: &r.Coverages[1], Notes: []string{"a path MTU of 1400 was learnt, for 599 more seconds"},
		Live: true, Rule: "32766: from all lookup 254", Route: "10.2.0.0/16 dev ipsec2 proto bird",
		Segmentation: "at the device ipsec2, which nothing but covered flows leave by, and whose TSO is held off",
		WouldChange:  []string{"the MTU of the way to the peer 10.1.2.2, which is 1500"},
	}
}

// several is the report of an agent that follows several namespaces.
func several(without bool) *agent.Report {
	return &agent.Report{
		Mode: agent.Enforce, Live: true, Since: covered().Since, PID: 1, Links: 1, Routes: 1, NotFollowed: without,
		Namespaces: []agent.NamespaceReport{
			{Name: "host", State: agent.NetnsFollowed},
			{Name: "blue", State: agent.NetnsFollowed, Coverages: 2, Holds: 3, Locks: 1, Clones: 4},
			{Name: "green", State: agent.NetnsFollowed, Coverages: 1, Holds: 3, Degraded: true},
			{Name: "later", State: agent.NetnsWaiting, Why: "there is no such namespace; waiting for it", Degraded: true},
			{Name: "/run/docker/netns/1f2e3d", State: agent.NetnsStarting},
			{Name: "pid:77", State: agent.NetnsLeaving, Holds: 1},
		},
		Findings: []string{"namespace later: there is no such namespace; waiting for it"},
	}
}

func TestTables(t *testing.T) {
	observed := covered()
	observed.Mode, observed.Coverages = agent.Observe, observed.Coverages[1:2]
	alone := degradedReport()
	alone.Live = false
	quiet := &agent.Report{Mode: agent.Observe, Live: true, Since: covered().Since, PID: 1, Links: 1, Routes: 1, Policies: 1}
	clear := &agent.Explanation{
		Dst: "10.3.0.1", From: "10.8.0.1", Device: "nic1", Gateway: "10.1.1.2", Table: 254, DeviceMTU: 1500, Action: "none",
		MTU: 1500, MSS: 1460, Segmentation: "by nic1, which gets super-packets (tx-tcp-segmentation on)", WouldChange: []string{"policy 17 takes packets from 10.9.0.0/24"},
	}
	bypass := &agent.Explanation{Dst: "10.3.7.1", From: "10.9.0.1", Device: "nic1", Gateway: "10.1.1.2", Table: 100, DeviceMTU: 1500, RouteMTU: 1480, Action: "bypass", Policy: 33, Selector: "src 10.9.0.0/24 dst 10.3.7.0/24"}
	block := &agent.Explanation{Dst: "fd03::1", From: "fd09::1", Device: "nic1", Table: 254, DeviceMTU: 1500, Action: "block", Policy: 41, Selector: "src fd09::/64 dst fd03::/32"}
	presumed := &agent.Explanation{
		Dst: "10.3.0.1", From: "10.9.0.1", Device: "nic1", Table: 5450, DeviceMTU: 1500, RouteMTU: 1400, RouteMTULocked: true,
		Action: "ipsec", Policy: 49, Selector: "src 10.9.0.0/24 dst 10.3.0.0/16",
		Coverage: &agent.CoverageReport{MTU: 1400, Cut: "socket", Locked: []string{"10.3.0.0/16 table 5450 mtu 1400"}}, Notes: []string{"no valid SA yet; presume_mtu 1400"},
	}
	var have txtar.Archive
	for _, tt := range []struct {
		name  string
		width int
		table func(page)
	}{
		{"status", 80, func(p page) { statusTable(p, covered()) }},
		{"status, nothing covered", 80, func(p page) { statusTable(p, quiet) }},
		{"status, degraded", 80, func(p page) { statusTable(p, degradedReport()) }},
		{"status, observing", 80, func(p page) { statusTable(p, observed) }},
		{"status, several namespaces", 80, func(p page) { statusTable(p, several(false)) }},
		{"status, many namespaces", 80, func(p page) {
			r := several(false)
			for i := range 20 {
				r.Namespaces = append(r.Namespaces, agent.NamespaceReport{Name: fmt.Sprintf("n%d", i), State: agent.NetnsFollowed, Coverages: i / 19})
			}
			statusTable(p, r)
		}},
		{"status, without its own namespace", 80, func(p page) { statusTable(p, several(true)) }},
		{"status, of another namespace", 80, func(p page) {
			statusTable(p, &agent.Report{Mode: agent.Enforce, Live: true, Netns: "blue", PID: 1, Links: 2})
		}},
		{"plan", 80, func(p page) { planTable(p, covered()) }},
		{"plan, not on a terminal", 0, func(p page) { planTable(p, covered()) }},
		{"plan, observing", 80, func(p page) { planTable(p, observed) }},
		{"plan, no agent", 80, func(p page) { planTable(p, alone) }},
		{"plan, nothing covered", 80, func(p page) { planTable(p, quiet) }},
		{"explain", 80, func(p page) { explainTable(p, nested()) }},
		{"explain, in the clear", 80, func(p page) { explainTable(p, clear) }},
		{"explain, bypass", 80, func(p page) { explainTable(p, bypass) }},
		{"explain, block", 80, func(p page) { explainTable(p, block) }},
		{"explain, presumed", 80, func(p page) { explainTable(p, presumed) }},
		{"restore", 80, func(p page) {
			restoreTable(p, &agent.Restored{Holds: 3, Locks: 1, Rules: 2, Clones: 2, Actions: 8}, false, false)
		}},
		{"restore, several namespaces", 80, func(p page) {
			restoreTable(p, &agent.Restored{
				Findings:   []string{"the journals of 2 namespaces that are gone were removed"},
				Namespaces: []agent.Restored{{Netns: "blue", Holds: 3, Locks: 1, Actions: 4}, {Netns: "pid:77", Rules: 1, Clones: 1, Actions: 2}, {Netns: "red"}},
			}, false, false)
		}},
		{"restore, one kind", 80, func(p page) { restoreTable(p, &agent.Restored{Locks: 2, Actions: 2}, false, false) }},
		{"restore, nothing", 80, func(p page) {
			restoreTable(p, &agent.Restored{Findings: []string{"journal entry x can't be used: unknown kind \"y\""}}, false, false)
		}},
		{"restore --stale", 80, func(p page) { restoreTable(p, &agent.Restored{Rules: 1, Clones: 10, Actions: 11}, true, false) }},
		{"flows", 80, drawFlows(someFlows(), someResult())},
		{"flows, on a wide terminal", 100, drawFlows(someFlows(), someResult())},
		{"flows, not on a terminal", 0, drawFlows(someFlows(), someResult())},
		{"flows, none", 80, drawFlows(nil, empty())},
		{"flows, trouble", 80, drawFlows(nil, troubled())},
		{"doctor", 80, drawDoctor(&agent.Diagnosis{Collateral: troubled().Collateral, MoreCollateral: 3, Unreadable: "sockbpf: no BTF of the kernel"})},
		{"doctor, nothing", 80, drawDoctor(&agent.Diagnosis{Connections: 7})},
		{"status, paused", 80, func(p page) {
			r := covered()
			r.Paused = &api.Paused{Since: r.Since, Until: r.Since.Add(10 * time.Minute), By: api.Peer{PID: 4711, Process: "tsoctl", Login: "alice"}, Waiting: 2}
			statusTable(p, r)
		}},
		{"devices", 80, func(p page) { devicesTable(p, someDevices()) }},
		{"devices, none", 80, func(p page) { devicesTable(p, &api.DeviceList{Live: true}) }},
		{"locks", 80, func(p page) { locksTable(p, someLocks()) }},
		{"locks, not on a terminal", 0, func(p page) { locksTable(p, someLocks()) }},
		{"locks, none", 80, func(p page) { locksTable(p, api.LocksOf(&agent.Report{Netns: "blue"})) }},
		{"events", 80, func(p page) { eventsTable(p, someEvents()) }},
		{"events, not on a terminal", 0, func(p page) { eventsTable(p, someEvents()) }},
		{"events, a hole", 80, func(p page) { (&diary{page: p}).line(api.EventLine{Lost: 17}) }},
		{"events, none", 80, func(p page) { eventsTable(p, &api.EventList{Since: covered().Since, Netns: "blue"}) }},
		{"reload", 80, func(p page) { reloadTable(p, &api.ReloadAnswer{Changed: true, Configured: covered().Since}) }},
		{"reload, nothing new", 80, func(p page) { reloadTable(p, &api.ReloadAnswer{Configured: covered().Since}) }},
		{"handover", 80, func(p page) { handoverTable(p, &handedOver{Was: "v1.0.0", Program: "v1.1.0", PID: 143}) }},
		{"pause", 80, func(p page) {
			pauseTable(p, &api.PauseAnswer{Namespaces: []api.PausedNamespace{
				{Name: "host", Paused: &api.Paused{Since: covered().Since, By: api.Peer{PID: 7, Process: "tsoctl"}}},
				{Name: "blue", Paused: &api.Paused{Since: covered().Since, Restore: true, Left: 2, By: api.Peer{UID: 0}}},
				{Name: "green", Why: "the agent of this namespace has ended"},
			}})
		}},
		{"pause, given back", 80, func(p page) {
			pauseTable(p, &api.PauseAnswer{Namespaces: []api.PausedNamespace{{Name: "host", Paused: &api.Paused{Since: covered().Since, Restore: true}}}})
		}},
		{"resume", 80, func(p page) { pauseTable(p, &api.PauseAnswer{Namespaces: []api.PausedNamespace{{Name: "host"}}}) }},
		{"verify", 80, func(p page) { verifyTable(p, right()) }},
		{"verify, trouble", 80, func(p page) { verifyTable(p, wrong()) }},
		{"verify, not on a terminal", 0, func(p page) { verifyTable(p, wrong()) }},
		{"verify, nothing to look at", 80, func(p page) {
			verifyTable(p, &verify.Result{OK: true, Live: true, Says: nothingToLookAt})
		}},
		{"restore, failed", 80, func(p page) {
			restoreTable(p, &agent.Restored{Findings: []string{"x"}, Namespaces: []agent.Restored{{Netns: "blue", Rules: 1, Actions: 1}}}, false, true)
		}},
		{"restore --stale, nothing", 80, func(p page) { restoreTable(p, &agent.Restored{}, true, false) }},
	} {
		var b bytes.Buffer
		tt.table(page{&b, tt.width})
		for line := range strings.Lines(b.String()) {
			line = strings.TrimSuffix(line, "\n")
			if tt.width > 0 && utf8.RuneCountInString(line) > tt.width {
				t.Errorf("%s: wider than %d columns: %q", tt.name, tt.width, line)
			}
			if strings.TrimRight(line, " ") != line {
				t.Errorf("%s: blanks at the end: %q", tt.name, line)
			}
		}
		have.Files = append(have.Files, txtar.File{Name: tt.name, Data: b.Bytes()})
	}
	have.Comment = []byte("What tsoctl prints for people. go test ./cmd/tsoctl -run TestTables -update writes it.\n\n")
	golden(t, "tables.txtar", txtar.Format(&have))
}

// TestJSONAndYAMLHaveTheSameNames reads both back.
func TestJSONAndYAMLHaveTheSameNames(t *testing.T) {
	for name, v := range map[string]any{"report": covered(), "explanation": nested(), "verify": wrong(), "restored": &agent.Restored{Holds: 1, Findings: []string{"a: b", "1", "true", ""}}} {
		t.Run(name, func(t *testing.T) {
			asJSON, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			var asYAML bytes.Buffer
			if err := showYAML(&asYAML, v); err != nil {
				t.Fatal(err)
			}
			// JSON is YAML: the same decoder makes the same values of both.
			var fromJSON, fromYAML any
			if err := yaml.Unmarshal(asJSON, &fromJSON); err != nil {
				t.Fatal(err)
			}
			if err := yaml.Unmarshal(asYAML.Bytes(), &fromYAML); err != nil {
				t.Fatalf("%v\n%s", err, asYAML.String())
			}
			if diff := cmp.Diff(fromJSON, fromYAML); diff != "" {
				t.Errorf("JSON and YAML differ (-json +yaml)\n%s", diff)
			}
			for line := range strings.Lines(asYAML.String()) {
				if strings.HasPrefix(strings.TrimSpace(line), "{") {
					t.Errorf("not in block style: %s", line)
				}
			}
		})
	}
}

// TestStatusFitsItsScreen whatever there is, and what a person should look at is not what is left out.
func TestStatusFitsItsScreen(t *testing.T) {
	r := covered()
	for i := range 300 {
		dev := fmt.Sprintf("dev%d", i)
		state := agent.StateInPlace
		if i%50 == 49 {
			state = agent.StateContested
		}
		r.Holds = append(r.Holds, agent.HoldReport{Device: dev, Feature: "tx-tcp-segmentation", State: state, Why: "somebody", Because: []string{"policy 1"}})
		r.Lanes = append(r.Lanes, agent.LaneReport{Device: dev, IFB: "tsolane1", State: agent.StateRefused, Why: "no"})
		r.DeviceMTUs = append(r.DeviceMTUs, agent.DeviceMTUReport{Device: dev, Why: "no"})
		r.Findings = append(r.Findings, "finding "+dev)
		r.Locks, r.Rules, r.Clamps = append(r.Locks, agent.LockReport{Route: dev}), append(r.Rules, agent.RuleReport{}), append(r.Clamps, agent.ClampReport{})
		r.Namespaces = append(r.Namespaces, agent.NamespaceReport{Name: dev, State: agent.NetnsFollowed, Coverages: 1, Degraded: i%50 == 49})
	}
	for _, alone := range []bool{false, true} {
		r.NotFollowed = alone
		var b bytes.Buffer
		statusTable(page{&b, 80}, r)
		if lines := strings.Count(b.String(), "\n"); lines > 12*(screen+3) {
			t.Errorf("%d lines:\n%s", lines, b.String())
		}
		want := []string{"dev299     followed, look  ", "more namespaces, see `tsoctl status -o json`\n", "and 288 more findings, see `tsoctl plan`\n"}
		if !alone {
			want = append(want, "dev299  tx-tcp-segmentation      contested  ", "! dev299 tx-tcp-segmentation: somebody\n", "more lanes, see `tsoctl plan`\n", "more device mtus, see `tsoctl locks`\n")
		}
		for _, text := range want {
			if !strings.Contains(b.String(), text) {
				t.Errorf("%q is not in it:\n%s", text, b.String())
			}
		}
	}
	for i := range r.Holds {
		r.Holds[i].State, r.Holds[i].Why = agent.StateRefused, "it is fixed"
	}
	r.NotFollowed = false
	var b bytes.Buffer
	statusTable(page{&b, 80}, r)
	if n := strings.Count(b.String(), ": it is fixed\n"); n != screen || !strings.Contains(b.String(), "! and 292 more features\n") {
		t.Errorf("%d reasons:\n%s", n, b.String())
	}
}

// TestTablesUseTheWidth that there is, while sentences stay readable; where the last column has no room it stands below.
func TestTablesUseTheWidth(t *testing.T) {
	words := strings.TrimSpace(strings.Repeat("word ", 24))
	rows := [][]string{{"DEVICE", "BECAUSE"}, {"nic1", words}}
	draw := func(width int) string {
		var b bytes.Buffer
		p := page{&b, width}
		p.table(rows)
		p.text(0, "%s", words)
		return b.String()
	}
	if want := "\nDEVICE  BECAUSE\nnic1    " + words + "\n" + words[:99] + "\n  " + words[100:] + "\n"; draw(160) != want {
		t.Errorf("160 columns:\n%s", draw(160))
	}
	rows = [][]string{{"ROUTE", "MTU", "DEVICE", "STATE"}, {"2001:db8:1234:5678:9abc:def0:1234:5678/128 metric 1024", "lock 1446", "enp65s0f0np0.10", "table 5450, wanted"}, {"::/0", "1400", "nic1", ""}}
	var b bytes.Buffer
	(page{&b, 80}).table(rows)
	if want := `
ROUTE                                                   MTU        DEVICE
2001:db8:1234:5678:9abc:def0:1234:5678/128 metric 1024  lock 1446  enp65s0f0np0.10
  table 5450, wanted
::/0                                                    1400       nic1
`; b.String() != want {
		t.Errorf("80 columns:\n%s", b.String())
	}
}

// TestTimesAreTheReaders whatever the zone of the agent is.
func TestTimesAreTheReaders(t *testing.T) {
	r := covered()
	r.Since = r.Since.In(time.FixedZone("the agent's", 5*3600+1800))
	var got, want bytes.Buffer
	statusTable(page{&got, 80}, r)
	statusTable(page{&want, 80}, covered())
	if got.String() != want.String() {
		t.Errorf("got\n%s, want\n%s", got.String(), want.String())
	}
	e := someEvents()
	e.Events, e.Since = nil, r.Since
	got.Reset()
	if eventsTable(page{&got, 80}, e); !strings.Contains(got.String(), "no event since 2026-11-22 10:33:18\n") {
		t.Errorf("no events: %s", got.String())
	}
}

func TestDegraded(t *testing.T) {
	for name, tt := range map[string]struct {
		report *agent.Report
		want   bool
	}{
		"all in place": {covered(), false},
		"stale":        {&agent.Report{Stale: []string{"xfrm"}}, true},
		"finding":      {&agent.Report{Findings: []string{"x"}}, true},
		"contested":    {&agent.Report{Holds: []agent.HoldReport{{State: agent.StateContested}}}, true},
		"refused":      {&agent.Report{Holds: []agent.HoldReport{{State: agent.StateRefused}}}, true},
		"a namespace":  {&agent.Report{Namespaces: []agent.NamespaceReport{{}, {Degraded: true}}}, true},
		"namespaces":   {&agent.Report{Namespaces: []agent.NamespaceReport{{}, {}}}, false},
		"off already":  {&agent.Report{Holds: []agent.HoldReport{{State: agent.StateNotOurs}}}, false},
	} {
		if got := degraded(tt.report); got != tt.want {
			t.Errorf("%s: got %v, want %v", name, got, tt.want)
		}
	}
}

// A device's name may have any byte but blanks, '/' and ':' (dev_valid_name, net/core/dev.c), and
// whoever owns a namespace that is followed chooses it. A terminal must not obey it.
func TestTablesObeyNoNames(t *testing.T) {
	const evil = "a\x1b]0;x\x07\x7f\u009bb"
	r := covered()
	r.Holds[0].Device, r.Coverages[1].Carriers = evil, []string{evil}
	r.Findings = []string{"device 7 is " + evil + " now"}
	for name, draw := range map[string]func(page, *agent.Report){"status": statusTable, "plan": planTable} {
		var b bytes.Buffer
		draw(pageOf(&b), r)
		if i := strings.IndexFunc(b.String(), func(r rune) bool { return r != '\n' && !strconv.IsPrint(r) }); i >= 0 {
			t.Errorf("%s prints %q", name, b.String()[i:min(i+20, b.Len())])
		}
		if !strings.Contains(b.String(), "a?]0;x???b") {
			t.Errorf("%s: the name is not there:\n%s", name, b.String())
		}
	}
	var b bytes.Buffer
	// A byte alone is no UTF-8, and what a terminal of one byte a character obeys.
	if n, err := (inert.Writer{Writer: &b}).Write([]byte("x\x9b31m\x9d0;y")); n != 9 || err != nil || b.String() != "x\ufffd31m\ufffd0;y" {
		t.Errorf("bytes alone become %q, %d, %v", b.String(), n, err)
	}
	b.Reset()
	explainTable(pageOf(&b), &agent.Explanation{Dst: "10.0.0.1", Device: evil})
	if strings.Contains(b.String(), "\x1b") {
		t.Errorf("explain prints %q", b.String())
	}
}
