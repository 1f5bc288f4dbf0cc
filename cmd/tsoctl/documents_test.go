package main

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/tools/txtar"

	"tsoagent/agent"
	"tsoagent/agent/api"
	"tsoagent/agent/doctor"
	"tsoagent/agent/flows"
	"tsoagent/agent/probe"
)

// TestDocuments holds what -o json and -o yaml print to testdata/documents.txtar, so that no field changes its name, or goes away, unseen.
// Those of flows and verify have files of their own.
func TestDocuments(t *testing.T) {
	at := time.Date(2026, 11, 22, 10, 33, 18, 0, time.UTC)
	report := covered()
	report.Since, report.Now = at, at.Add(time.Minute)
	report.Paused = &api.Paused{Since: at, Until: at.Add(time.Hour), By: api.Peer{PID: 7, Process: "tsoctl", Login: "alice"}, Waiting: 2}
	report.Clamps, report.DeviceMTUs = someLocks().Clamps, someLocks().DeviceMTUs
	report.Lanes = []agent.LaneReport{{Device: "nic1", Index: 2, IFB: "tsolane2", Matches: []string{"proto esp"}, State: agent.StateInPlace, Because: []string{"policy 49"}}}
	report.Diagnosis = &agent.Diagnosis{At: at, Connections: 7, Lost: 1, Collateral: someResult().Collateral}
	report.Namespaces = several(false).Namespaces[:4]
	list := someEvents()
	list.Since = at
	for i := range list.Events {
		list.Events[i].At = at.Add(time.Duration(i) * time.Second)
	}
	var have txtar.Archive
	for _, doc := range []struct {
		name string
		v    any
	}{
		{"status and plan", report},
		{"explain", nested()},
		{"devices", someDevices()},
		{"locks", someLocks()},
		{"events", list},
		{"pause and resume", &api.PauseAnswer{Version: api.Version, Namespaces: []api.PausedNamespace{
			{Name: "host", Paused: report.Paused}, {Name: "blue"}, {Name: "green", Why: "the agent of this namespace has ended"},
		}}},
		{"reload", &api.ReloadAnswer{Version: api.Version, Changed: true, Configured: at}},
		{"handover", &handedOver{Version: api.Version, Was: "v1.0.0", Program: "v1.1.0", PID: 143, Since: at}},
		{"restore", restoredDocument{api.Version, &agent.Restored{Holds: 3, Actions: 3, Findings: []string{"x"}, Namespaces: []agent.Restored{{Netns: "blue", Lanes: 1, Findings: []string{}}}}}},
		{"doctor", doctor.Check(&doctor.Patient{Diagnosis: report.Diagnosis})},
		{"probe", &probe.Result{Version: probe.Version, Time: at, Cases: []probe.Case{probed4("gre", probe.Broken, 2.5, 54)}}},
	} {
		for _, format := range []string{"json", "yaml"} {
			show, begins := showJSON, "{\n  \"version\": 1,\n"
			if format == "yaml" {
				show, begins = showYAML, "version: 1\n"
			}
			var b bytes.Buffer
			if err := show(&b, doc.v); err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(b.String(), begins) {
				t.Errorf("%s does not begin with its version: %.40q", doc.name, b.String())
			}
			if format == "json" || doc.name == "doctor" { // one shows the form, TestJSONAndYAMLHaveTheSameNames the rest
				have.Files = append(have.Files, txtar.File{Name: doc.name + " -o " + format, Data: b.Bytes()})
			}
		}
	}
	have.Comment = []byte("What tsoctl prints for programs. go test ./cmd/tsoctl -run TestDocuments -update writes it; what goes away or has another\nname takes another version.\n\n")
	golden(t, "documents.txtar", txtar.Format(&have))
}

// TestDocumentsObeyNoNames has a terminal in mind that prints JSON and YAML.
func TestDocumentsObeyNoNames(t *testing.T) {
	const evil = "a\x1b]0;x\x07\x7f\u009b31m\u202e\U000e0001→b"
	for name, show := range map[string]func(io.Writer) error{
		"json": func(w io.Writer) error { return showJSON(w, &agent.Report{Findings: []string{evil}}) },
		"yaml": func(w io.Writer) error { return showYAML(w, &agent.Report{Findings: []string{evil}}) },
	} {
		var b bytes.Buffer
		if err := show(&b); err != nil {
			t.Fatal(err)
		}
		if i := bytes.IndexAny(b.Bytes(), "\x1b\x07\x7f\u009b"); i >= 0 {
			t.Errorf("%s prints %q", name, b.String()[i:])
		}
		var r struct{ Findings []string }
		read := yaml.Unmarshal
		if name == "json" {
			read = json.Unmarshal
		}
		if err := read(b.Bytes(), &r); err != nil || r.Findings[0] != evil {
			t.Errorf("%s is read as %q: %v\n%s", name, r.Findings, err, b.String())
		}
	}
	list := someFlows()[:1]
	list[0].Processes = []flows.Process{{PID: 1, Name: evil}}
	if got := asJSON(t, list, someResult()); bytes.ContainsAny(got, "\x7f\u009b") {
		t.Errorf("flows print %q", got)
	}
}
