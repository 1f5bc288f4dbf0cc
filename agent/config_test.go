package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/plan"
	"tsoagent/ethtool"
)

func TestReadConfigTellsEveryMistakeWithItsPlace(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		want []string // the lines of the error; one that ends in … is a beginning
	}{
		"unknown key":                         {"mod: observe\n", []string{`c.yaml:1: unknown key "mod" …`}},
		"unknown key with spaces":             {"mode: observe\n'my key': 1\n", []string{`c.yaml:2: unknown key "my key" …`}},
		"unknown key with an escape sequence": {"\"\\e[31m\\nx\": 1\n", []string{`c.yaml:1: unknown key "\x1b[31m\nx" …`}},
		"unknown key below":                   {"devices:\n  - match: a\n    dedicated: keep\n    gso: off\n", []string{`c.yaml:4: unknown key "gso" …`}},
		"several at once": {
			"mode: watch\nrestore_after: 5\nresync_every: 1s\nbogus: 1\npresume_mtu: 12\non_stop: never\n",
			[]string{
				`c.yaml:1: mode: "watch" is not one of enforce, observe`,
				`c.yaml:2: "5" is no duration with a unit such as 1s`,
				`c.yaml:3: resync_every: less than 1m`,
				`c.yaml:4: unknown key "bogus" …`,
				`c.yaml:5: presume_mtu: 12 is less than 576`,
				`c.yaml:6: on_stop: "never" is not one of restore, keep`,
			},
		},
		"wrong types": {
			"mode: [observe]\npresume_mtu: big\nmax_clones: {a: 1}\nfeatures: tx-tcp-segmentation\ndevices: keep\ntable: -1\nprotocol: 300\nrestore_after: [1s]\n",
			[]string{
				"c.yaml:1: a list is not a text", "c.yaml:2: big is not a number in range",
				"c.yaml:3: a mapping is not a number in range", "c.yaml:4: tx-tcp-... is not a list",
				"c.yaml:5: keep is not a list", "c.yaml:6: -1 is not a number in range",
				"c.yaml:7: 300 is not a number in range", `c.yaml:8: "" is no duration with a unit such as 1s`,
			},
		},
		"a value of two lines":    {"presume_mtu: \"a\\nb\\e\"\n", []string{`c.yaml:1: a\nb\x1b is not a number in range`}},
		"not a mapping":           {"- a\n- b\n", []string{"c.yaml:1: a list is not a mapping of keys to values"}},
		"a replacement character": {"\ufffd\n", []string{`c.yaml:1: \ufffd is not a mapping of keys to values`}},
		"a bare word":             {"observe\n", []string{"c.yaml:1: observe is not a mapping of keys to values"}},
		"syntax":                  {"mode: observe\n\tx: 1\n", []string{"c.yaml:2: …"}},
		"never closed":            {"mode: \"observe\n", []string{"c.yaml:…"}},
		"duplicate":               {"mode: observe\nmode: enforce\n", []string{`c.yaml:2: mapping key "mode" already defined at line 1`}},
		"second document":         {"mode: observe\n---\nmode: enforce\n", []string{"c.yaml:2: a second document: one file is one configuration"}},
		"not UTF-8":               {"mode: \xff\xfe\n", []string{"c.yaml…"}},
		"a control character":     {"mode: \x1b[31m\n", []string{"c.yaml…"}},
		"NUL":                     {"mode: observe\x00\n", []string{"c.yaml…"}},
		"duration without unit":   {"restore_after: 10\n", []string{`c.yaml:1: "10" is no duration with a unit such as 1s`}},
		"duration too large":      {"restore_after: 99999999999h\n", []string{`c.yaml:1: "99999999999h" is no duration …`}},
		"negative duration":       {"restore_after: -1s\n", []string{"c.yaml:1: restore_after: a negative duration"}},
		"one namespace":           {"mode: observe\nnamespaces: blue\n", []string{`c.yaml:2: namespaces: "blue" is neither all nor a list such as [host, blue]`}},
		"namespaces as a mapping": {"namespaces: {host: 1}\n", []string{"c.yaml:1: namespaces: not all, and not a list"}},
		"no namespace":            {"namespaces:\n- host\n- a/b\n- pid:x\n- [c]\n", []string{"c.yaml:5: a list is not a text"}},
		"names of namespaces":     {"namespaces:\n- host\n- a/b\n- pid:x\n- ''\n", []string{`c.yaml:3: namespaces: entry 2: "a/b" is neither a name in /run/netns nor an absolute path`, `c.yaml:4: namespaces: entry 3: "x" is no process number`, `c.yaml:5: namespaces: entry 4: an empty name`}},
		"users that are none": {"tcp_keys_trust:\n- frr\n- ''\n- 65534\n- 4294967295\n- a:b\n", []string{
			`c.yaml:3: tcp_keys_trust: entry 2: "" is neither the name of a user nor a number`,
			`c.yaml:4: tcp_keys_trust: entry 3: "65534" can't be trusted: 65534 stands for all users of other user namespaces who are nobody here`,
			`c.yaml:5: tcp_keys_trust: entry 4: "4294967295" is no user: "4294967295" is not a number below 4294967295`,
			`c.yaml:6: tcp_keys_trust: entry 5: "a:b" is neither the name of a user nor a number`,
		}},
		"users that are no list":  {"tcp_keys_trust: frr\n", []string{"c.yaml:1: frr is not a list"}},
		"keys too often":          {"tcp_keys_every: 5ms\n", []string{"c.yaml:1: tcp_keys_every: less than 100ms"}},
		"longer than a year":      {"restore_after: 8761h\nresync_every: 2562047h\ntcp_keys_every: 100000h\n", []string{"c.yaml:1: restore_after: more than 8760h, which is a year", "c.yaml:2: resync_every: more than 8760h …", "c.yaml:3: tcp_keys_every: more than 8760h …"}},
		"negative resync":         {"resync_every: -5m\n", []string{"c.yaml:1: resync_every: less than 1m"}},
		"zero is not the default": {"restore_after: 0s\n", []string{`c.yaml:1: "0s" is no duration above 0`}},
		"relative run_dir":        {"run_dir: run/x\n", []string{"c.yaml:1: run_dir: not an absolute path"}},
		"run_dir with NUL":        {"run_dir: \"/run/a\\0b\"\n", []string{`c.yaml:1: run_dir: …`}},
		"run_dir too long":        {"run_dir: /" + strings.Repeat("x", 100) + "\n", []string{`c.yaml:1: run_dir: …`}},
		"kernel's table":          {"table: 200\n", []string{"c.yaml:1: table: …"}},
		"table at the end":        {"table: 4294967280\n", []string{"c.yaml:1: table: …"}},
		"kernel's protocol":       {"protocol: 2\n", []string{"c.yaml:1: protocol: 2 is one of the kernel's and iproute2's own (0 to 4)"}},
		"unknown feature":         {"features: [tso]\n", []string{`c.yaml:1: features: "tso" is no feature that can be held: …`}},
		"metrics without port":    {"metrics: 127.0.0.1\n", []string{`c.yaml:1: metrics: "127.0.0.1" is neither off nor ADDRESS:PORT, as 127.0.0.1:15450`}},
		"metrics on a name":       {"metrics: localhost:15450\n", []string{`c.yaml:1: metrics: "localhost:15450" is neither off …`}},
		"metrics on port 0":       {"metrics: ':0'\n", []string{`c.yaml:1: metrics: ":0" is neither off …`}},
		"metrics on a service":    {"metrics: ':http'\n", []string{`c.yaml:1: metrics: ":http" is neither off …`}},
		"relative web config":     {"metrics_web_config: web.yml\n", []string{`c.yaml:1: metrics_web_config: "web.yml" is not an absolute path`}},
		"glob":                    {"devices:\n- {match: 'eth[', dedicated: keep}\n", []string{`c.yaml:2: devices: entry 1: "eth[" is no glob for a device name`}},
		"no glob": {"devices:\n- dedicated: keep\n- match: a\n", []string{
			`c.yaml:2: devices: entry 1: "" is no glob for a device name`, "c.yaml:3: devices: entry 2: dedicated, shared_nics or features is missing",
		}},
		"choice of a device":         {"devices:\n- {match: a, dedicated: maybe}\n", []string{`c.yaml:2: devices: entry 1: "maybe" is not one of auto, off, keep`}},
		"shared NICs of a device":    {"devices:\n- {match: a, shared_nics: ifb}\n", []string{`c.yaml:2: devices: entry 1: "ifb" is not one of keep, lane, off`}},
		"features of a device":       {"devices:\n- {match: a, features: [tso]}\n", []string{`c.yaml:2: devices: entry 1: "tso" is no feature that can be held: …`}},
		"shared NICs":                {"shared_nics: gso\n", []string{`c.yaml:1: shared_nics: "gso" is not one of keep, lane, off`}},
		"carrier MTU":                {"carrier_mtu: lane\n", []string{`c.yaml:1: carrier_mtu: "lane" is not one of route, device`}},
		"state directory":            {"state_dir: var\n", []string{`c.yaml:1: state_dir: not an absolute path`}},
		"glob with a newline":        {"devices:\n- {match: \"a\\nb\", dedicated: keep}\n", []string{`c.yaml:2: devices: entry 1: "a\nb" is no glob for a device name`}},
		"glob with escape sequence":  {"devices:\n- {match: \"a\\e[31m\", dedicated: keep}\n", []string{`c.yaml:2: devices: entry 1: "a\x1b[31m" is no glob for a device name`}},
		"glob that is not UTF-8":     {"devices:\n- {match: !!binary gIGC, dedicated: keep}\n", []string{`c.yaml:2: devices: entry 1: "\x80\x81\x82" is no glob for a device name`}},
		"glob with a slash or space": {"devices:\n- {match: a/b, dedicated: keep}\n- {match: a b, dedicated: keep}\n", []string{`c.yaml:2: devices: entry 1: "a/b" is no glob for a device name`, `c.yaml:3: devices: entry 2: "a b" is no glob for a device name`}},
		"value with escape sequence": {"mode: \"\\e[31m\"\n", []string{`c.yaml:1: mode: "\x1b[31m" is not one of enforce, observe`}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadConfig(strings.NewReader(c.file), "c.yaml")
			if err == nil {
				t.Fatal("no mistake found")
			}
			got := strings.Split(err.Error(), "\n")
			if len(got) != len(c.want) {
				t.Fatalf("%d lines, want %d:\n%s", len(got), len(c.want), err)
			}
			for i, want := range c.want {
				begin, rest := strings.CutSuffix(want, "…")
				if got[i] != want && (!rest || !strings.HasPrefix(got[i], strings.TrimSuffix(begin, " "))) {
					t.Errorf("line %d:\n got %s\nwant %s", i+1, got[i], want)
				}
				checkPrintable(t, got[i])
			}
			if m := (*Mistake)(nil); !errors.As(err, &m) || m.File != "c.yaml" {
				t.Errorf("no Mistake in the chain of %T", err)
			}
		})
	}
}

func checkPrintable(t *testing.T, s string) {
	t.Helper()
	for _, r := range s {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			t.Errorf("not printable: %q", s)
			return
		}
	}
}

func TestReadConfigDefaults(t *testing.T) {
	want := Config{
		Mode: Enforce, RunDir: "/run/tsoagent", StateDir: "/var/lib/tsoagent", RestoreAfter: Duration(time.Second), OnStop: RestoreOnStop, ResyncEvery: Duration(15 * time.Minute), TCPKeysEvery: Duration(10 * time.Second), TCPKeysTrust: []string{"root", "frr", "bird"}, Metrics: "127.0.0.1:15450",
		Namespaces: Namespaces{"host"},
		Plan: plan.Config{
			Dedicated: plan.Auto, SharedNICs: plan.SharedKeep, CarrierMTU: plan.CarrierRoute, MTU: plan.MTULock, Partial: plan.PartialTable, SourceLess: plan.Serve, Table: 5450, Protocol: 84,
			Features:             []ethtool.Feature{ethtool.TCPSegmentation, ethtool.TCPECNSegmentation, ethtool.TCP6Segmentation},
			MaxClonesPerCoverage: 1024, MaxClones: 65536,
		},
	}
	for name, file := range map[string]string{"empty": "", "comment": "# nothing\n", "null": "~\n", "empty mapping": "{}\n", "null values": "mode:\nrestore_after:\ndevices:\n", "byte order mark": "\ufeffmode: enforce\n", "document": "---\n...\n"} {
		got, err := ReadConfig(strings.NewReader(file), "c.yaml")
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if d := cmp.Diff(want, got.WithDefaults()); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	if d := cmp.Diff(want, Config{}.WithDefaults()); d != "" {
		t.Errorf("the zero value (-want +got):\n%s", d)
	}
	if wrong := want.Validate(); len(wrong) > 0 {
		t.Errorf("the defaults are wrong: %v", wrong)
	}
	if d := cmp.Diff(want, want.WithDefaults()); d != "" {
		t.Errorf("the defaults of the defaults (-want +got):\n%s", d)
	}
}

func TestReadConfigReadsEveryKey(t *testing.T) {
	got, err := ReadConfig(strings.NewReader(`
mode: observe
run_dir: /run/x
state_dir: /var/x
restore_after: 2s
on_stop: keep
resync_every: 1h
tcp_keys_every: 3s
tcp_keys_trust: [gobgp, 1000]
namespaces: [host, blue, /proc/1/ns/net, pid:7]
metrics: "[::1]:9100"
metrics_web_config: /etc/web.yml
dedicated: keep
devices:
  - {match: "ipsec*", dedicated: "off"}
  - {match: eth0, dedicated: auto, shared_nics: lane, features: [tx-tcp-segmentation]}
shared_nics: off
carrier_mtu: device
features: [tx-tcp-segmentation, tx-udp-segmentation]
mtu: advise
presume_mtu: 1400
partial: off
source_less_lookups: off
table: 7000
protocol: 99
max_clones_per_coverage: 5
max_clones: 6
`), "c.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Mode: Observe, RunDir: "/run/x", StateDir: "/var/x", RestoreAfter: Duration(2 * time.Second), OnStop: KeepOnStop, ResyncEvery: Duration(time.Hour), TCPKeysEvery: Duration(3 * time.Second), TCPKeysTrust: []string{"gobgp", "1000"},
		Namespaces: Namespaces{"host", "blue", "/proc/1/ns/net", "pid:7"},
		Metrics:    "[::1]:9100", MetricsWebConfig: "/etc/web.yml",
		Plan: plan.Config{
			Dedicated: plan.Keep, Devices: []plan.DeviceConfig{{Match: "ipsec*", Dedicated: plan.Off}, {Match: "eth0", Dedicated: plan.Auto, SharedNICs: plan.SharedLane, Features: []ethtool.Feature{ethtool.TCPSegmentation}}},
			SharedNICs: plan.SharedOff, CarrierMTU: plan.CarrierDevice,
			Features: []ethtool.Feature{ethtool.TCPSegmentation, ethtool.UDPSegmentation}, MTU: plan.MTUAdvise, PresumeMTU: 1400,
			Partial: plan.PartialOff, SourceLess: plan.ServeOff, Table: 7000, Protocol: 99, MaxClonesPerCoverage: 5, MaxClones: 6,
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestReadConfigRefusesWhatIsTooLarge(t *testing.T) {
	_, err := ReadConfig(strings.NewReader(strings.Repeat("# filler\n", maxConfig/9+1)), "c.yaml")
	if m := (*Mistake)(nil); !errors.As(err, &m) || err.Error() != "c.yaml: larger than 1048576 bytes" {
		t.Errorf("got %v", err)
	}
	_, err = ReadConfig(endless{}, "c.yaml")
	if err == nil {
		t.Error("an endless file was read")
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = '#'
	}
	return len(b), nil
}

// A few lines of aliases can stand for billions of values.
func TestReadConfigSurvivesAliasBombs(t *testing.T) {
	for name, file := range map[string]string{
		"unknown key": bomb("zero"),
		"features":    bomb("features"),
		"devices":     bomb("devices"),
		"merge":       "a: &a {mode: x}\n<<: *a\nb: &b {<<: *a}\n<<: [*a, *b, *a]\n",
		"itself":      "devices: &d\n- *d\n",
	} {
		began := time.Now()
		_, err := ReadConfig(strings.NewReader(file), "c.yaml")
		if err == nil {
			t.Errorf("%s: accepted", name)
		} else if n := len(err.Error()); n > 1<<16 {
			t.Errorf("%s: an error of %d bytes", name, n)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("%s: took %s", name, took)
		}
	}
}

func bomb(key string) string {
	s := "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
	for i := range 10 {
		n, m := string(rune('0'+i)), string(rune('1'+i))
		s += "a" + m + ": &a" + m + " [" + strings.TrimSuffix(strings.Repeat("*a"+n+",", 10), ",") + "]\n"
	}
	return s + key + ": *a9\n"
}

func TestLoadConfigNamesTheFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadConfig(filepath.Join(dir, "none.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := LoadConfig(dir); err == nil {
		t.Error("a directory was read")
	}
	file := filepath.Join(dir, "c.yaml")
	if err := os.WriteFile(file, []byte("mode: watch\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(file); err == nil || !strings.HasPrefix(err.Error(), file+":1: ") {
		t.Errorf("got %v", err)
	}
}

func FuzzReadConfig(f *testing.F) {
	for _, s := range []string{
		"", "mode: observe\n", "mode: watch\nbogus: 1\n", "devices:\n- {match: 'a*', dedicated: keep}\n", "restore_after: 1s\ntable: 7000\n",
		bomb("features"), "a: &a [*a]\n", "\"\\e\\n\": 1\n", "mode: !!binary gIGC\n", "<<: {mode: observe}\n", "? [a]\n: b\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ReadConfig(strings.NewReader(string(data)), "c.yaml")
		if err == nil {
			if wrong := c.Validate(); len(wrong) > 0 {
				t.Errorf("accepted, and wrong: %v", wrong)
			}
			if wrong := c.WithDefaults().Validate(); len(wrong) > 0 {
				t.Errorf("accepted, and wrong with defaults: %v", wrong)
			}
			return
		}
		for line := range strings.Lines(err.Error()) {
			line = strings.TrimSuffix(line, "\n")
			if !strings.HasPrefix(line, "c.yaml:") {
				t.Errorf("a line without its place: %q of\n%v", line, err)
			}
			checkPrintable(t, line)
		}
	})
}

// TestSetIsAsTheFile sets each key once as a flag does, and reads the same from a file.
func TestSetIsAsTheFile(t *testing.T) {
	values := map[string][]string{
		"mode": {"observe"}, "run_dir": {"/a"}, "state_dir": {"/b"}, "restore_after": {"5s"}, "on_stop": {"keep"}, "resync_every": {"2m"},
		"tcp_keys_every": {"1s"}, "tcp_keys_trust": {"root", "998"}, "namespaces": {"host", "a"}, "metrics": {"off"}, "metrics_web_config": {"/c"}, "dedicated": {"off"},
		"shared_nics": {"lane"}, "features": {"tx-tcp-segmentation", "tx-udp-segmentation"}, "mtu": {"advise"}, "presume_mtu": {"1400"},
		"partial": {"clamp"}, "carrier_mtu": {"device"}, "source_less_lookups": {"off"}, "table": {"7000"}, "protocol": {"99"},
		"max_clones_per_coverage": {"5"}, "max_clones": {"10"},
	}
	var c Config
	var file strings.Builder
	for key, list := range Keys() {
		v := values[key]
		if len(v) == 0 {
			t.Errorf("no value for %s in this test", key)
			continue
		}
		if err := c.Set(key, v...); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		if list {
			fmt.Fprintf(&file, "%s: [%s]\n", key, strings.Join(v, ", "))
		} else {
			fmt.Fprintf(&file, "%s: %s\n", key, v[0])
		}
	}
	want, err := ReadConfig(strings.NewReader(file.String()), "x")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, c); d != "" {
		t.Errorf("(-file +set):\n%s", d)
	}
	for key, v := range map[string]string{"restore_after": "5", "table": "-1", "nope": "x", "devices": "x"} {
		before := c
		var m *Mistake
		if err := c.Set(key, v); !errors.As(err, &m) || m.Line != 0 {
			t.Errorf("%s: %s gives %v", key, v, err)
		}
		if d := cmp.Diff(before, c); d != "" {
			t.Errorf("%s: refused, and yet (-before +after):\n%s", key, d)
		}
	}
}
