package verify

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"tsoagent/wire"
)

// Result is what was seen, and what is to be said of it.
type Result struct {
	Version int    `json:"version"`
	Netns   string `json:"netns,omitempty"`
	Live    bool   `json:"live"` // an agent was asked what is covered
	// OK says that nothing is wrong: not that enough was seen to know that all is right.
	OK      bool    `json:"ok"`
	Says    string  `json:"says"` // in one line
	Seconds float64 `json:"seconds"`
	// Stale says that policies or devices were being read again, Changed that they were others afterwards: what packets
	// were sorted by may be wrong.
	Stale   bool           `json:"stale,omitempty"`
	Changed bool           `json:"changed,omitempty"`
	Devices []DeviceResult `json:"devices"`
	Notes   []string       `json:"notes,omitempty"`
}

// DeviceResult is what left by one device.
type DeviceResult struct {
	Device string `json:"device"`
	Index  int32  `json:"ifindex"`
	MTU    int    `json:"mtu"` // bytes
	// Dropped are packets that were not looked at, for want of time. Untold are super-packets of a kind that this kernel
	// can't tell. Unreadable are those whose headers made no sense. None of them is in a class.
	Dropped    uint64 `json:"dropped"`
	Untold     uint64 `json:"untold"`
	Unreadable uint64 `json:"unreadable"`
	// Down says that the device was down, or went away.
	Down    bool          `json:"down,omitempty"`
	Classes []ClassResult `json:"classes"`
}

// The states of a class.
const (
	StateNothing = "nothing" // no packet was seen
	StateSmall   = "small"   // none was large enough to tell
	StateCut     = "cut"
	StateWhole   = "whole" // there were super-packets
	StateSeen    = "seen"  // there is nothing to judge, or it should not be there at all
)

// ClassResult is what was seen of one class of packets.
type ClassResult struct {
	Class string `json:"class"` // covered, signed, not covered, in the clear or other
	// Policy covers them, 0 where it isn't known; MorePolicies do as well.
	Policy       uint32 `json:"policy,omitempty"`
	MorePolicies int    `json:"more_policies,omitempty"`
	// As is what IPsec has made of them ahead of the device: esp, ah, or nothing.
	As           string `json:"as,omitempty"`
	Family       string `json:"family,omitempty"` // ipv4 or ipv6
	Packets      uint64 `json:"packets"`
	Bytes        uint64 `json:"bytes"` // at the network layer
	SuperPackets uint64 `json:"super_packets"`
	Largest      int    `json:"largest"` // bytes, at the network layer
	// Segment is the largest size that a super-packet was to be cut into, in bytes of payload.
	Segment int    `json:"segment,omitempty"`
	State   string `json:"state"`
	Wrong   bool   `json:"wrong"` // it is not as it should be
	Says    string `json:"says"`
}

// enough is how many single segments of the host's own TCP there have to be, and no super-packet, until it is said
// that they are cut: a socket whose window has room for no more sends some, too.
const enough = 20

// Result judges what was counted in so many seconds. stats are what the ports' taps did not see.
func (s *Sorter) Result(seconds float64, stats []wire.Stats) *Result {
	r := &Result{
		Version: Version, Netns: s.world.Netns, Live: s.world.Live, OK: true, Seconds: seconds, Stale: s.world.Stale, Devices: []DeviceResult{},
	}
	var v verdict
	for i, d := range s.devices {
		out := DeviceResult{Device: d.Name, Index: d.Index, MTU: d.at.MTU, Unreadable: d.bad, Classes: []ClassResult{}}
		if i < len(stats) {
			out.Dropped, out.Untold, out.Down = stats[i].Dropped, stats[i].Untold, stats[i].Down
		}
		for _, c := range s.expected(d) {
			t := d.tallies[c]
			if t == nil {
				t = new(tally)
			}
			one := d.judge(c, t)
			v.add(d, &one, t)
			if t.packets == 0 {
				one.Says = "no traffic of this class in " + Period(seconds)
			}
			out.Classes = append(out.Classes, one)
			r.OK = r.OK && !one.Wrong
		}
		r.Devices = append(r.Devices, out)
		r.Notes = append(r.Notes, notes(&out)...)
	}
	r.Says = v.String()
	return r
}

// Period is a time in words.
func Period(seconds float64) string { return fmt.Sprintf("%.3g s", seconds) }

// expected are the classes of a device in their order: those that were seen, and those that one wants to hear of
// although they weren't.
func (s *Sorter) expected(d *device) []class {
	var list []class
	seen := map[string]bool{}
	for c := range d.tallies {
		list = append(list, c)
		seen[c.class] = true
	}
	for _, name := range []string{Covered, Signed, Uncovered} {
		if d.Elsewhere || seen[name] || name == Signed && s.world.Keys == 0 || name != Covered && d.carrier() {
			continue
		}
		list = append(list, class{class: name})
	}
	order := []string{Covered, Clear, Signed, Uncovered, Other}
	slices.SortFunc(list, func(a, b class) int {
		six := func(c class) int {
			if c.ipv6 {
				return 1
			}
			return 0
		}
		return cmp.Or(
			cmp.Compare(slices.Index(order, a.class), slices.Index(order, b.class)),
			cmp.Compare(d.ofPolicy(b), d.ofPolicy(a)), // the busiest policy first
			cmp.Compare(a.policy, b.policy), cmp.Compare(six(a), six(b)), cmp.Compare(a.as, b.as), cmp.Compare(a.more, b.more),
		)
	})
	return list
}

// ofPolicy is how many packets there were of a class with the same policy, 0 without one.
func (d *device) ofPolicy(c class) (n uint64) {
	for other, t := range d.tallies {
		if c.policy != 0 && other.class == c.class && other.policy == c.policy {
			n += t.packets
		}
	}
	return n
}

// judge says what is to be said of one class.
func (d *device) judge(c class, t *tally) ClassResult {
	out := ClassResult{
		Class: c.class, Policy: c.policy, MorePolicies: c.more, As: c.as, Packets: t.packets, Bytes: t.bytes,
		SuperPackets: t.super, Largest: t.largest, Segment: t.segment,
	}
	if t.packets == 0 {
		out.State = StateNothing
		return out
	}
	if c.class != Other {
		out.Family = "ipv4"
		if c.ipv6 {
			out.Family = "ipv6"
		}
	}
	switch c.class {
	case Covered, Signed:
		out.State, out.Wrong, out.Says = d.covered(c, t)
	case Uncovered:
		out.State, out.Wrong, out.Says = d.uncovered(c, t)
	case Clear:
		out.State, out.Wrong, out.Says = StateSeen, true, "left as they are although a policy covers them: past IPsec, as from a packet socket, or by a policy of the socket's own"
	default:
		out.State, out.Says = StateSeen, "nothing to judge"
	}
	return out
}

// covered judges flows that are to be cut.
func (d *device) covered(c class, t *tally) (state string, wrong bool, says string) {
	tso := d.tso(c.ipv6)
	switch {
	case t.super == 0 && t.large == 0:
		return StateSmall, false, "nothing large enough to be cut"
	case t.super == 0:
		return StateCut, false, "cut"
	case c.class == Signed:
		return StateWhole, true, "NOT cut: signed super-packets"
	case c.as != "" && d.CutsESP:
		return StateWhole, false, d.Name + " cuts them itself (tx-esp-segmentation)"
	case c.as != "":
		return StateWhole, true, "NOT cut: super-packets of " + strings.ToUpper(c.as) + ", which " + d.Name + " does not cut"
	case t.tcp > 0 && tso.Planned && tso.Active:
		return StateWhole, true, "NOT cut: TSO is to be off on " + d.Name + " and is on"
	case t.tcp > 0 && tso.Planned, t.super > t.tcp && d.UDP.Planned:
		return StateWhole, true, "NOT cut"
	}
	return StateWhole, false, "super-packets: " + d.Name + " is not where they are to be cut (tsoctl plan)"
}

// uncovered judges flows that are not to be cut.
func (d *device) uncovered(c class, t *tally) (state string, wrong bool, says string) {
	const legacy = 65536 // no super-packet is larger as a rule: GSO_LEGACY_MAX_SIZE, linux/netdevice.h
	tso := d.tso(c.ipv6)
	switch {
	case t.super > 0:
		return StateWhole, false, "super-packets"
	case t.bulk == 0 && t.large > 0:
		return StateSmall, false, "no bulk of TCP of this host's own: nothing to tell"
	case t.bulk < enough:
		return StateSmall, false, "nothing large enough to tell, or too few"
	case 2*d.at.MTU > legacy:
		return StateCut, false, "single packets, which are as large as super-packets"
	case !d.known:
		return StateCut, true, "cut, too"
	case tso.Fixed && !tso.Active:
		return StateCut, false, "cut by the kernel: " + d.Name + " can't do TSO"
	case d.asked(c.ipv6):
		return StateCut, false, "cut, too, as the configuration has it: shared_nics is off on " + d.Name
	case tso.Held:
		return StateCut, true, "cut, too: we hold TSO off on " + d.Name
	case !tso.Active:
		return StateCut, true, "cut, too: TSO is off on " + d.Name + ", and not by us"
	}
	return StateCut, true, "cut, too, although " + d.Name + " does TSO: `tsoctl flows --lost` says whose sockets have lost it"
}

// asked says that the configuration takes TSO from everybody there.
func (d *device) asked(ipv6 bool) bool {
	tso := d.tso(ipv6)
	return d.SharedOff && !tso.Active && (tso.Held || tso.Planned)
}

// tso is the segmentation offload for TCP of a family.
func (d *device) tso(ipv6 bool) Offload {
	if ipv6 {
		return d.TSO6
	}
	return d.TSO4
}

// notes are what of a device's packets is in no class.
func notes(d *DeviceResult) []string {
	var out []string
	if d.Dropped > 0 {
		out = append(out, fmt.Sprintf("%s: %d packets more left than could be looked at: the figures are of a part", d.Device, d.Dropped))
	}
	if d.Untold > 0 {
		out = append(out, fmt.Sprintf("%s: %d super-packets of a kind that this kernel can't tell are in no class (SCTP; before Linux 6.2 UDP, too)", d.Device, d.Untold))
	}
	if d.Unreadable > 0 {
		out = append(out, fmt.Sprintf("%s: the headers of %d packets can't be read", d.Device, d.Unreadable))
	}
	if d.Down {
		out = append(out, fmt.Sprintf("%s was down, or went away", d.Device))
	}
	return out
}

// verdict gathers what the one line says.
type verdict struct {
	uncut, clear, signed, others []string // the devices where it is wrong
	cut, whole                   bool     // covered flows were cut, or were super-packets where that is right
	free, kernel, asked          bool     // others had super-packets; or had none, and that is right, as they can't or as it is configured
}

func (v *verdict) add(d *device, c *ClassResult, t *tally) {
	at := func(list *[]string) {
		if !slices.Contains(*list, d.Name) {
			*list = append(*list, d.Name)
		}
	}
	switch {
	case c.Wrong && c.Class == Covered:
		at(&v.uncut)
	case c.Wrong && c.Class == Clear:
		at(&v.clear)
	case c.Wrong && c.Class == Signed:
		at(&v.signed)
	case c.Wrong:
		at(&v.others)
	case c.Class == Uncovered:
		v.free = v.free || t.super > 0
		v.asked = v.asked || c.State == StateCut && d.asked(c.Family == "ipv6")
		v.kernel = v.kernel || c.State == StateCut
	case c.Class == Covered || c.Class == Signed:
		v.cut = v.cut || c.State == StateCut
		v.whole = v.whole || c.State == StateWhole
	}
}

// String is the verdict in one line.
func (v *verdict) String() string {
	var wrong []string
	add := func(text string, devices []string) {
		if len(devices) > 0 {
			wrong = append(wrong, text+strings.Join(devices, ", "))
		}
	}
	add("covered flows are not cut on ", v.uncut)
	add("signed flows are not cut on ", v.signed)
	add("covered flows leave in the clear by ", v.clear)
	add("flows that are not covered are cut on ", v.others)
	if len(wrong) > 0 {
		return "not as it should be: " + strings.Join(wrong, "; ")
	}
	covered := "of covered flows nothing was seen that tells"
	switch {
	case v.cut:
		covered = "covered flows are cut"
	case v.whole:
		covered = "covered flows are to be cut further on"
	}
	others := "of others nothing was seen that tells"
	switch {
	case v.free:
		others = "others are not"
		if !v.cut {
			others = "others are not cut"
		}
		if v.asked {
			others += " but where the configuration has it (shared_nics: off)"
		}
	case v.asked:
		others = "others, too, as the configuration has it (shared_nics: off)"
		if !v.cut {
			others = "others are cut as the configuration has it (shared_nics: off)"
		}
	case v.kernel:
		others = "others have no offload to lose"
	}
	if !v.cut && !v.whole && !v.free && !v.kernel {
		return "nothing was seen that tells whether flows are cut"
	}
	return covered + ", " + others
}
