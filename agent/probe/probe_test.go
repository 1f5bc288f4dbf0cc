package probe

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func thisKernel() Identity {
	return Identity{
		Release: "6.12.117", KernelVersion: "#1 SMP Debian", Machine: "x86_64",
		Modules: map[string]ModuleState{"esp4": Loaded, esp4Offload: Loaded, esp6Offload: Available, "ip_gre": Available, "vxlan": Absent},
	}
}

func TestResultIsValidForItsKernelOnly(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Identity)
		want   string // part of the error, "" for valid
	}{
		{"the same", func(*Identity) {}, ""},
		{"another release", func(id *Identity) { id.Release = "6.12.107" }, "this is 6.12.107"},
		{"another build of the same release", func(id *Identity) { id.KernelVersion = "#2 SMP Debian" }, `this is "#2 SMP Debian"`},
		{"another machine", func(id *Identity) { id.Machine = "aarch64" }, "aarch64"},
		{"a tunnel's module was loaded", func(id *Identity) { id.Modules["ip_gre"] = Loaded }, ""},
		{"ESP's module was unloaded", func(id *Identity) { id.Modules["esp4"] = Available }, ""},
		{"a tunnel's module is gone", func(id *Identity) { id.Modules["ip_gre"] = Absent }, "ip_gre was available, and is absent"},
		{"a tunnel's module came", func(id *Identity) { id.Modules["vxlan"] = Available }, "vxlan was absent"},
		{"ESP GSO is not loaded yet", func(id *Identity) { id.Modules[esp4Offload] = Available }, ""},
		{"ESP GSO is gone", func(id *Identity) { id.Modules[esp4Offload] = Absent }, "esp4_offload was loaded"},
		{"ESP GSO was loaded since", func(id *Identity) { id.Modules[esp6Offload] = Loaded }, "esp6_offload was available, and is loaded"},
		{"a module that was not looked at", func(id *Identity) { id.Modules["new"] = Loaded }, "module new"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			now := thisKernel()
			tt.change(&now)
			err := (&Result{Version: Version, Kernel: thisKernel()}).Valid(now)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got %v, want valid", err)
			case tt.want != "" && (!errors.Is(err, ErrOtherKernel) || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want ErrOtherKernel with %q", err, tt.want)
			}
		})
	}
}

func someResult() *Result {
	return &Result{
		Version: Version, Time: time.Date(2026, 11, 22, 13, 0, 0, 0, time.UTC), Seconds: 1.5, Kernel: thisKernel(),
		Cases: []Case{
			{Kind: "gre", Outer: IPv4, Mode: Transport, SA: DefaultSA, Verdict: Broken, Why: "w", Paths: []Path{
				{Inner: IPv6, Verdict: Broken, TSOOn: flow(2, 24, 6, Counters{"sender tun tx_dropped": 3}), TSOOff: flow(100, 0, 0, nil), UDP: &UDP{Verdict: Broken}},
			}},
			{Kind: "gre", Outer: IPv4, Mode: Tunnel, SA: DefaultSA, Verdict: Healthy, Paths: []Path{{Inner: IPv4, Verdict: Healthy, UDP: &UDP{Verdict: Healthy}}}},
			{Kind: "vxlan", Outer: IPv6, Mode: Tunnel, SA: DefaultSA, Verdict: Slower},
		},
	}
}

func TestSavedResultIsLoadedAsItWas(t *testing.T) {
	path := FileIn(filepath.Join(t.TempDir(), "made"))
	want := someResult()
	for range 2 { // the second replaces the first
		if err := want.Save(path); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("got mode %v, %v; want 0644", info.Mode(), err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v in the directory; want the result alone", entries, err)
	}
}

// The result decides what keeps its offload: it is root's, or nobody's. A FIFO must not hold up the agent's start.
func TestLoadRefusesWhatOthersCanHaveMade(t *testing.T) {
	for says, prepare := range map[string]func(path string) error{
		"symbolic link":   func(path string) error { return os.Symlink("/etc/hostname", path) },
		"no regular file": func(path string) error { return unix.Mkfifo(path, 0o644) },
		"writable for everybody": func(path string) error {
			return errors.Join(os.WriteFile(path, []byte("{}"), 0o644), os.Chmod(path, 0o666))
		},
		"is larger than": func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, 1<<40)) },
	} {
		path := filepath.Join(t.TempDir(), "probe.json")
		if err := prepare(path); err != nil {
			t.Fatal(err)
		}
		if r, err := Load(path); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, %v; want an error that says %q", r, err, says)
		}
	}
}

func TestLoadRefusesWhatItDoesNotKnow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "probe.json")
	if _, err := Load(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: got %v, want os.ErrNotExist", err)
	}
	for text, want := range map[string]string{
		`{"version": 2, "cases": "another format"}`: "version 2, not 1",
		`{}`: "version 0, not 1",
		`{"version": 1, "cases": [{"outer": "appletalk"`:    "unexpected end",
		`{"version": 1, "cases": [{"outer": "appletalk"}]}`: `"appletalk" is no address family`,
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if r, err := Load(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, %v; want %q", text, r, err, want)
		}
	}
}

func TestLookup(t *testing.T) {
	r := someResult()
	for _, tt := range []struct {
		kind       string
		outer      Family
		mode, sa   string
		known      bool
		keep, udps bool
	}{
		{"gre", IPv4, Transport, DefaultSA, true, false, true},
		{"gre", IPv4, Tunnel, DefaultSA, true, true, false},
		{"vxlan", IPv6, Tunnel, DefaultSA, true, false, false},
		{"vxlan", IPv4, Tunnel, DefaultSA, false, false, false},
		{"gretap", IPv4, Tunnel, DefaultSA, false, false, false},
		{"gre", IPv4, Tunnel, "cbc(aes)+hmac(sha256)", false, false, false},
	} {
		c, ok := r.Lookup(tt.kind, tt.outer, tt.mode, tt.sa)
		if ok != tt.known || c.KeepTSO() != tt.keep || c.BreaksUDP() != tt.udps {
			t.Errorf("%s %s %s %s: got %v, keep %v, breaks udp %v; want %v, %v, %v", tt.kind, tt.outer, tt.mode, tt.sa, ok, c.KeepTSO(), c.BreaksUDP(), tt.known, tt.keep, tt.udps)
		}
	}
	if _, ok := (*Result)(nil).Lookup("gre", IPv4, Tunnel, DefaultSA); ok {
		t.Error("no result knows a case")
	}
}

func TestMergeKeepsWhatWasNotMeasuredAgain(t *testing.T) {
	fresh := func() *Result {
		return &Result{Version: Version, Kernel: thisKernel(), Cases: []Case{{Kind: "gre", Outer: IPv4, Mode: Transport, SA: DefaultSA, Verdict: Healthy}}}
	}
	r := fresh()
	r.Merge(someResult())
	if c, _ := r.Lookup("gre", IPv4, Transport, DefaultSA); c.Verdict != Healthy || len(r.Cases) != 3 {
		t.Errorf("got %s and %d cases, want the fresh verdict and 3", c.Verdict, len(r.Cases))
	}
	old := someResult()
	old.Kernel.Release = "6.1.0"
	r = fresh()
	if r.Merge(old); len(r.Cases) != 1 {
		t.Errorf("got %d cases, want none of another kernel's", len(r.Cases))
	}
}

func TestSAName(t *testing.T) {
	for _, tt := range []struct{ enc, auth, aead, want string }{
		{"", "", "rfc4106(gcm(aes))", "rfc4106(gcm(aes))"},
		{"cbc(aes)", "hmac(sha256)", "", "cbc(aes)+hmac(sha256)"},
		{"cbc(aes)", "", "", "cbc(aes)"},
		{"", "hmac(sha1)", "", "hmac(sha1)"},
	} {
		if got := SAName(tt.enc, tt.auth, tt.aead); got != tt.want {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
}

func TestTasks(t *testing.T) {
	all, err := tasksFor(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, task := range all {
		if seen[task.String()] {
			t.Errorf("%s comes twice", task)
		}
		seen[task.String()] = true
	}
	for _, want := range []string{"gre ipv4 transport", "gre ipv4 tunnel", "sit ipv4 transport", "ip6tnl ipv6 tunnel", "vxlan ipv6 transport", "geneve ipv4 tunnel", "xfrm ipv6 tunnel"} {
		if !seen[want] {
			t.Errorf("%s is missing", want)
		}
	}
	two, err := tasksFor([]string{"ip6tnl"}, []string{"aes-gcm", "rfc4106(gcm(aes))", "aes-cbc-sha256"})
	if err != nil || len(two) != 4 || len(two[0].shapes) != 2 {
		t.Errorf("got %v, %v; want two modes for each of two SAs, in two variants", two, err)
	}
	if _, err := tasksFor([]string{"vti"}, nil); err == nil || !strings.Contains(err.Error(), `no kind "vti"`) {
		t.Errorf("got %v", err)
	}
	if _, err := tasksFor(nil, []string{"rot13"}); err == nil || !strings.Contains(err.Error(), `no SA "rot13"`) {
		t.Errorf("got %v", err)
	}
}

func TestVerdictsAreNamedInJSON(t *testing.T) {
	b, err := json.Marshal(someResult())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"version":1`, `"outer":"ipv4"`, `"verdict":"broken"`, `"tso_on":{`, `"udp_segment":{`, `"esp4_offload":"loaded"`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s is missing in %s", want, b)
		}
	}
}
