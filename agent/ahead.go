package agent

import (
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// asker asks the kernel for ways (routes.Table). One that has LookupAll is asked for many at once.
type asker interface {
	Lookup(routes.Query) (routes.Answer, error)
}

type manyAsker interface {
	LookupAll(queries []routes.Query, f func(i int, ans routes.Answer, err error))
}

var _ manyAsker = (*routes.Table)(nil)

// answered is what the kernel has answered.
type answered struct {
	path   plan.Path // its MTU is that of the route alone, 0 for none
	failed bool      // the kernel has not answered
}

// askedAtOnce is how many ways are asked for at a time, as questions are larger than their answers.
const askedAtOnce = 256

// askAll asks for ways, and calls f with each answer. A source that is no address of this host has no answer: then it is asked without.
func askAll(rt asker, list []*way, f func(*way, answered)) {
	queries := make([]routes.Query, 0, min(len(list), askedAtOnce))
	for at := 0; at < len(list); at += askedAtOnce {
		part := list[at:min(at+askedAtOnce, len(list))]
		queries = queries[:0]
		for _, w := range part {
			queries = append(queries, w.query())
		}
		lookupAll(rt, queries, func(i int, ans routes.Answer, err error) {
			failed := false
			if err != nil && queries[i].Src.IsValid() {
				failed = !errors.Is(err, routes.ErrUnreachable)
				queries[i].Src = netip.Addr{}
				ans, err = rt.Lookup(queries[i])
			}
			f(part[i], answerOf(ans, err, failed))
		})
	}
}

func lookupAll(rt asker, queries []routes.Query, f func(i int, ans routes.Answer, err error)) {
	if many, ok := rt.(manyAsker); ok {
		many.LookupAll(queries, f)
		return
	}
	for i, q := range queries {
		ans, err := rt.Lookup(q)
		f(i, ans, err)
	}
}

// answerOf is the route that the kernel answers, the zero value if there is none.
func answerOf(ans routes.Answer, err error, failed bool) answered {
	if err != nil {
		return answered{failed: failed || !errors.Is(err, routes.ErrUnreachable)}
	}
	a := answered{path: plan.Path{Oif: ans.Oif, Table: ans.Table, Src: ans.PrefSrc}, failed: failed}
	for _, m := range []uint32{ans.MTU, ans.PMTU} {
		if m != 0 && (a.path.MTU == 0 || int(m) < a.path.MTU) {
			a.path.MTU = int(m)
		}
	}
	return a
}

// ahead asks for the ways to peers while the routes are being read for the first time. What it was told counts if nothing has changed
// meanwhile, else all is asked again:
//
//	policies ── read ──┬── ways that are needed ──> ahead ──┐
//	routes   ── begin ─┘··· found ···· calm ── end ─────────┴──> first plan
type ahead struct {
	list    []*way
	answers []answered
	stop    atomic.Bool
	done    chan struct{}
	calm    bool // nothing has changed
}

// aheadFrom is for how many ways it is worth the while.
const aheadFrom = 512

// lookAhead hears of events ahead of the first plan, once they are in the mirrors.
func (a *Agent) lookAhead(ev any) {
	if a.lastP != nil || a.openAsker == nil {
		return
	}
	switch ev.(type) {
	case routes.ResyncBegin, xfrmwatch.ResyncEnd:
		if a.st.dumping && a.st.fib.Stale() && !a.st.db.Stale() && a.st.ways.ahead == nil {
			a.st.ways.need(a.st)
			a.st.ways.askAhead(a.openAsker)
		}
	case routes.Calm:
		if x := a.st.ways.ahead; x != nil {
			x.calm = true
		}
	case routes.Lost:
		a.st.ways.giveUpAhead()
	}
}

// askAhead begins to ask for what is due.
func (s *ways) askAhead(open func() (closableAsker, error)) {
	if len(s.due) < aheadFrom {
		return
	}
	rt, err := open()
	if err != nil {
		return // they are asked in their turn
	}
	x := &ahead{list: slices.Clone(s.due), done: make(chan struct{})}
	x.answers = make([]answered, 0, len(x.list))
	s.ahead = x
	go func() {
		defer close(x.done)
		defer rt.Close()
		for at := 0; at < len(x.list) && !x.stop.Load(); at += askedAtOnce {
			askAll(rt, x.list[at:min(at+askedAtOnce, len(x.list))], func(_ *way, a answered) { x.answers = append(x.answers, a) })
		}
	}()
}

// arrived takes what was asked ahead.
func (s *ways) arrived(fib *routes.FIB) {
	x := s.ahead
	if x == nil {
		return
	}
	s.ahead = nil
	x.stop.Store(!x.calm)
	<-x.done
	if !x.calm {
		return
	}
	for i, a := range x.answers {
		if w := x.list[i]; w.due && !w.gone && !a.failed {
			w.due = false
			s.answered(fib, w, a)
		}
	}
}

// giveUpAhead ends it, and waits for that.
func (s *ways) giveUpAhead() {
	if x := s.ahead; x != nil {
		x.calm = false
		s.arrived(nil)
	}
}

// closableAsker is an asker that is its user's own.
type closableAsker interface {
	asker
	Close() error
}
