package xfrmwatch

import (
	"cmp"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKernelPrecedence compares Lookup with what the kernel lets through: policies that block or
// allow, with few priorities. It needs policies only, so it runs on any kernel with XFRM.
func TestKernelPrecedence(t *testing.T) {
	l := newLab(t, false)
	rng := rand.New(rand.NewPCG(3, 4))
	prefix := func() netip.Prefix {
		bits := []int{0, 8, 15, 16, 17, 24, 32}[rng.IntN(7)]
		p, _ := addr4(10, byte(rng.IntN(2)), 0, byte(rng.IntN(2))).Prefix(bits)
		return p
	}
	srcs := []netip.Prefix{selector("0.0.0.0/0", "0.0.0.0/0").Src, netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("10.0.0.1/32")}
	checked := map[string]int{}
	wrong := map[string]int{}
	for round := range 300 {
		updates := round%2 == 1
		var live []*Policy
		for range 12 {
			p := &Policy{Dir: Out, Priority: uint32(rng.IntN(2)), Action: Action(rng.IntN(2)),
				Selector: Selector{Family: IPv4, Src: srcs[rng.IntN(len(srcs))], Dst: prefix()}}
			if i := slices.IndexFunc(live, func(q *Policy) bool { return q.Selector == p.Selector }); i >= 0 {
				if updates {
					live[i] = p
					l.updatePolicy(p)
				}
				continue
			}
			live = append(live, p)
			l.addPolicy(p)
		}
		l.wait("the policies", func(db *DB) bool {
			got := slices.Collect(db.Policies())
			if len(got) != len(live) {
				return false
			}
			for _, p := range live {
				if !slices.ContainsFunc(got, func(q *Policy) bool {
					return q.Selector == p.Selector && q.Priority == p.Priority && q.Action == p.Action
				}) {
					return false
				}
			}
			return true
		})
		l.mu.Lock()
		for _, dst := range []netip.Addr{addr4(10, 0, 0, 0), addr4(10, 0, 0, 9), addr4(10, 1, 0, 0), addr4(10, 1, 0, 1), addr4(10, 1, 9, 9)} {
			flow := Flow{Src: own[IPv4], Dst: dst, Proto: 17, Dport: 9}
			p, losers := l.db.Lookup(flow, Out)
			if p == nil || len(losers) == 0 {
				continue
			}
			fd, err := connected(dst)
			blocked := errors.Is(err, unix.EPERM)
			if err == nil {
				unix.Close(fd)
			} else if !blocked {
				t.Fatalf("connect to %s: %v", dst, err)
			}
			kind := "additions"
			if updates {
				kind = "updates"
			}
			checked[kind]++
			if blocked != (p.Action == Block) {
				wrong[kind]++
				if kind == "additions" {
					t.Errorf("%s: the kernel blocks %v, Lookup took %+v before %+v", dst, blocked, *p, *losers[0])
				}
			}
		}
		l.mu.Unlock()
		l.do(msgFlushPolicy, nil)
		l.wait("nothing", func(db *DB) bool { return db.PolicyCount() == 0 })
	}
	t.Logf("lookups that were compared: %v, different: %v", checked, wrong)
	// Updates in place within one hash chain are the case that a dump can't show (see DB).
	if cmp.Compare(wrong["updates"]*10, checked["updates"]) > 0 {
		t.Errorf("%d of %d lookups after updates differ", wrong["updates"], checked["updates"])
	}
}
