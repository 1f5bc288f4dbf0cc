package bench

import "fmt"

// The figures to reach: ratios and sizes on two processors.
const (
	reachCold     = 1.0
	reachMemory   = 192 << 20
	reachEvent    = 1.5
	reachEventP99 = 3.0
	reachStorm    = 1.2
	reachMoved    = 0.010 // seconds, of a covered route's clone in a storm
	reachWrites   = 1.5
	reachShrunk   = 2.0 // times a fresh agent: "a small multiple of what is left"
)

// Missed says which figures are not reached, one line for each.
func (r *Results) Missed() (lines []string) {
	miss := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	atMost := func(what string, got, want float64) {
		switch {
		case got == 0:
			miss("%s: not measured", what)
		case got > want:
			miss("%s: %.3g, to reach %.3g", what, got, want)
		}
	}
	atMost("cold start by iproute2, median", r.Cold[observe].Start.Median(), reachCold)
	for _, mode := range []string{observe, enforce} {
		if m := largest(append(r.Memory.Ready[mode], r.Memory.Quiet[mode]...)); m.RSS > reachMemory || m.RSS == 0 {
			miss("resident memory in mode %s: %s, to reach %s", mode, mib(m.RSS), mib(reachMemory))
		}
	}
	for _, e := range []struct {
		tables string
		Event
	}{{"full", r.FullEvent}, {"empty", r.EmptyEvent}} {
		for _, part := range []struct {
			what string
			Ratio
		}{{"written and read back", e.Done}, {"the clone is seen", e.Written}} {
			what := fmt.Sprintf("policy event until %s, %s tables, by a straight line", part.what, e.tables)
			atMost(what+", median", part.Median(), reachEvent)
			atMost(what+", p99", part.P99(), reachEventP99)
		}
	}
	atMost("storm by a counting reader, median", r.Storm.Time.Median(), reachStorm)
	for i, ok := range r.Storm.Exact {
		if !ok {
			miss("state after storm %d: not exactly the kernel's", i+1)
		}
	}
	atMost("storm, a clone follows its route, seconds at p99", r.Storm.Moved.P99(), reachMoved)
	if r.Storm.Late > 0 {
		miss("storm: %d clones did not follow their routes", r.Storm.Late)
	}
	atMost("locks installed by ip -batch, median", r.Writes.Install.Median(), reachWrites)
	atMost("locks taken away by ip -batch, median", r.Writes.Remove.Median(), reachWrites)
	atMost("resident memory when the tables have shrunk, by a fresh agent's", by(float64(r.Memory.Shrunk.RSS), float64(r.Memory.Fresh.RSS)), reachShrunk)
	if r.Idle.Rounds > 0 {
		miss("idle: %.0f rounds in %.0f s, to reach 0", r.Idle.Rounds, r.Idle.Seconds)
	}
	if r.Idle.EmptyRounds > 0 {
		miss("rounds for %.0f changes that concern nothing: %.0f, to reach 0", r.Idle.Changes, r.Idle.EmptyRounds)
	}
	return lines
}
