package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/api"
	"tsoagent/cmd/internal/inert"
	"tsoagent/cmd/internal/manual/manualtest"
)

func someDevices() *api.DeviceList {
	return &api.DeviceList{Version: api.Version, Live: true, Devices: []api.DeviceReport{
		{
			Device: "eth0", Index: 2, Up: true, MTU: 1500, Driver: "ixgbe", Bus: "0000:01:00.0", Firmware: "0x800003e7", PermAddr: "02:00:00:00:00:02",
			Carries: []string{}, Clones: 2, Features: []api.FeatureReport{
				{Feature: "tx-tcp-segmentation", Active: true, Wanted: true},
				{Feature: "tx-udp-segmentation", Fixed: true},
				{Feature: "tx-esp-segmentation", Hold: api.StateContested, Active: true, Wanted: true, Why: "somebody turned it on again after it was overruled once", Because: []string{"policy 9"}},
			},
		},
		{
			Device: "ipsec2", Index: 7, Kind: "xfrm", Up: true, MTU: 1446, WasMTU: 1500, Carries: []string{"policy 17", "policy 18", "policy 19"}, Locks: 1,
			Features: []api.FeatureReport{
				{Feature: "tx-tcp-segmentation", Hold: api.StateInPlace, Because: []string{"policy 17", "policy 18", "policy 19"}},
				{Feature: "tx-tcp6-segmentation", Wanted: true},
				{Feature: "tx-generic-segmentation", Active: true, Wanted: true, Fixed: true},
			},
			Lane: "tsolane7", LaneState: api.StateWanted,
		},
	}}
}

func someLocks() *api.LockList {
	r := covered()
	r.Locks[0].Because = []string{"policy 17", "policy 18", "policy 19"}
	r.Clones[0].Of, r.Clones[0].Because = "0.0.0.0/0", []string{"policy 49"}
	r.Clamps = []agent.ClampReport{{Dst: "10.8.0.0/16", MSS: 1406, State: api.StateInPlace, Because: []string{"policy 49"}}}
	r.DeviceMTUs = []agent.DeviceMTUReport{{Device: "ipsec2", MTU: 1446, Was: 1500, State: api.StateInPlace, Because: []string{"policy 17"}}}
	return api.LocksOf(r)
}

func someEvents() *api.EventList {
	at := time.Date(2026, 11, 22, 10, 33, 18, 1e6, time.Local)
	return &api.EventList{Version: api.Version, Lost: 1, Last: 7, Events: []api.Event{
		{Seq: 2, At: at, Kind: api.EventState, Text: "ready: mode enforce, coverages 0"},
		{Seq: 3, At: at.Add(time.Second), Kind: api.EventDone, Cause: "policy 17 added", Text: "mtu locked: 10.2.0.0/16, mtu 1446, dev ipsec2", Seconds: 0.003},
		{Seq: 4, At: at.Add(2 * time.Second), Kind: api.EventNotice, Cause: "ipsec2: tx-tcp-segmentation turned on", Text: "hold is contested: staying out until its cause is gone: ipsec2, tx-tcp-segmentation", Seconds: 0.00031},
		{Seq: 5, At: at.Add(3 * time.Second), Kind: api.EventFailed, Cause: "policy 18 added", Text: "mtu can't be locked: 10.4.0.0/16, network is down", Seconds: 1.24},
		{Seq: 6, At: at.Add(4 * time.Second), Kind: api.EventSeen, Cause: "SA 0x100 to 192.0.2.2 soon to expire", Text: "nothing to do", Seconds: 0.25},
		{Seq: 7, At: at.Add(14 * time.Hour), Kind: api.EventDone, Cause: "its cause is gone, and it has been quiet", Text: "mtu given back: 10.2.0.0/16"},
	}}
}

func TestPainterKeepsTextAndColumns(t *testing.T) {
	var b bytes.Buffer
	w := &painter{w: &b}
	for _, piece := range []string{"DEVICE  STA", "TE\nipsec2  in place", "  policy 17\nold0  contested, look\n  ! it is wanted\n", "this is in place of that\nno end"} {
		if n, err := w.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Fatal(n, err)
		}
	}
	want := bold + "DEVICE  STATE" + plainly + "\nipsec2  " + green + "in place" + plainly + "  policy 17\nold0  " + red + "contested" + plainly + ", look\n" +
		yellow + "  ! it is wanted" + plainly + "\nthis is in place of that\n"
	if b.String() != want {
		t.Errorf("got\n%q, want\n%q", b.String(), want)
	}
	b.Reset()
	statusTable(page{inert.Writer{Writer: &painter{w: &b}}, 80}, degradedReport())
	var bare bytes.Buffer
	statusTable(page{inert.Writer{Writer: &bare}, 80}, degradedReport())
	text := strings.NewReplacer(plainly, "", bold, "", red, "", green, "", yellow, "").Replace(b.String())
	if text != bare.String() || b.String() == text {
		t.Errorf("in colour it says\n%s\nelse\n%s", text, bare.String())
	}
	if strings.Contains(b.String(), "?[") {
		t.Errorf("colours were taken for somebody's:\n%s", b.String())
	}
}

func TestCompletions(t *testing.T) {
	app := newApp()
	words := func(line string) string {
		var out []string
		for _, c := range completions(app, strings.Split(line, " ")) {
			out = append(out, c.word)
		}
		return strings.Join(out, " ")
	}
	for line, want := range map[string]string{
		"st":                          "status",
		"re":                          "restore resume reload",
		"ha":                          "handover",
		"handover --within ":          "10s 1m 5m",
		"nope ":                       "",
		"-o ":                         "table json yaml",
		"-o j":                        "json",
		"--output=y":                  "--output=yaml",
		"-o json sta":                 "status",
		"status --netn":               "--netns",
		"status --netns ho":           "host",
		"status --netns=ho":           "--netns=host",
		"status -- --netn":            "",
		"--config ":                   ":files",
		"status --run-dir /ru":        ":files",
		"pause --":                    "--for --restore --netns --output --run-dir --config --help",
		"pause --for ":                "10m 1h 8h",
		"verify --for ":               "5s 30s 2m",
		"verify --for=3":              "--for=30s",
		"explain ::1 --proto t":       "tcp",
		"pause --restore --f":         "--for",
		"flows --state est":           "established",
		"completion ":                 "bash fish zsh",
		"completion b":                "bash",
		"man flo":                     "flows",
		"man --dir ":                  ":files",
		"explain 10.0.0.1 --fro":      "--from",
		"explain --from=1 --p":        "--proto --port",
		"--hel":                       "--help",
		"--output":                    "--output",
		"status --output=table -o js": "json",
	} {
		if got := words(line); got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
	if got := words(""); got != strings.Join(commandNames(app), " ") {
		t.Errorf("nothing typed: %q", got)
	}
	if got := completions(app, nil); len(got) != len(app.Commands) {
		t.Errorf("no words: %v", got)
	}
	for _, line := range []string{"probe --kind ", "probe --sa ", "devices l", "verify l", "flows --dev l"} {
		if words(line) == "" {
			t.Errorf("no value for %q", line)
		}
	}
}

func commandNames(app *cli.App) []string {
	var out []string
	for _, c := range app.Commands {
		out = append(out, c.Name)
	}
	return out
}

// TestCompletionInShells has each shell complete what is typed, with a tsoctl of this build.
func TestCompletionInShells(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, "tsoctl")); err != nil {
		t.Fatal(err)
	}
	for shell, script := range map[string]string{
		"bash": `
source tsoctl.bash
try() { COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=(); _tsoctl; echo "$1: ${COMPREPLY[*]}"; }
try "tsoctl pau"
try "tsoctl status -o "
try "tsoctl status --output=j"
try "tsoctl \$(touch evil) sta"
`,
		"zsh": `
autoload -Uz compinit; compinit -u -d dump
source ./tsoctl.zsh
_describe() { local -a list; list=("${(@P)2}"); print -r -- "$line_typed: ${list%%:*}"; }
try() { line_typed=$1; words=("${(@s: :)1}"); CURRENT=${#words}; _tsoctl; }
try "tsoctl pau"
try "tsoctl status -o "
try "tsoctl status --output=j"
`,
		"fish": `
source tsoctl.fish
for line in "tsoctl pau" "tsoctl status -o " "tsoctl status --output=j"
    echo "$line:" (complete -C "$line" | string replace -r '\t.*' '')
end
`,
	} {
		t.Run(shell, func(t *testing.T) {
			path, err := exec.LookPath(shell)
			if err != nil {
				t.Skipf("%s is missing (package %s)", shell, shell)
			}
			if err := os.WriteFile(filepath.Join(dir, "tsoctl."+shell), []byte(*shells[shell]), 0o644); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(path, "-c", script)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "HOME="+dir)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			values := "table json yaml"
			if shell == "fish" {
				values = "json table yaml" // it sorts
			}
			for _, want := range []string{"tsoctl pau: pause", "tsoctl status -o : " + values, "json\n"} {
				if !strings.Contains(string(out), want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
			if _, err := os.Stat(filepath.Join(dir, "evil")); err == nil {
				t.Error("what was typed was run")
			}
		})
	}
}

func TestManualPages(t *testing.T) {
	manualtest.Written(t, newApp(), "tsoctl.8", "tsoctl-pause.8")
	manualtest.Clean(t, &pages, newApp())
}
