package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"tsoagent/agent/verify"
)

// right is what verify says where all is as it should be.
func right() *verify.Result {
	return &verify.Result{
		Version: verify.Version, Live: true, OK: true, Says: "covered flows are cut, others are not", Seconds: 5,
		Devices: []verify.DeviceResult{
			{Device: "ipsec1", Index: 7, MTU: 1500, Classes: []verify.ClassResult{
				{Class: verify.Covered, Policy: 17, Family: "ipv4", Packets: 1012, Bytes: 1_455_256, Largest: 1438, State: verify.StateCut, Says: "cut"},
			}},
			{Device: "nic1", Index: 2, MTU: 1500, Classes: []verify.ClassResult{
				{Class: verify.Covered, Policy: 17, MorePolicies: 2, As: "esp", Family: "ipv4", Packets: 1012, Bytes: 1_517_000, Largest: 1500, State: verify.StateCut, Says: "cut"},
				{Class: verify.Signed, State: verify.StateNothing, Says: "no traffic of this class in 5 s"},
				{Class: verify.Uncovered, Family: "ipv4", Packets: 60_250, Bytes: 3_912_340_000, SuperPackets: 60_001, Largest: 65_226, Segment: 1448, State: verify.StateWhole, Says: "super-packets"},
				{Class: verify.Uncovered, Family: "ipv6", Packets: 12, Bytes: 864, Largest: 72, State: verify.StateSmall, Says: "nothing large enough to tell, or too few"},
				{Class: verify.Other, Packets: 3, Bytes: 138, Largest: 46, State: verify.StateSeen, Says: "nothing to judge"},
			}},
		},
	}
}

// wrong has all that can be wrong.
func wrong() *verify.Result {
	return &verify.Result{
		Version: verify.Version, Netns: "blue", Seconds: 0.5, Stale: true, Changed: true,
		Says: "not as it should be: covered flows are not cut on ipsec1; covered flows leave in the clear by nic1; flows that are not covered are cut on nic1",
		Devices: []verify.DeviceResult{
			{Device: "ipsec1", Index: 7, MTU: 1500, Classes: []verify.ClassResult{
				{Class: verify.Covered, Policy: 17, Family: "ipv4", Packets: 12, Bytes: 480_000, SuperPackets: 12, Largest: 40_000, Segment: 1398, State: verify.StateWhole, Wrong: true, Says: "NOT cut: TSO is to be off on ipsec1 and is on"},
			}},
			{Device: "nic1", Index: 2, MTU: 1500, Dropped: 7, Untold: 3, Unreadable: 1, Down: true, Classes: []verify.ClassResult{
				{Class: verify.Clear, Policy: 49, Family: "ipv6", Packets: 2, Bytes: 3000, Largest: 1500, State: verify.StateSeen, Wrong: true, Says: "left as they are although a policy covers them: past IPsec"},
				{Class: verify.Uncovered, Family: "ipv4", Packets: 200, Bytes: 300_000, Largest: 1500, State: verify.StateCut, Wrong: true, Says: "cut, too: TSO is off on nic1, and not by us"},
			}},
		},
		Notes: []string{"nic1: 7 packets more left than could be looked at: the figures are of a part"},
	}
}

func TestVerifyJSONGolden(t *testing.T) {
	got, err := json.MarshalIndent([]*verify.Result{right(), wrong()}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	golden(t, "verify.json", got)
}

// A machine with many policies has a table that fits some screens, and what is wrong is said all the same.
func TestVerifyTableIsBounded(t *testing.T) {
	r := right()
	for i := range uint32(100) {
		r.Devices[0].Classes = append(r.Devices[0].Classes, verify.ClassResult{Class: verify.Covered, Policy: 100 + i, State: verify.StateCut, Says: "cut", Packets: 1})
	}
	r.Devices[0].Classes[90].Wrong, r.Devices[0].Classes[90].Says = true, "NOT cut"
	var b bytes.Buffer
	verifyTable(page{&b, 80}, r)
	lines := strings.Count(b.String(), "\n")
	if lines > screenOfClasses+10 || !strings.Contains(b.String(), "! ipsec1, policy 189: NOT cut\n") || !strings.Contains(b.String(), "66 more classes are in -o json\n") {
		t.Errorf("%d lines:\n%s", lines, b.String())
	}
}

func TestVerifyProgress(t *testing.T) {
	var out bytes.Buffer
	plain := progress{&out, 0}
	plain.look(time.Second, 5*time.Second, 10)
	if out.Len() > 0 {
		t.Errorf("where there is no terminal: %q", out.String())
	}
	bar := progress{&out, 60}
	bar.look(2500*time.Millisecond, 5*time.Second, 1)
	if want := fmt.Sprintf("\r%-59s", "[##########..........] 2.5 of 5 s, 1 packet"); out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 999: "999 B", 1000: "1 kB", 1_455_256: "1.46 MB", 999_600: "1 MB", 3_912_340_000: "3.91 GB", 1<<64 - 1: "18.4 EB"} {
		if got := size(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}
