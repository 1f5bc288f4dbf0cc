package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tsoagent/agent/plan"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// numberedEvent is a route's event with a number, which tells it from the others.
func numberedEvent(gone bool, table routes.TableID, dst netip.Prefix, n int, bodies map[routes.TableID][2]*routes.Body) routes.Event {
	r := routes.Route{Dst: dst, Body: bodies[table][n%2]}
	origin := routes.Origin{Port: ownerPort, Seq: uint32(n)}
	if gone {
		return routes.RouteGone{Route: r, Origin: origin}
	}
	return routes.RouteSet{Route: r, Replace: n%3 > 0, Origin: origin}
}

func numberOf(ev routes.Event) (n int, barrier bool) {
	switch ev := ev.(type) {
	case routes.RouteSet:
		return int(ev.Origin.Seq), false
	case routes.RouteGone:
		return int(ev.Origin.Seq), false
	case routes.LinkSet:
		return ev.Link.MTU, true
	case routes.ResyncBegin:
		return int(ev.Scope.Oif), true
	case routes.ResyncEnd:
		return int(ev.Scope.Oif), true
	case routes.NexthopGone:
		return int(ev.ID), true
	}
	panic(fmt.Sprintf("%T", ev))
}

// Whatever overtakes what, each route's events stay in their order, nothing passes a link, a nexthop or a dump, and the mirror comes to what
// it would come to in order; also while what is covered changes.
func TestWhatIsCoveredOvertakesOnlyOtherRoutes(t *testing.T) {
	bodies := map[routes.TableID][2]*routes.Body{}
	for _, table := range []routes.TableID{routes.TableMain, 5450, 7} {
		for i, gw := range []string{"192.0.2.10", "192.0.2.11"} {
			b := bodies[table]
			b[i] = newRoute(t, "10.0.0.0/8", hop{oif: 2, gw: gw}).Body
			other := *b[i]
			other.Table = table
			other.Raw = fmt.Sprint(table, gw)
			b[i] = routes.NewBody(other)
			bodies[table] = b
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		var b backlog
		st := newState(&plan.Config{})
		st.db.Apply(xfrmwatch.ResyncBegin{})
		st.db.Apply(xfrmwatch.ResyncEnd{})
		covered := map[xfrmwatch.PolicyIndex]netip.Prefix{} // as of the last plan
		of := &sorts{t: t, covered: covered, dropped: map[int]bool{}}
		prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
			a := netip.AddrFrom4([4]byte{10, byte(rapid.IntRange(0, 3).Draw(t, "net")), byte(rapid.IntRange(0, 1).Draw(t, "sub") << 7)})
			return netip.PrefixFrom(a, rapid.SampledFrom([]int{0, 8, 15, 16, 17}).Draw(t, "bits")).Masked()
		})
		inOrder, mirror := routes.NewFIB(), routes.NewFIB()
		var came []routes.Event
		n := 0
		next := func() {
			b.next(func(p piece) {
				for _, ev := range p.events {
					came = append(came, ev)
					if table, _, ok := routeOf(ev); ok && of.ownTable(table) {
						of.waiting--
					}
					mirror.Apply(ev)
				}
			})
		}
		dumping := false
		for range rapid.IntRange(1, 40).Draw(t, "turns") {
			switch rapid.SampledFrom([]string{"events", "events", "events", "next", "policy", "plan", "anew"}).Draw(t, "what") {
			case "events":
				var ev []routes.Event
				for range rapid.IntRange(1, 600).Draw(t, "events") {
					n++
					switch kind := rapid.IntRange(0, 300).Draw(t, "kind"); {
					case kind == 0:
						ev = append(ev, routes.LinkSet{Link: &routes.Link{Index: 2, MTU: n}})
					case kind == 1:
						ev = append(ev, routes.NexthopGone{ID: uint32(n)})
					case kind == 2 && !dumping:
						ev, dumping = append(ev, routes.ResyncBegin{Scope: routes.Scope{Oif: routes.Ifindex(n)}}), true
					case kind <= 6 && dumping:
						ev, dumping = append(ev, routes.ResyncEnd{Scope: routes.Scope{Oif: routes.Ifindex(n)}}), false
					default:
						table := rapid.SampledFrom([]routes.TableID{routes.TableMain, routes.TableMain, 5450, 7}).Draw(t, "table")
						ev = append(ev, numberedEvent(kind%4 == 0, table, prefix.Draw(t, "dst"), n, bodies))
					}
				}
				all := slices.Clone(ev)
				waited := of.waiting
				b.put(ev, time.Time{}, of)
				of.waiting = waited
				for _, e := range all {
					if n, _ := numberOf(e); of.dropped[n] {
						continue
					}
					if table, _, ok := routeOf(e); ok && of.ownTable(table) {
						of.waiting++
					}
					inOrder.Apply(e)
				}
			case "next":
				next()
			case "policy":
				index := rapid.IntRange(1, 3).Draw(t, "policy")
				if rapid.Bool().Draw(t, "gone") {
					st.db.Apply(xfrmwatch.PolicyGone{Index: xfrmwatch.PolicyIndex(index)})
				} else {
					st.db.Apply(policy(index, "10.9.0.0/16", prefix.Draw(t, "selector").String(), 0))
				}
			case "plan", "anew":
				b.grow(st)
				clear(covered)
				for p := range st.db.Policies() {
					covered[p.Index] = p.Selector.Dst
				}
				st.changes = plan.Changes{}
			}
		}
		for range n + 1 {
			if b.empty() {
				break
			}
			next()
		}
		if !b.empty() || b.rest != 0 || len(came)+len(of.dropped) != n {
			t.Fatalf("%d of %d events came, %d are left, %d of them not urgent", len(came), n, b.size, b.rest)
		}
		latest := map[routes.Key]int{}
		most := 0
		for i, ev := range came {
			k, barrier := numberOf(ev)
			if barrier {
				place := i + 1
				for d := range of.dropped {
					if d < k {
						place++
					}
				}
				if k != place {
					t.Fatalf("barrier %d is at place %d", k, place)
				}
			}
			if !barrier && k < most {
				t.Fatalf("event %d comes behind barrier %d", k, most)
			}
			if barrier {
				most = k
				continue
			}
			table, dst, _ := routeOf(ev)
			at := routes.Key{Table: table, Dst: dst}
			if latest[at] > k {
				t.Fatalf("event %d of %s in %d comes behind event %d", k, dst, table, latest[at])
			}
			latest[at] = k
		}
		if inOrder.Len() != mirror.Len() {
			t.Fatalf("%d routes, in order %d", mirror.Len(), inOrder.Len())
		}
		for _, id := range inOrder.Tables(routes.IPv4) {
			for r := range inOrder.Table(routes.IPv4, id) {
				if have, k := mirror.Get(r.Key()); k == 0 || have.Body != mustGet(inOrder, r.Key()) {
					t.Fatalf("%s is %v, in order %v", r.Key(), have.Body, r.Body)
				}
			}
		}
	})
}

// sorts tells the backlog about events. Of those in a table of ours it drops some, if it is asked.
type sorts struct {
	t       *rapid.T
	waiting int                                    // events of our table in the backlog
	covered map[xfrmwatch.PolicyIndex]netip.Prefix // as of the last plan
	dropped map[int]bool
}

func (s *sorts) urgency(table routes.TableID, dst netip.Prefix) urgency {
	for _, p := range s.covered {
		switch {
		case !p.Overlaps(dst):
		case p.Bits() <= dst.Bits() || rapid.Bool().Draw(s.t, "decides"):
			return urgent
		default:
			return nearby
		}
	}
	if table == 5450 {
		return urgent
	}
	return apart
}

func (s *sorts) ownTable(table routes.TableID) bool { return table == 5450 }

func (s *sorts) behind(ev routes.Event) bool {
	n, _ := numberOf(ev)
	if s.waiting > 0 {
		s.t.Errorf("event %d passes %d older ones of the table", n, s.waiting)
	}
	if n%3 != 0 {
		s.waiting++ // until it is counted with the others
		return false
	}
	s.dropped[n] = true
	return true
}

func mustGet(f *routes.FIB, k routes.Key) *routes.Body {
	r, _ := f.Get(k)
	return r.Body
}

// halves has the upper half of 10.0.0.0/8 urgent.
type halves struct{}

func (halves) urgency(_ routes.TableID, dst netip.Prefix) urgency {
	if dst.Addr().As4()[1] >= 128 {
		return urgent
	}
	return apart
}

func (halves) ownTable(routes.TableID) bool { return false }

func (halves) behind(routes.Event) bool { return false }

// TestRestGoesOnBesideWhatIsUrgent: single urgent events that keep coming make each round short, and the others go on nonetheless.
func TestRestGoesOnBesideWhatIsUrgent(t *testing.T) {
	var b backlog
	body := newRoute(t, "10.0.0.0/8", hop{oif: 2, gw: "192.0.2.10"}).Body
	event := func(half, n int) routes.Event {
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(half), byte(n >> 8), byte(n)}), 32)
		return routes.RouteSet{Route: routes.Route{Dst: dst, Body: body}}
	}
	var rest []routes.Event
	for n := range 256 {
		rest = append(rest, event(1, n))
	}
	b.put(rest, time.Time{}, halves{})
	for round := 1; b.rest > 0; round++ {
		if round > 8 {
			t.Fatalf("%d others are left after %d rounds", b.rest, round-1)
		}
		b.put([]routes.Event{event(200, round)}, time.Time{}, halves{})
		var took []bool // urgent ones
		b.next(func(p piece) {
			for _, ev := range p.events {
				_, dst, _ := routeOf(ev)
				took = append(took, dst.Addr().As4()[1] >= 128)
			}
		})
		if len(took) > roundEvents/2 || !took[0] || slices.Contains(took[1:], true) {
			t.Errorf("round %d took %v", round, took)
		}
	}
}

func TestCoveredRouteIsInTheFirstRoundOfAStorm(t *testing.T) {
	e := newEdge(t, 4*roundEvents, 10)
	covered := e.nets[7]
	was := e.table(5450)
	if len(was) == 0 {
		t.Fatal("nothing is cloned")
	}
	e.took()
	var ev []routes.Event
	for i, dst := range e.nets {
		if dst != covered {
			ev = append(ev, routes.RouteSet{Route: routes.Route{Dst: dst, Body: e.bodies[1]}, Replace: true, Origin: routes.Origin{Port: ownerPort, Seq: uint32(i)}})
		}
	}
	ev = append(ev, routes.RouteSet{Route: routes.Route{Dst: covered, Body: e.bodies[1]}, Replace: true, Origin: routes.Origin{Port: ownerPort, Seq: 1 << 20}})
	for _, e2 := range ev {
		e.kernel.Apply(e2)
	}
	e.queue = append(e.queue, batch{routes: ev})
	e.step()
	if n := e.count(fmt.Sprintf("put %s table 5450", covered)); n != 1 {
		t.Errorf("%d clones of %s moved in the first round, want one; written:\n%v", n, covered, e.ops)
	}
	if e.a.backlog.empty() || e.next != time.Nanosecond {
		t.Errorf("the first round took %d routes at once, and the next one comes in %v", len(ev), e.next)
	}
	e.settle() // and the plan is that from scratch
	if !e.a.backlog.empty() {
		t.Error("something is left")
	}
}

// What very many policies are under is followed in rounds that take a part each, and what changes meanwhile is not kept waiting.
func TestDefaultRouteOfVeryManyPoliciesKeepsNobodyWaiting(t *testing.T) {
	const policies = 5 * plan.DefaultPart // a multiple of ten
	e := newEdge(t, 2*policies, policies)
	e.took()
	asked := 0
	e.lookup = func(routes.Query) *routes.Answer { asked++; return nil }
	e.replaceRoute("0.0.0.0/0", hop{oif: 2, gw: "192.0.2.101"})
	e.step()
	first := e.count("put 10.")
	if first == 0 || first > plan.DefaultPart {
		t.Errorf("the first round moves %d clones, want some and no more than %d", first, plan.DefaultPart)
	}
	if asked > 2*maxAsks {
		t.Errorf("the first round asks %d times, want no more than for %d peers and some clones", asked, maxAsks)
	}
	if e.next != time.Nanosecond {
		t.Errorf("the next round comes in %v, want it at once", e.next)
	}
	covered := e.nets[7]
	e.replaceRoute(covered.String(), hop{oif: 2, gw: "192.0.2.102"})
	rounds := e.a.stats.Rounds
	for range 10 {
		if e.count(fmt.Sprintf("put %s table 5450", covered)) > 0 {
			break
		}
		e.step()
	}
	if n := e.a.stats.Rounds - rounds; n != 1 {
		t.Errorf("the clone of a route that is replaced meanwhile moves after %d rounds, want one", n)
	}
	if n := e.count("put 10."); n >= 7*policies/10 {
		t.Errorf("all %d clones had moved by then", n)
	}
	e.settle() // and the plan is that from scratch
	if n := e.count("put 10."); n != 7*policies/10 {
		t.Errorf("%d clones moved, want %d", n, 7*policies/10)
	}
}

// The notifications of our own writes are behind what the kernel told of before. While that comes nothing is written again, however long
// the round took that wrote: the kernel tells nothing of an IPv4 route that is written as it is.
func TestNothingIsWrittenAgainWhileItsNotificationIsBehindOthers(t *testing.T) {
	e := newEdge(t, 100, 10)
	e.took()
	e.replaceRoute(e.nets[7].String(), hop{oif: 2, gw: "192.0.2.102"})
	e.step()
	put := fmt.Sprintf("put %s table 5450", e.nets[7])
	if n := e.count(put); n != 1 {
		t.Fatalf("%d clones of %s moved, want one; written:\n%v", n, e.nets[7], e.ops)
	}
	echoes := e.queue
	e.queue = nil
	for i := range 5 {
		e.now = e.now.Add(echoPatience + time.Millisecond)
		if i > 0 {
			e.now = e.now.Add(-2 * time.Millisecond) // the first time the round took so long
		}
		e.replaceRoute("198.51.100.0/24", hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 100+i)})
		e.step()
	}
	if n := e.count(put); n != 1 {
		t.Errorf("it is written %d times; written:\n%v", n, e.ops)
	}
	e.queue = echoes
	e.settle()
	if n := e.count(put); n != 1 {
		t.Errorf("it is written %d times in the end; written:\n%v", n, e.ops)
	}
}

// The loop waits for none of its own writes' notifications in tables of our own, wherever they are.
func TestClonesFollowWhileNotificationsAreLate(t *testing.T) {
	e := newEdge(t, 100, 10)
	e.took()
	put := fmt.Sprintf("put %s table 5450", e.nets[7])
	var late []batch
	for i := range 5 {
		e.replaceRoute(e.nets[7].String(), hop{oif: 2, gw: fmt.Sprintf("192.0.2.%d", 110+i)})
		e.step()
		for e.next == time.Nanosecond {
			late = append(late, e.queue...)
			e.queue = nil
			e.step()
		}
		if n := e.count(put); n != i+1 {
			t.Fatalf("after %d changes the clone was written %d times", i+1, n)
		}
	}
	e.queue = late
	e.took()
	e.settle()
	if ops := e.took(); len(ops) > 0 {
		t.Errorf("written when the notifications came:\n%v", ops)
	}
	if e.a.st.own.n != 0 || len(e.a.st.own.of) != 0 {
		t.Errorf("the mirror is said to be ahead by %d", e.a.st.own.n)
	}
}
