package probe

import (
	"strings"
	"testing"
)

// flow is a measured one, with super-packets on the wire or without.
func flow(mbps float64, retransmits uint64, super int, c Counters) Flow {
	f := Flow{Runs: []float64{mbps}, Mbps: mbps, Acked: uint64(mbps * 1e6 / 8), Seconds: 1, Retransmits: retransmits, Counters: c}
	f.Wire = Wire{Packets: 24, Super: super, Largest: 1300}
	f.NIC = Wire{Packets: 40, Largest: 1390}
	return f
}

func TestJudgeTCP(t *testing.T) {
	drops := Counters{"sender tun tx_dropped": 10}
	errors := Counters{"receiver xfrm XfrmInStateProtoError": 34}
	with := func(f Flow, change func(*Flow)) Flow {
		change(&f)
		return f
	}
	for _, tt := range []struct {
		name    string
		on, off Flow
		want    Verdict
		why     string
	}{
		{"collapse with drops at the sender", flow(2.5, 80, 6, drops), flow(54, 0, 0, nil), Broken, "2.5 Mbit/s with TSO on, 54 with it off, 80 and 0 retransmits; sender tun tx_dropped 10"},
		{"collapse with errors at the receiver", flow(0.1, 24, 6, errors), flow(275, 0, 0, nil), Broken, "XfrmInStateProtoError 34"},
		{"nothing at all gets through", flow(0, 9, 6, drops), flow(275, 0, 0, nil), Broken, "0.0 Mbit/s"},
		{"a third is no collapse", flow(34, 3, 24, nil), flow(100, 0, 0, nil), Slower, "34 Mbit/s with TSO on, 100 with it off"},
		{"slow without any loss is no breakage", flow(10, 0, 24, nil), flow(100, 0, 0, nil), Slower, ""},
		{"losses of both are no reason", flow(10, 500, 24, drops), flow(100, 5000, 0, drops), Slower, ""},
		{"a few losses and a busy machine are no breakage", flow(30, 3, 24, drops), flow(100, 1, 0, nil), Slower, ""},
		{"slower by more than the tolerance", flow(89, 0, 24, nil), flow(100, 0, 0, nil), Slower, ""},
		{"slower within the tolerance", flow(91, 0, 24, nil), flow(100, 0, 0, nil), Healthy, ""},
		{"losses now and then", with(flow(300, 5000, 24, drops), func(f *Flow) { f.Acked /= 2 }), flow(300, 0, 0, nil), Slower, "lost now and then"},
		{"faster", flow(300, 1, 24, nil), flow(250, 0, 0, nil), Healthy, "300 Mbit/s with TSO on, 250 with it off"},
		{"only super-packets flow", flow(300, 0, 24, nil), flow(0, 24, 0, nil), Healthy, ""},
		{"nothing flows", flow(0.1, 24, 6, drops), flow(0.1, 24, 0, errors), Unclear, "flows neither with TSO on nor off"},
		{"no super-packet with TSO on", flow(100, 0, 0, nil), flow(100, 0, 0, nil), Unclear, "no super-packet left by the tunnel device with TSO on"},
		{"super-packets with TSO off", flow(100, 0, 24, nil), flow(100, 0, 3, nil), Unclear, "with TSO off, so there is nothing"},
		{"too little was seen with TSO off", flow(100, 0, 24, nil), with(flow(100, 0, 0, nil), func(f *Flow) { f.Wire.Packets = leastSeen - 1 }), Unclear, "only 7 packets"},
		{"not covered", flow(100, 0, 24, nil), with(flow(100, 0, 0, nil), func(f *Flow) { f.NIC.Clear = 1 }), Unclear, "in the clear"},
		{"no ESP on the NIC", flow(100, 0, 24, nil), with(flow(100, 0, 0, nil), func(f *Flow) { f.NIC = Wire{} }), Unclear, "in the clear"},
		{"all dropped ahead of the NIC", with(flow(0.1, 24, 6, drops), func(f *Flow) { f.NIC = Wire{} }), flow(100, 0, 0, nil), Broken, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, why := judgeTCP(tt.on, tt.off)
			if got != tt.want || !strings.Contains(why, tt.why) {
				t.Errorf("got %s: %s; want %s: …%s…", got, why, tt.want, tt.why)
			}
		})
	}
}

func TestJudgeUDP(t *testing.T) {
	burst := func(arrived, super int) Burst {
		return Burst{Sent: 100, Arrived: arrived, Wire: Wire{Packets: 20, Super: super}, Counters: Counters{"sender tun tx_dropped": uint64(100 - arrived)}}
	}
	for _, tt := range []struct {
		name    string
		on, off Burst
		want    Verdict
		why     string
	}{
		{"all lost with the feature on", burst(0, 10), burst(100, 0), Broken, "0 of 100 datagrams arrive with tx-udp-segmentation on, 100 of 100 with it off; sender tun tx_dropped 100"},
		{"all lost, none seen ahead of the driver", burst(0, 0), burst(100, 0), Broken, ""},
		{"all arrive", burst(100, 10), burst(100, 0), Healthy, ""},
		{"a few lost", burst(90, 10), burst(100, 0), Healthy, ""},
		{"some lost", burst(70, 10), burst(100, 0), Unclear, ""},
		{"all lost both ways", burst(0, 10), burst(0, 0), Unclear, ""},
		{"arrive with the feature on alone", burst(100, 10), burst(0, 0), Healthy, ""},
		{"no super-packet", burst(100, 0), burst(100, 0), Unclear, "no super-packet"},
		{"super-packets both ways", burst(100, 10), burst(100, 10), Unclear, "with tx-udp-segmentation off"},
		{"nothing sent", Burst{}, burst(100, 0), Unclear, "nothing was sent"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, why := judgeUDP(tt.on, tt.off)
			if got != tt.want || !strings.Contains(why, tt.why) {
				t.Errorf("got %s: %s; want %s: …%s…", got, why, tt.want, tt.why)
			}
		})
	}
}

func TestUndecidedBetweenCollapseAndEquallyFast(t *testing.T) {
	for _, tt := range []struct {
		on, off     float64
		retransmits uint64
		want        bool
	}{
		{1, 100, 50, false}, {1, 100, 5, true}, {16, 100, 500, false}, {20, 100, 500, true}, {60, 100, 0, true},
		{94, 100, 0, true}, {96, 100, 0, false}, {150, 100, 0, false}, {1, 0, 0, false}, {0, 100, 1, false}, {0, 0, 0, true},
	} {
		if got := undecided(flow(tt.on, tt.retransmits, 6, nil), flow(tt.off, 0, 0, nil)); got != tt.want {
			t.Errorf("%v of %v Mbit/s, %d retransmits: got %v, want %v", tt.on, tt.off, tt.retransmits, got, tt.want)
		}
	}
}

func TestCaseTakesTheWorstPath(t *testing.T) {
	path := func(v Verdict, inner Family, on float64) Path {
		return Path{Verdict: v, Why: string(v) + " " + inner.String(), Inner: inner, TSOOn: Flow{Mbps: on}, TSOOff: Flow{Mbps: 100}}
	}
	for _, tt := range []struct {
		name  string
		paths []Path
		want  Verdict
		why   string
		keep  bool
	}{
		{"one broken", []Path{path(Healthy, IPv4, 100), path(Broken, IPv6, 1)}, Broken, "ipv6 inside: broken", false},
		{"unclear is no reason to keep", []Path{path(Unclear, IPv4, 0), path(Healthy, IPv6, 100)}, Unclear, "ipv4 inside: unclear", false},
		{"unclear hides no breakage", []Path{path(Unclear, IPv4, 0), path(Broken, IPv6, 1)}, Broken, "", false},
		{"slower", []Path{path(Healthy, IPv4, 100), path(Slower, IPv6, 80)}, Slower, "", false},
		{"what the kernel lacks doesn't count", []Path{path(Healthy, IPv4, 100), path(Impossible, IPv4, 0)}, Healthy, "", true},
		{"the kernel lacks it all", []Path{path(Impossible, IPv4, 0), path(Impossible, IPv6, 0)}, Impossible, "", false},
		{"of two healthy ones the slower", []Path{path(Healthy, IPv4, 110), path(Healthy, IPv6, 95)}, Healthy, "ipv6 inside", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := Case{Paths: tt.paths}
			c.Verdict, c.Why = judgeCase(tt.paths)
			if c.Verdict != tt.want || !strings.Contains(c.Why, tt.why) || c.KeepTSO() != tt.keep {
				t.Errorf("got %s: %s, keep %v; want %s: …%s…, keep %v", c.Verdict, c.Why, c.KeepTSO(), tt.want, tt.why, tt.keep)
			}
		})
	}
}
