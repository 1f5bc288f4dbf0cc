package churn

import (
	"math/rand/v2"
	"strings"
	"testing"
)

// TestGrownFindsWhatLeaks gives series that a flat agent and one that leaks would leave: what is leaked a little in each round is found, and
// what only goes up and down is not.
func TestGrownFindsWhatLeaks(t *testing.T) {
	flat := sample{heap: 9000, rss: 40000, goroutines: 60, fds: 50, threads: 14, processes: 2, mounts: 30}
	noise := sample{heap: 200, rss: 4000, goroutines: 1, fds: 1, threads: 1}
	for name, c := range map[string]struct {
		rounds int
		leak   func(round int) sample // on top of what is flat
		found  string                 // kinds, in order
	}{
		"flat, short":                    {15, func(int) sample { return sample{} }, ""},
		"flat, for hours":                {4000, func(int) sample { return sample{} }, ""},
		"one bump in the middle":         {30, func(i int) sample { return sample{heap: 5000 * (1 - min(1, max(i-14, 14-i)))} }, ""},
		"100 KiB a round":                {15, func(i int) sample { return sample{heap: 100 * i, rss: 100 * i} }, "heap"},
		"5 KiB a round, an hour":         {1000, func(i int) sample { return sample{heap: 5 * i, rss: 5 * i} }, "heap"},
		"50 KiB a round that no one has": {2000, func(i int) sample { return sample{rss: 50 * i} }, "rss"},
		"a goroutine each round":         {15, func(i int) sample { return sample{goroutines: i} }, "goroutines"},
		"a goroutine in 100 rounds":      {600, func(i int) sample { return sample{goroutines: i / 100} }, "goroutines"},
		"a descriptor each round":        {15, func(i int) sample { return sample{fds: i} }, "fds"},
		"a socket and its goroutine":     {15, func(i int) sample { return sample{fds: i, goroutines: i} }, "goroutines fds"},
		"a thread each round":            {15, func(i int) sample { return sample{threads: i} }, "threads"},
		"threads that settle":            {2000, func(i int) sample { return sample{threads: min(i, 3)} }, ""},
		"a process":                      {15, func(i int) sample { return sample{processes: i / 8} }, "processes"},
		"a mount":                        {15, func(i int) sample { return sample{mounts: i / 8} }, "mounts"},
		"less and less":                  {15, func(i int) sample { return sample{heap: -100 * i, goroutines: -i} }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2))
			var s series
			for i := range c.rounds {
				one := flat
				for kind, more := range c.leak(i) {
					one[kind] += more + random.IntN(noise[kind]+1)
				}
				s = append(s, one)
			}
			var kinds []string
			for _, said := range s.grown() {
				kind, _, _ := strings.Cut(said, ":")
				kinds = append(kinds, kind)
			}
			if got := strings.Join(kinds, " "); got != c.found {
				t.Errorf("grown: %q, want %q\n%s", got, c.found, s)
			}
		})
	}
}
