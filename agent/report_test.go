package agent

import (
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

var update = flag.Bool("update", false, "write the golden files")

// The sentences of the verdicts are the plan's, which has its own golden files.
var (
	notes = regexp.MustCompile(`"notes": \[[^]]+\]`)
	note  = regexp.MustCompile(`(?m)^(\s+)".*"`)
)

// golden compares JSON with a file of testdata.
func golden(t *testing.T, file string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	got = notes.ReplaceAllFunc(got, func(list []byte) []byte {
		return note.ReplaceAll(list, []byte("$1\"…\""))
	})
	if strings.Contains(string(got), "null") {
		t.Errorf("%s: null in place of [] in\n%s", file, got)
	}
	file = "testdata/" + file
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got; go test -update):\n%s", file, d)
	}
}

// reportNow is the report with what differs from run to run masked.
func (w *world) reportNow() *Report {
	r := *w.a.Report()
	r.PID = 4321
	return &r
}

func TestReportOfNothing(t *testing.T) {
	w := newWorld(t, Config{})
	w.start()
	golden(t, "report-nothing.json", w.reportNow())
}

func TestReportOfEverything(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.refuse = map[ethtool.Feature]bool{ethtool.TCP6Segmentation: true}
	maybe := *policy(89, "10.1.0.0/16", "10.5.0.0/16", 0).Policy
	maybe.Templates[0].Optional = true
	port := *policy(97, "10.1.0.0/16", "10.6.0.0/16", 0).Policy
	port.Selector.Proto, port.Selector.Dport = 6, xfrmwatch.PortMatch{Port: 443, Mask: 0xffff}
	port.Mark = xfrmwatch.Mark{Value: 1, Mask: 0xff}
	larval := policy(105, "0.0.0.0/0", "10.7.0.0/16", 2)
	w.a.findings = []string{"the journal's finding"}
	w.a.st.keys.Keys = []sockopt.Key{{Kind: sockopt.MD5, Peer: netip.MustParsePrefix("192.0.2.9/32"), Port: 179}}
	w.start(tunnelPolicy, tunnelSA, partPolicy, partSA, xfrmwatch.PolicySet{Policy: &maybe}, xfrmwatch.PolicySet{Policy: &port}, larval)
	w.addLink(&routes.Link{Index: 3, Name: "small", Type: 1, MTU: 1400, Up: true})
	w.addRoute("10.3.4.0/24", hop{oif: 3})
	for range 2 {
		w.turn(ipsec1, tso, true)
		w.settle()
	}
	w.xfrm(xfrmwatch.PolicyGone{Index: 89})
	for range 10 {
		w.replaceRoute("10.2.0.0/16", hop{oif: ipsec1})
		w.settle()
	}
	golden(t, "report.json", w.reportNow())
}

func TestReportOfAHoldThatIsReleased(t *testing.T) {
	w := coveredWorld(t)
	w.replaceRoute("10.2.0.0/16", hop{oif: ipsec2})
	w.settle()
	r := w.reportNow()
	if len(r.Holds) != 3 || r.Holds[0].State != StateReleasing || r.Holds[0].Because == nil {
		t.Errorf("holds %+v", r.Holds)
	}
}

func TestReportIsOneForEachRoundAndNeverChanges(t *testing.T) {
	w := coveredWorld(t)
	old := w.a.Report()
	before, err := json.Marshal(old)
	if err != nil {
		t.Fatal(err)
	}
	w.turn(ipsec1, tso, true)
	w.settle()
	w.turn(ipsec1, tso, true)
	w.settle()
	w.dumpXFRM()
	w.settle()
	w.advance(time.Minute)
	after, err := json.Marshal(old)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(before), string(after)); d != "" {
		t.Errorf("a report that was handed out changed (-before +after):\n%s", d)
	}
	if w.a.Report() == old {
		t.Error("no new report")
	}
}

func TestExplain(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	bypass := *policy(57, "10.1.0.0/16", "10.3.8.0/24", 0).Policy
	bypass.Templates, bypass.Priority = nil, 50
	block := bypass
	block.Index, block.Action, block.Selector.Dst = 65, xfrmwatch.Block, netip.MustParsePrefix("10.3.9.0/24")
	wide := policy(113, "10.1.0.0/16", "10.192.0.0/10", 0)
	wide.Policy.Templates[0].Reqid = 77
	w.start(tunnelPolicy, tunnelSA, partPolicy, partSA, wide,
		xfrmwatch.PolicySet{Policy: &bypass}, xfrmwatch.PolicySet{Policy: &block})
	answers := map[string]*Explanation{}
	for name, q := range map[string]Question{
		"tunnel":          {Dst: netip.MustParseAddr("10.2.0.1"), From: netip.MustParseAddr("10.1.0.1")},
		"part":            {Dst: netip.MustParseAddr("10.3.0.1")},
		"bypass":          {Dst: netip.MustParseAddr("10.3.8.1"), Proto: 6, Port: 80},
		"block":           {Dst: netip.MustParseAddr("10.3.9.1")},
		"no SA yet":       {Dst: netip.MustParseAddr("10.200.0.1")},
		"nothing matches": {Dst: netip.MustParseAddr("198.51.100.1")},
	} {
		e, err := w.a.explain(q)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		answers[name] = e
	}
	golden(t, "explain.json", answers)
	if _, err := w.a.explain(Question{Dst: netip.MustParseAddr("2001:db8::1")}); err == nil || !strings.Contains(err.Error(), "no route to 2001:db8::1") {
		t.Errorf("no route: %v", err)
	}
}
