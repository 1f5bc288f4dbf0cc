package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"tsoagent/agent"
	"tsoagent/agent/doctor"
	"tsoagent/agent/flows"
	"tsoagent/agent/verify"
)

// someFlows has a row of each kind.
func someFlows() []flows.Flow {
	bgpd := []flows.Process{{PID: 143, Name: "bgpd"}}
	return []flows.Flow{
		{State: "listening", Local: "0.0.0.0:179", Coverage: flows.CoveredByKey, Segmentation: flows.CutUnknown, Why: "holds 2 TCP-MD5 keys: all that it accepts has no offload, signed or not", Inode: 901},
		{State: "established", Local: "10.1.0.1:179", Remote: "10.1.0.2:40000", Coverage: flows.CoveredByKey, Segmentation: flows.CutNone, Device: "eth0", Why: "TCP-MD5 key on this socket: the kernel takes GSO from it", Inode: 902},
		{
			State: "established", Local: "10.1.0.1:179", Remote: "10.1.0.3:40001", Coverage: flows.NotCovered, Segmentation: flows.CutNone, Device: "eth0", Lost: true,
			Why: "no key, but inherited from listener 0.0.0.0:179, which holds 2 TCP-MD5 keys", Listener: "0.0.0.0:179", UID: 101, Inode: 903, Processes: bgpd,
		},
		{
			State: "fin-wait-2", Local: "[2001:db8:1234:5678::1]:50123", Remote: "[2001:db8:8765:4321::ffff]:443", Coverage: flows.CoveredByPolicy, Policy: 17, Segmentation: flows.CutOffload, Device: "eth0",
			Why: "policy 17 covers it", Contradiction: "no SA applies: it has sent nothing since the policy came, or the SA is missing",
		},
		{State: "established", Local: "10.9.0.1:50124", Remote: "10.2.0.1:443", Coverage: flows.CoveredByPolicy, Segmentation: flows.CutSoftware, Device: "ipsec0", Inode: 905},
		{State: "syn-sent", Local: "10.9.0.1:50125", Remote: "10.2.0.1:443", Coverage: flows.NotCovered, Segmentation: flows.CutUnknown},
	}
}

func someResult() *flows.Result {
	return &flows.Result{
		Version: flows.Version, Live: true,
		Summary: flows.Summary{
			Connections: 5, Shown: 6, Policy: 2, Key: 2, Uncovered: 2, Offload: 1, Software: 1, None: 2, Unknown: 2, Lost: 1, Contradictions: 1,
		},
		Collateral: []flows.Collateral{{
			Listener: "0.0.0.0:179", Port: 179, MD5Keys: 2, Lost: 1, Signed: 1,
			Processes: []flows.Process{{PID: 143, Name: "bgpd"}},
		}},
	}
}

// empty is what is said where no flow is shown.
func empty() *flows.Result {
	return &flows.Result{Version: flows.Version, Summary: flows.Summary{Connections: 12}, Collateral: []flows.Collateral{}}
}

// troubled is a result with all that can be wrong, seen from elsewhere.
func troubled() *flows.Result {
	r := someResult()
	r.Netns, r.Live, r.Stale, r.MoreCollateral = "blue", false, true, 3
	r.Notes = []string{"processes: not every process may be looked at: it takes root, with CAP_SYS_PTRACE"}
	r.Summary = flows.Summary{Connections: 70, Shown: 2, Lost: 2, Uncovered: 2, None: 2}
	r.Collateral = append(
		r.Collateral,
		flows.Collateral{
			Listener: "[::]:179", Port: 179, Device: "red", AOKeys: 1, MD5Keys: 1, Lost: 2,
			Processes: []flows.Process{{PID: 1, Name: "a"}, {PID: 2, Name: "a"}, {PID: 3, Name: "a"}, {PID: 4, Name: "a"}, {PID: 5, Name: "a"}},
		},
		flows.Collateral{Listener: "10.1.0.1:646", Port: 646, Lost: 1, ProcessesUnknown: "no process that can be seen from here has it open"},
		flows.Collateral{Lost: 7},
	)
	return r
}

func drawFlows(list []flows.Flow, r *flows.Result) func(page) {
	return func(p page) {
		t := &flowTable{page: p}
		for i := range list {
			_ = t.flow(&list[i])
		}
		_ = t.end(r)
	}
}

func drawDoctor(d *agent.Diagnosis) func(page) {
	return func(p page) { doctorTable(p, doctor.Check(&doctor.Patient{Diagnosis: d})) }
}

// What is printed before the widths are known and after is the same.
func TestFlowTableStreams(t *testing.T) {
	var list []flows.Flow
	for i := range sized + 3 {
		list = append(list, flows.Flow{State: "established", Local: fmt.Sprintf("10.1.0.1:%d", 10000+i), Remote: "10.1.0.2:80", Coverage: flows.NotCovered, Segmentation: flows.CutOffload, Device: "eth0"})
	}
	var b bytes.Buffer
	tab := &flowTable{page: page{&b, 80}}
	for i := range list {
		if err := tab.flow(&list[i]); err != nil {
			t.Fatal(err)
		}
		if i == sized-1 && b.Len() == 0 {
			t.Errorf("nothing is printed after %d flows", sized)
		}
	}
	if len(tab.first) != 0 {
		t.Errorf("%d flows are kept", len(tab.first))
	}
	for i, line := range strings.Split(strings.TrimSpace(b.String()), "\n")[1:] {
		if want := fmt.Sprintf("10.1.0.1:%d  10.1.0.2:80  ESTAB  no       offload  eth0", 10000+i); line != want {
			t.Fatalf("line %d is %q, want %q", i, line, want)
		}
	}
}

func asJSON(t *testing.T, list []flows.Flow, r *flows.Result) []byte {
	t.Helper()
	var b bytes.Buffer
	w := bufio.NewWriter(&b)
	l := &flowJSON{w: w}
	for i := range list {
		if err := l.flow(&list[i]); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.end(r); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestFlowsJSONGolden holds the names that programs read, and that the document which is written bit by
// bit is the one that is written at once.
func TestFlowsJSONGolden(t *testing.T) {
	for name, tt := range map[string]struct {
		list   []flows.Flow
		result *flows.Result
	}{"flows": {someFlows(), someResult()}, "no-flows": {[]flows.Flow{}, empty()}} {
		t.Run(name, func(t *testing.T) {
			got := asJSON(t, tt.list, tt.result)
			golden(t, name+".json", got)
			whole, err := json.MarshalIndent(flowsDocument{flows.Version, tt.list, *tt.result}, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(whole)+"\n", string(got)); d != "" {
				t.Errorf("bit by bit it differs (-whole +bits):\n%s", d)
			}
			var y bytes.Buffer
			l := &flowYAML{w: &y}
			for i := range tt.list {
				if err := l.flow(&tt.list[i]); err != nil {
					t.Fatal(err)
				}
			}
			if err := l.end(tt.result); err != nil {
				t.Fatal(err)
			}
			var fromJSON, fromYAML any
			if err := yaml.Unmarshal(got, &fromJSON); err != nil {
				t.Fatal(err)
			}
			if err := yaml.Unmarshal(y.Bytes(), &fromYAML); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(fromJSON, fromYAML); d != "" {
				t.Errorf("JSON and YAML differ (-json +yaml):\n%s", d)
			}
		})
	}
}

// TestFieldsAreDocumented holds docs/commands.md to the names that programs read.
func TestFieldsAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/commands.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		for typ.Kind() == reflect.Slice {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct {
			return
		}
		for f := range typ.Fields() {
			if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" && name != "-" {
				names = append(names, name)
			}
			walk(f.Type)
		}
	}
	walk(reflect.TypeFor[flowsDocument]())
	walk(reflect.TypeFor[doctor.Checkup]())
	walk(reflect.TypeFor[verify.Result]())
	if len(names) < 40 {
		t.Fatalf("found %d names only: %v", len(names), names)
	}
	for _, name := range names {
		if !strings.Contains(string(b), "`"+name+"`") {
			t.Errorf("%s is not in docs/commands.md", name)
		}
	}
}

// Each code has its page, and nothing else has one.
func TestEveryCodeIsDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, k := range doctor.Kinds {
		want = append(want, string(k.Code))
		if !strings.HasSuffix(doctor.Page(k.Code), "/doctor.md#"+string(k.Code)) {
			t.Errorf("the page of %s is %s", k.Code, doctor.Page(k.Code))
		}
		if k.Title == "" || k.Do == "" {
			t.Errorf("%s says nothing", k.Code)
		}
	}
	for line := range strings.Lines(string(b)) {
		if code, ok := strings.CutPrefix(line, "## "); ok {
			got = append(got, strings.TrimSpace(code))
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("docs/doctor.md has other headings than there are codes (-code +heading):\n%s", d)
	}
}

// A process chooses its own name.
func TestFlowsObeyNoNames(t *testing.T) {
	const evil = "a\x1b]0;x\x07b"
	list := someFlows()
	list[2].Processes, list[2].Device = []flows.Process{{PID: 1, Name: evil}}, evil
	r := someResult()
	r.Collateral[0].Processes[0].Name = evil
	for name, draw := range map[string]func(page){
		"flows": drawFlows(list, r), "doctor": drawDoctor(&agent.Diagnosis{Collateral: r.Collateral, Unreadable: evil}),
	} {
		var b bytes.Buffer
		draw(pageOf(&b))
		if strings.Contains(b.String(), "\x1b") || !strings.Contains(b.String(), "a?]0;x?b") {
			t.Errorf("%s prints %q", name, b.String())
		}
	}
}

// TestWhatIsNotThereIsAWrongFlag has an agent's answers, and the exit code for each: it is the command that has to be changed, or not.
func TestWhatIsNotThereIsAWrongFlag(t *testing.T) {
	for name, tt := range map[string]struct {
		status int
		answer string
		want   int
	}{
		"no such device":    {http.StatusNotFound, `{"error":"there is no device \"nope\"","absent":"dev"}`, exitUsage},
		"no such namespace": {http.StatusNotFound, `{"error":"this agent does not follow namespace \"nope\"","absent":"netns"}`, exitUsage},
		"an older agent":    {http.StatusNotFound, `{"error":"there is no \"/v1/flows\""}`, exitFailed},
		"no BPF":            {http.StatusNotImplemented, `{"error":"no iterator"}`, exitFailed},
		"an answer":         {http.StatusOK, `{"result":{"version":1}}` + "\n", 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l, err := new(net.ListenConfig).Listen(t.Context(), "unix", agent.SocketPath(dir))
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tt.status)
				_, _ = w.Write([]byte(tt.answer))
			})}
			done := make(chan struct{})
			go func() {
				defer close(done)
				_ = srv.Serve(l)
			}()
			got := run([]string{"tsoctl", "--run-dir", dir, "flows", "--dev", "nope"})
			if err := srv.Close(); err != nil {
				t.Error(err)
			}
			<-done
			if got != tt.want {
				t.Errorf("exit code %d, want %d", got, tt.want)
			}
		})
	}
}
