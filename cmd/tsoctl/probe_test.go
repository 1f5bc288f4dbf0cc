package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/agent/probe"
	"tsoagent/cmd/internal/commandtest"
)

func probed4(kind string, v probe.Verdict, on, off float64) probe.Case {
	c := probe.Case{Kind: kind, Outer: probe.IPv4, Mode: probe.Transport, SA: probe.DefaultSA, Verdict: v, Why: "because"}
	c.Paths = []probe.Path{{
		Inner: probe.IPv4, Verdict: v, Why: "because",
		TSOOn: probe.Flow{Mbps: on, Retransmits: 24}, TSOOff: probe.Flow{Mbps: off},
		UDP: &probe.UDP{Verdict: v, Why: "lost"},
	}}
	return c
}

func TestProbeTable(t *testing.T) {
	r := &probe.Result{
		Version: probe.Version, Seconds: 12.3, Loaded: []string{"ip_gre"},
		Kernel: probe.Identity{
			Release: "6.12.117", KernelVersion: "#1 SMP", Machine: "x86_64",
			Modules: map[string]probe.ModuleState{"esp4_offload": probe.Loaded, "esp6_offload": probe.Absent},
		},
		Cases: []probe.Case{
			probed4("gre", probe.Broken, 2.54, 54),
			probed4("ipip", probe.Broken, 3.6, 67),
			probed4("gretap", probe.Healthy, 280.7, 270.9),
			{Kind: "l2tp", Outer: probe.IPv4, Mode: probe.Transport, SA: probe.DefaultSA, Verdict: probe.Impossible, Why: "none"},
		},
	}
	var out bytes.Buffer
	probeTable(page{Writer: &out}, r, "/var/lib/tsoagent/probe.json")
	want := `Linux 6.12.117 x86_64, #1 SMP
ESP GSO: esp4_offload loaded, esp6_offload absent
modules that were loaded for this: ip_gre
above ESP with rfc4106(gcm(aes))

KIND    OUTER  MODE       TSO ON  OFF    RETRANS  VERDICT       UDP_SEGMENT
gre     ipv4   transport  2.5     54.0   24/0     broken        broken
ipip    ipv4   transport  3.6     67.0   24/0     broken        broken
gretap  ipv4   transport  280.7   270.9  24/0     healthy       healthy
l2tp    ipv4   transport  -       -      -        not possible  -
TSO ON and OFF are in Mbit/s, RETRANS in segments with TSO on and off.
! gre ipv4 transport, ipip ipv4 transport: broken: because
! gre ipv4 transport, ipip ipv4 transport: UDP_SEGMENT broken: lost
! l2tp ipv4 transport: not possible: none
written to /var/lib/tsoagent/probe.json, took 12 s
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	r.Cases[1].SA = "cbc(aes)+hmac(sha256)"
	out.Reset()
	probeTable(page{Writer: &out}, r, "f")
	for _, want := range []string{"MODE       SA ", "transport  cbc(aes)+hmac(sha256)  3.6"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}

func TestProgress(t *testing.T) {
	c := probed4("gre", probe.Broken, 1, 2)
	var out bytes.Buffer
	plain := progress{&out, 0}
	plain.tell(probe.Progress{Total: 2, Next: "gre ipv4 transport"})
	plain.tell(probe.Progress{Done: 1, Total: 2, Case: &c, Next: "gre ipv4 tunnel"})
	plain.end()
	if want := "1/2 gre ipv4 transport: broken\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	out.Reset()
	bar := progress{&out, 50}
	bar.tell(probe.Progress{Done: 1, Total: 2, Case: &c, Next: "gre ipv4 tunnel"})
	if want := fmt.Sprintf("\r%-49s", "[##########..........] 1/2 gre ipv4 tunnel"); out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	out.Reset()
	if bar.end(); strings.TrimSpace(out.String()) != "" || !strings.HasSuffix(out.String(), "\r") {
		t.Errorf("got %q, want an empty line", out.String())
	}
}

// TestWaiting tells what is waited for once a second has passed, and takes it away; where there is no terminal it says nothing.
func TestWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			width int
			took  time.Duration
			want  string
		}{
			{0, time.Minute, ""},
			{50, 900 * time.Millisecond, ""},
			{50, 2500 * time.Millisecond, fmt.Sprintf("\r%-49s\r%-49s\r%49s\r", "reading: 1 s", "reading: 2 s", "")},
		} {
			var out bytes.Buffer
			stop := (&progress{&out, tt.width}).waiting("reading")
			time.Sleep(tt.took) // of the bubble's clock
			stop()
			if out.String() != tt.want {
				t.Errorf("%d columns, %v: %q, want %q", tt.width, tt.took, out.String(), tt.want)
			}
		}
	})
}

// TestProbeWithoutESP runs the command as it is on this kernel. Where that has ESP, the
// scenario 60-probe shows what it does there.
func TestProbeWithoutESP(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: no network namespace can be made")
	}
	dir := filepath.Join(t.TempDir(), "state")
	out, errOut, code := commandtest.NewSelf(t, "tsoctl").Run(t, false, "probe", "--kind", "vxlan", "-o", "json", "--state-dir", dir)
	var r probe.Result
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v in %s%s", err, out, errOut)
	}
	if r.Measured() > 0 {
		t.Skip("this kernel has ESP: that it is missing can't be seen here")
	}
	if code != exitFailed || !strings.Contains(errOut, "nothing could be measured") || !strings.Contains(errOut, "4/4 vxlan ipv6 tunnel: not possible\n") {
		t.Errorf("got exit code %d and %q", code, errOut)
	}
	saved, err := probe.Load(probe.FileIn(dir))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&r, saved); diff != "" {
		t.Errorf("printed and saved (-printed +saved)\n%s", diff)
	}
}

func TestProbeSaysThatItNeedsRoot(t *testing.T) {
	dir := t.TempDir()
	out, errOut, code := commandtest.NewSelf(t, "tsoctl").Run(t, true, "probe", "--kind", "gre", "--state-dir", filepath.Join(dir, "state"))
	if code != exitFailed || len(out) > 0 || !strings.HasPrefix(errOut, "tsoctl: run it as root (it needs CAP_SYS_ADMIN and CAP_NET_ADMIN") || strings.Count(errOut, "\n") != 1 {
		t.Errorf("got exit code %d, %q and %q", code, out, errOut)
	}
}
