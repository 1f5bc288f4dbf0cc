// Package probe measures what this kernel makes of TCP and UDP super-packets in tunnels above
// ESP, and keeps the result.
//
// Tunnels above ESP collapse on some kernels unless TSO is off on the tunnel device, and on
// others TSO off only costs throughput (docs/KERNEL.md 5). Which, depends on the kernel's
// build, on the modules for ESP, on the kind of tunnel and on the SA, and nothing in the kernel
// says so. So it is measured, in scratch network namespaces:
//
//	sender                                             receiver
//	TCP, UDP ─> tunnel device ─> ESP ─> veth ──> veth ─> ESP ─> tunnel device ─> TCP, UDP
//	                │     └ TSO on, off, on, off …
//	                └ what leaves here: super-packets or single segments?
//
// The types and the verdicts are pure; what touches the kernel is in _linux.go.
package probe

import (
	"fmt"
	"slices"
	"time"
)

// Version is the version of the result's format.
const Version = 1

// Family is an address family, AF_INET or AF_INET6 (linux/socket.h).
type Family uint8

// The families.
const (
	IPv4 Family = 2
	IPv6 Family = 10
)

// String names the family.
func (f Family) String() string {
	switch f {
	case IPv4:
		return "ipv4"
	case IPv6:
		return "ipv6"
	}
	return fmt.Sprintf("family %d", uint8(f))
}

// MarshalText names the family, for JSON and YAML.
func (f Family) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (f *Family) UnmarshalText(text []byte) error {
	switch string(text) {
	case "ipv4":
		*f = IPv4
	case "ipv6":
		*f = IPv6
	default:
		return fmt.Errorf("probe: %q is no address family", text)
	}
	return nil
}

// ESP modes.
const (
	Transport = "transport"
	Tunnel    = "tunnel"
)

// Verdict is what a measurement shows.
type Verdict string

// The verdicts, the better one first.
const (
	// Healthy: super-packets arrive, at least as fast as single segments (within Tolerance).
	Healthy Verdict = "healthy"
	// Slower: super-packets arrive, but single segments are faster.
	Slower Verdict = "slower"
	// Broken: with super-packets the flow collapses, with single segments it flows.
	Broken Verdict = "broken"
	// Unclear: it was measured, and what was seen allows no conclusion.
	Unclear Verdict = "unclear"
	// Impossible: this kernel can't set it up.
	Impossible Verdict = "not possible"
)

// Result is what a probe of one kernel found. A Result that nobody changes is safe for
// concurrent use.
type Result struct {
	Version int `json:"version"`
	// Time is when the probe ended.
	Time time.Time `json:"time"`
	// Seconds is how long it took.
	Seconds float64 `json:"seconds"`
	// Kernel is the only kernel that the result tells anything about.
	Kernel Identity `json:"kernel"`
	// Loaded are the modules that were loaded on behalf of the probe.
	Loaded []string `json:"modules_loaded,omitempty"`
	Cases  []Case   `json:"cases"`
}

// Case is one kind of tunnel above one kind of SA. Its verdict is the worst of its paths.
type Case struct {
	// Kind is the device's kind as in IFLA_INFO_KIND; l2tp has none, its name here is "l2tp".
	Kind string `json:"kind"`
	// Outer is the family of the tunnel's outer header, and of ESP's.
	Outer Family `json:"outer"`
	// Mode is that of the SA, Transport or Tunnel.
	Mode string `json:"mode"`
	// SA is the SA's algorithms as SAName has them.
	SA      string  `json:"sa"`
	Verdict Verdict `json:"verdict"`
	// Why is the reason in words.
	Why   string `json:"why"`
	Paths []Path `json:"paths,omitempty"`
}

// Path is what was measured for one inner family in one variant of a tunnel.
type Path struct {
	// Variant tells apart what has the same kind: "ip6ip6" and "ipip6", "external", "udp".
	Variant string  `json:"variant,omitempty"`
	Inner   Family  `json:"inner"`
	Verdict Verdict `json:"verdict"`
	Why     string  `json:"why"`
	// TSOOn and TSOOff are the TCP flows with TSO on and off at the sender's tunnel device.
	TSOOn  Flow `json:"tso_on"`
	TSOOff Flow `json:"tso_off"`
	// UDP is what became of UDP_SEGMENT senders, nil if they weren't tried.
	UDP *UDP `json:"udp_segment,omitempty"`
}

// Flow is the sum of all TCP runs with the same features.
type Flow struct {
	// Runs are the throughputs of the single runs in Mbit/s, in order.
	Runs []float64 `json:"runs_mbps"`
	// Mbps is the throughput of the best run in Mbit/s: whatever else the machine does can only
	// make a run slower.
	Mbps float64 `json:"mbps"`
	// Acked is what was acknowledged in all runs, in bytes (tcpi_bytes_acked), over Seconds.
	Acked   uint64  `json:"acked_bytes"`
	Seconds float64 `json:"seconds"`
	// Retransmits is in segments (tcpi_total_retrans).
	Retransmits uint64 `json:"retransmits"`
	// Wire is what was seen at the tunnel device, NIC at the device below ESP.
	Wire Wire `json:"wire"`
	NIC  Wire `json:"nic"`
	// Counters are those for errors and drops that grew meanwhile.
	Counters Counters `json:"counters,omitempty"`
}

// Wire is what was seen leaving by a device of the sender's: behind the kernel's own
// segmentation, ahead of the device's.
type Wire struct {
	// Packets counts those with data, Super those of them that the device is to cut.
	Packets int `json:"packets"`
	Super   int `json:"super"`
	// Clear counts those of them at the NIC that are no ESP.
	Clear int `json:"clear,omitempty"`
	// Largest is in bytes, link layer included.
	Largest int `json:"largest"`
}

// UDP is what became of datagrams that the sender left to the kernel to cut (UDP_SEGMENT),
// with tx-udp-segmentation on and off at its tunnel device.
type UDP struct {
	Verdict Verdict `json:"verdict"`
	Why     string  `json:"why"`
	On      Burst   `json:"on"`
	Off     Burst   `json:"off"`
}

// Burst counts datagrams: those sent and those that arrived whole.
type Burst struct {
	Sent     int      `json:"sent"`
	Arrived  int      `json:"arrived"`
	Wire     Wire     `json:"wire"`
	Counters Counters `json:"counters,omitempty"`
}

// Counters are kernel counters by name, such as "receiver xfrm XfrmInStateProtoError".
type Counters map[string]uint64

// Lookup finds what was measured for a kind of tunnel (IFLA_INFO_KIND), the family of its
// outer header, and the SA's mode and algorithms (SAName). A nil result knows nothing.
func (r *Result) Lookup(kind string, outer Family, mode, sa string) (Case, bool) {
	if r == nil {
		return Case{}, false
	}
	i := slices.IndexFunc(r.Cases, func(c Case) bool { return c.is(kind, outer, mode, sa) })
	if i < 0 {
		return Case{}, false
	}
	return r.Cases[i], true
}

func (c Case) is(kind string, outer Family, mode, sa string) bool {
	return c.Kind == kind && c.Outer == outer && c.Mode == mode && c.SA == sa
}

// KeepTSO says whether TSO may stay on: super-packets were seen to leave, to arrive, and to be
// at least as fast, in all variants and for all inner families.
func (c Case) KeepTSO() bool { return c.Verdict == Healthy }

// BreaksUDP says whether UDP_SEGMENT senders were seen to lose their datagrams with
// tx-udp-segmentation on, and not with it off.
func (c Case) BreaksUDP() bool {
	return slices.ContainsFunc(c.Paths, func(p Path) bool { return p.UDP != nil && p.UDP.Verdict == Broken })
}

// Merge adds the cases of an older result of the same kernel that r has not measured.
func (r *Result) Merge(old *Result) {
	if old == nil || old.Valid(r.Kernel) != nil {
		return
	}
	for _, c := range old.Cases {
		if _, ok := r.Lookup(c.Kind, c.Outer, c.Mode, c.SA); !ok {
			r.Cases = append(r.Cases, c)
		}
	}
}

// Measured counts the cases that could be set up.
func (r *Result) Measured() int {
	n := 0
	for _, c := range r.Cases {
		if c.Verdict != Impossible {
			n++
		}
	}
	return n
}
