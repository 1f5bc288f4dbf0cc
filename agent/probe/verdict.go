package probe

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// The thresholds of the verdicts. docs/probe.md names them.
const (
	// collapse is the part of the throughput with TSO off below which TSO on has collapsed.
	collapse = 1.0 / 3
	// Tolerance is how much slower than single segments super-packets may be and still count
	// as equally fast: the noise of short runs.
	Tolerance = 0.10
	// lossy is the part of the segments that was sent again above which losses, and not the
	// machine's other work, make a flow slow.
	lossy = 0.10
	// segment is what one carries in bytes, about: tunnelMTU without headers.
	segment = 1240
	// leastAcked is how much must have been acknowledged, in bytes, for a flow to have flowed.
	leastAcked = 64 << 10
	// leastSeen is how many packets with data tell that none is a super-packet.
	leastSeen = 8
	// udpArrives and udpLost are the parts of the datagrams that arrive where UDP_SEGMENT
	// works, and below which it is broken. There is no congestion that would lose any.
	udpArrives, udpLost = 0.9, 0.5
)

// ratio is the throughput of the best run with TSO on as a part of that with TSO off.
func ratio(on, off Flow) float64 {
	if off.Mbps == 0 && on.Mbps > 0 {
		return math.Inf(1)
	}
	return on.Mbps / max(off.Mbps, 0.01)
}

// undecided says whether another pair of runs would make a better verdict: TSO on has neither
// clearly collapsed, nor is it as fast. The machine may have been busy.
func undecided(on, off Flow) bool {
	r := ratio(on, off)
	return r < 1-Tolerance/2 && (r > collapse/2 || !suffers(on, off))
}

// judgeTCP compares the flows with TSO on and off.
func judgeTCP(on, off Flow) (Verdict, string) {
	numbers := fmt.Sprintf("%s Mbit/s with TSO on, %s with it off", rate(on.Mbps), rate(off.Mbps))
	flowsOn, flowsOff := on.Acked >= leastAcked, off.Acked >= leastAcked
	switch {
	case !flowsOn && !flowsOff:
		return Unclear, fmt.Sprintf("TCP flows neither with TSO on nor off: %s%s", numbers, because(off.Counters))
	case on.NIC.Clear > 0 || off.NIC.Clear > 0 || flowsOff && off.NIC.Packets == 0:
		return Unclear, "the tunnel's packets left in the clear, so there is nothing to compare"
	case on.Wire.Super == 0:
		return Unclear, "no super-packet left by the tunnel device with TSO on, so there is nothing to compare"
	case off.Wire.Super > 0:
		return Unclear, "super-packets left by the tunnel device with TSO off, so there is nothing to compare"
	case off.Wire.Packets < leastSeen:
		return Unclear, fmt.Sprintf("only %d packets were seen leaving with TSO off", off.Wire.Packets)
	case ratio(on, off) < collapse && flowsOff && suffers(on, off):
		return Broken, fmt.Sprintf("%s, %d and %d retransmits%s", numbers, on.Retransmits, off.Retransmits, because(on.Counters))
	case suffers(on, off) && mbps(on.Acked, on.Seconds) < (1-Tolerance)*mbps(off.Acked, off.Seconds):
		return Slower, fmt.Sprintf("super-packets are lost now and then: %s, %d and %d retransmits%s", numbers, on.Retransmits, off.Retransmits, because(on.Counters))
	case ratio(on, off) < 1-Tolerance:
		return Slower, numbers
	}
	return Healthy, numbers
}

// suffers says whether TSO on loses what TSO off doesn't: slowness alone is no breakage.
func suffers(on, off Flow) bool { return on.lost() >= lossy && on.lost() > 2*off.lost() }

// lost is the part of the segments that was sent again.
func (f Flow) lost() float64 {
	if f.Retransmits == 0 {
		return 0
	}
	return float64(f.Retransmits) * segment / float64(max(f.Acked, 1))
}

// judgeUDP compares what arrived with tx-udp-segmentation on and off.
func judgeUDP(on, off Burst) (Verdict, string) {
	numbers := fmt.Sprintf("%d of %d datagrams arrive with tx-udp-segmentation on, %d of %d with it off", on.Arrived, on.Sent, off.Arrived, off.Sent)
	switch {
	case on.Sent == 0 || off.Sent == 0:
		return Unclear, "nothing was sent"
	case on.part() >= udpArrives && on.Wire.Super == 0:
		return Unclear, "no super-packet left by the tunnel device with tx-udp-segmentation on, so there is nothing to compare"
	case off.Wire.Super > 0:
		return Unclear, "super-packets left by the tunnel device with tx-udp-segmentation off, so there is nothing to compare"
	case on.part() >= udpArrives:
		return Healthy, numbers
	case on.part() < udpLost && off.part() >= udpArrives:
		return Broken, numbers + because(on.Counters)
	}
	return Unclear, numbers + because(on.Counters)
}

// part is the part of the datagrams that arrived.
func (b Burst) part() float64 { return float64(b.Arrived) / float64(b.Sent) }

// judgeCase makes the case's verdict out of those of its paths: the worst one. What this kernel
// can't set up doesn't count unless there is nothing else.
func judgeCase(paths []Path) (Verdict, string) {
	worst := Case{Paths: paths}.Deciding()
	for _, p := range paths {
		if p.Why != worst.Why {
			return worst.Verdict, worst.title() + worst.Why
		}
	}
	return worst.Verdict, worst.Why
}

// worse orders the verdicts: the later one decides.
var worse = []Verdict{Impossible, Healthy, Slower, Unclear, Broken}

func compareVerdicts(a, b Verdict) int {
	return cmp.Compare(slices.Index(worse, a), slices.Index(worse, b))
}

// Deciding is the path that the case's verdict is of: of several with the same verdict the one
// with the least throughput with TSO on, as a part of that with TSO off.
func (c Case) Deciding() Path {
	return slices.MaxFunc(c.Paths, func(a, b Path) int {
		return cmp.Or(compareVerdicts(a.Verdict, b.Verdict), cmp.Compare(ratio(b.TSOOn, b.TSOOff), ratio(a.TSOOn, a.TSOOff)))
	})
}

// UDPVerdict is the worst verdict about UDP_SEGMENT, Impossible if there is none.
func (c Case) UDPVerdict() Verdict {
	worst := Impossible
	for _, p := range c.Paths {
		if p.UDP != nil && compareVerdicts(p.UDP.Verdict, worst) > 0 {
			worst = p.UDP.Verdict
		}
	}
	return worst
}

// title tells the paths of a case apart.
func (p Path) title() string {
	return strings.TrimSpace(p.Variant+" "+p.Inner.String()+" inside") + ": "
}

// because lists counters, the largest first.
func because(c Counters) string {
	if len(c) == 0 {
		return ""
	}
	names := slices.SortedFunc(maps.Keys(c), func(a, b string) int {
		return cmp.Or(cmp.Compare(c[b], c[a]), cmp.Compare(a, b))
	})
	var parts []string
	for _, name := range names {
		parts = append(parts, fmt.Sprintf("%s %d", name, c[name]))
	}
	return "; " + strings.Join(parts, ", ")
}

// rate is a throughput with as many digits as matter.
func rate(mbps float64) string {
	if mbps < 10 {
		return fmt.Sprintf("%.1f", mbps)
	}
	return fmt.Sprintf("%.0f", mbps)
}

// add sums up a run.
func (f *Flow) add(run Flow) {
	f.Runs = append(f.Runs, run.Runs...)
	f.Acked += run.Acked
	f.Seconds += run.Seconds
	f.Retransmits += run.Retransmits
	f.Wire.add(run.Wire)
	f.NIC.add(run.NIC)
	f.Counters = f.Counters.plus(run.Counters)
	f.Mbps = slices.Max(f.Runs)
}

func (w *Wire) add(more Wire) {
	w.Packets += more.Packets
	w.Super += more.Super
	w.Clear += more.Clear
	w.Largest = max(w.Largest, more.Largest)
}

// mbps is a throughput in Mbit/s, with two decimals.
func mbps(bytes uint64, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return float64(int64(float64(bytes)*8/seconds/1e4)) / 100
}

// plus returns the sums of both, nil if there are none.
func (c Counters) plus(more Counters) Counters {
	if len(more) == 0 {
		return c
	}
	sum := Counters{}
	maps.Copy(sum, c)
	for name, v := range more {
		sum[name] += v
	}
	return sum
}

// since returns what grew after before was taken.
func (c Counters) since(before Counters) Counters {
	grown := Counters{}
	for name, v := range c {
		if v > before[name] {
			grown[name] = v - before[name]
		}
	}
	return grown
}
