package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// besideAsker answers from its own goroutine.
type besideAsker struct {
	asked, closed atomic.Int32
	mtu           uint32
}

func (b *besideAsker) Lookup(q routes.Query) (routes.Answer, error) {
	b.asked.Add(1)
	if q.Src.IsValid() {
		return routes.Answer{}, routes.ErrUnreachable // it is no address of this host
	}
	return routes.Answer{Type: routes.Unicast, Table: routes.TableMain, Oif: 2, MTU: b.mtu}, nil
}

func (b *besideAsker) Close() error {
	b.closed.Add(1)
	return nil
}

// TestWaysAreAskedAheadOfTheFirstPlan: while the routes are being read the ways to peers are asked for, and what was answered counts unless
// something has changed meanwhile.
func TestWaysAreAskedAheadOfTheFirstPlan(t *testing.T) {
	const peers = aheadFrom + 3
	for name, tc := range map[string]struct {
		policiesFirst, lost bool
		end                 []routes.Event // ahead of the dump's end
		counts              bool
	}{
		"calm":                       {end: []routes.Event{routes.Calm{}}, counts: true},
		"calm, the policies first":   {policiesFirst: true, end: []routes.Event{routes.Calm{}}, counts: true},
		"something has changed":      {},
		"events were lost meanwhile": {lost: true, end: []routes.Event{routes.Calm{}}, counts: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, Config{Mode: Observe})
			beside := &besideAsker{mtu: 1300}
			w.a.openAsker = func() (closableAsker, error) { return beside, nil }
			inTurn := 0
			w.lookup = func(routes.Query) *routes.Answer {
				inTurn++
				return &routes.Answer{Type: routes.Unicast, Table: routes.TableMain, Oif: 2, MTU: 1200}
			}
			xfrm := []xfrmwatch.Event{xfrmwatch.ResyncBegin{}}
			for i := range peers {
				p := *tunnelPolicy.Policy
				p.Index, p.IfID = xfrmwatch.PolicyIndex(8*i+1), 0
				p.Selector.Dst = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, byte(i >> 8), byte(i)}), 32)
				p.Templates = slices.Clone(p.Templates)
				p.Templates[0].Dst = netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
				xfrm = append(xfrm, xfrmwatch.PolicySet{Policy: &p, Dumped: true})
			}
			xfrm = append(xfrm, xfrmwatch.ResyncEnd{})
			dump := w.dumpRoutes()
			begin, end := dump[:len(dump)-1], append(slices.Clone(tc.end), routes.ResyncEnd{})
			w.a.apply(batch{features: []ethtool.Event{ethtool.ResyncBegin{}, ethtool.ResyncEnd{}}})
			if tc.policiesFirst {
				w.a.apply(batch{xfrm: xfrm})
			}
			w.a.apply(batch{routes: begin})
			if !tc.policiesFirst {
				w.a.apply(batch{xfrm: xfrm})
			}
			if tc.lost {
				w.a.apply(batch{routes: []routes.Event{routes.Lost{Err: fmt.Errorf("full")}}})
				w.a.apply(batch{routes: begin})
			}
			w.a.apply(batch{routes: end})
			w.a.step(w.now)
			if w.a.lastP == nil {
				t.Fatal("there is no plan")
			}
			want := 1200
			if tc.counts {
				want = 1300
			}
			n := 0
			for peer, path := range w.a.st.ways.All() {
				n++
				if path.MTU != want {
					t.Errorf("the way to %s has %d, want %d", peer.Addr, path.MTU, want)
				}
			}
			if n != peers {
				t.Errorf("%d ways, want %d", n, peers)
			}
			if tc.counts && inTurn > 0 {
				t.Errorf("%d ways were asked for again", inTurn)
			}
			if opened := int32(1); !tc.lost && beside.closed.Load() != opened || beside.closed.Load() == 0 {
				t.Errorf("closed %d times", beside.closed.Load())
			}
		})
	}
}

// TestAheadEndsWithTheAgent: it leaves no connection open.
func TestAheadEndsWithTheAgent(t *testing.T) {
	w := newWorld(t, Config{Mode: Observe})
	beside := &besideAsker{}
	s := w.a.st.ways
	for i := range aheadFrom {
		p := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
		s.use(plan.Peer{Addr: p}, 1)
	}
	s.askAhead(func() (closableAsker, error) { return beside, nil })
	w.a.end()
	if beside.closed.Load() != 1 {
		t.Error("it is still open")
	}
	if n := len(s.due); n != aheadFrom {
		t.Errorf("%d are due, want %d", n, aheadFrom)
	}
}
