package bench

import (
	"slices"
	"time"
)

// Samples are measurements of one thing, in seconds.
type Samples []float64

func (s *Samples) add(d time.Duration) { *s = append(*s, d.Seconds()) }

// Median is the middle one, of two the lower, 0 without any.
func (s Samples) Median() float64 { return s.at(50) }

// P99 is the one that 99 of 100 do not exceed; of fewer it is the largest.
func (s Samples) P99() float64 { return s.at(99) }

// at is the smallest that so many of 100 do not exceed.
func (s Samples) at(percent int) float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return sorted[(len(s)*percent+99)/100-1]
}

// Ratio compares what was measured with its floor, round by round in one run.
type Ratio struct {
	Ours  Samples `json:"ours"`
	Floor Samples `json:"floor"`
}

// Median is that of ours by that of the floor, 0 without a floor. So is P99.
func (r Ratio) Median() float64 { return by(r.Ours.Median(), r.Floor.Median()) }

// P99 compares the two at p99.
func (r Ratio) P99() float64 { return by(r.Ours.P99(), r.Floor.P99()) }

func by(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}
