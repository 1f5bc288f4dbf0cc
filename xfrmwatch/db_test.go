package xfrmwatch

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// slowDB is the oracle: plain maps, and a list of policies by age.
type slowDB struct {
	policies []*Policy // oldest first
	sas      map[SAKey]*SA
	def      Default
}

func (o *slowDB) apply(ev Event) {
	drop := func(i PolicyIndex) {
		o.policies = slices.DeleteFunc(o.policies, func(p *Policy) bool { return p.Index == i })
	}
	switch ev := ev.(type) {
	case PolicySet:
		drop(ev.Policy.Index)
		o.policies = append(o.policies, ev.Policy)
	case PolicyGone:
		drop(ev.Index)
	case SASet:
		old := o.sas[ev.SA.Key]
		sa := ev.SA
		if ev.Update && old != nil && !old.Larval {
			sa = old.updated(sa)
		}
		if !sa.Larval {
			k := sa.Key
			k.SPI = 0
			if l := o.sas[k]; l != nil && l.Larval && l.Src == sa.Src && l.Reqid == sa.Reqid && l.Mode == sa.Mode && l.IfID == sa.IfID {
				delete(o.sas, k)
			}
		}
		o.sas[sa.Key] = sa
	case SAGone:
		delete(o.sas, ev.Key)
	case SADying:
		if sa := o.sas[ev.Key]; sa != nil {
			dying := *sa
			dying.Dying = true
			o.sas[ev.Key] = &dying
		}
	case DefaultSet:
		o.def = ev.Default
	}
}

func (o *slowDB) ordered() []*Policy {
	return slices.SortedStableFunc(slices.Values(o.policies), func(a, b *Policy) int {
		return cmp.Compare(a.Priority, b.Priority)
	})
}

// dump is what the kernel's dump would be: newest first, without what it does not tell.
func (o *slowDB) dump() []Event {
	events := []Event{ResyncBegin{}}
	for _, p := range slices.Backward(o.policies) {
		copied := *p
		events = append(events, PolicySet{Policy: &copied, Dumped: true})
	}
	for _, sa := range o.sas {
		copied := *sa
		copied.Dying = false
		events = append(events, SASet{SA: &copied, Dumped: true})
	}
	return append(events, DefaultSet{o.def})
}

func genEvent() *rapid.Generator[Event] {
	return rapid.Custom(func(t *rapid.T) Event {
		switch rapid.IntRange(0, 8).Draw(t, "event") {
		case 0, 1, 2:
			return PolicySet{Policy: genPolicy().Draw(t, "policy")}
		case 3:
			return PolicyGone{PolicyIndex(rapid.Uint32Range(1, 24).Draw(t, "index"))}
		case 4:
			return SADying{genSA().Draw(t, "sa").Key}
		case 5:
			return SAGone{genSA().Draw(t, "sa").Key}
		case 6:
			return DefaultSet{Default{Out: Action(rapid.IntRange(0, 1).Draw(t, "out"))}}
		}
		return SASet{SA: genSA().Draw(t, "sa"), Update: rapid.Bool().Draw(t, "update")}
	})
}

func agree(t *rapid.T, db *DB, o *slowDB) {
	t.Helper()
	if !slices.EqualFunc(slices.Collect(db.Policies()), o.ordered(), (*Policy).Equal) {
		t.Fatalf("policies\n%v, want\n%v", slices.Collect(db.Policies()), o.ordered())
	}
	if db.PolicyCount() != len(o.policies) || db.SACount() != len(o.sas) || db.Default() != o.def {
		t.Fatalf("%d policies, %d SAs, default %v", db.PolicyCount(), db.SACount(), db.Default())
	}
	var last *SA
	for sa := range db.SAs() {
		if want := o.sas[sa.Key]; want == nil || !sa.Equal(want) {
			t.Fatalf("sa %+v, want %+v", sa, want)
		}
		if last != nil && last.Key.compare(sa.Key) >= 0 {
			t.Fatal("SAs are not sorted")
		}
		last = sa
	}
	// The indexes hold each SA once, and nothing else.
	places, split := map[dstReqid]int{}, map[dstReqid]int{}
	for key, sa := range db.cur.sas.byKey.Map {
		k := dstReqid{sa.Dst, sa.Reqid}
		if list := slices.Collect(db.cur.sas.byDst.Of(k)); !slices.Contains(list, sa.SA) || key != sa.Key {
			t.Fatalf("index %v does not hold %+v", k, sa)
		}
		if places[k]++; sa.Mode.takesFlow() {
			split[k]++
		}
	}
	for k, n := range places {
		if list := slices.Collect(db.cur.sas.byDst.Of(k)); len(list) != n || db.cur.sas.peers[k.reqid][k.dst] != split[k] {
			t.Fatalf("index %v holds %+v, and %d peers", k, list, db.cur.sas.peers[k.reqid][k.dst])
		}
	}
	if n := len(db.cur.sas.byKey.Map); n != len(o.sas) || db.cur.sas.byDst.Len() != len(places) {
		t.Fatalf("%d SAs, %d places indexed, want %d and %d", n, db.cur.sas.byDst.Len(), len(o.sas), len(places))
	}
}

func TestDBIsTheOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		db, o := NewDB(), &slowDB{sas: map[SAKey]*SA{}}
		if !db.Stale() {
			t.Fatal("not stale before the first dump")
		}
		t.Repeat(map[string]func(*rapid.T){
			"event": func(t *rapid.T) {
				ev := genEvent().Draw(t, "event")
				version, before := db.Version(), slices.Collect(db.Policies())
				changed := db.Apply(ev)
				o.apply(ev)
				if changed != (db.Version() != version) {
					t.Fatalf("changed %v, version %d to %d", changed, version, db.Version())
				}
				if !changed && !slices.Equal(before, slices.Collect(db.Policies())) {
					t.Fatal("policies changed without a change")
				}
			},
			"same policy again": func(t *rapid.T) {
				if len(o.policies) == 0 {
					t.Skip("empty")
				}
				copied := *o.policies[len(o.policies)-1]
				if db.Apply(PolicySet{Policy: &copied}) {
					t.Fatal("setting the youngest again is a change")
				}
			},
			"resync": func(t *rapid.T) {
				version := db.Version()
				if rapid.Bool().Draw(t, "lost") && (db.Apply(Lost{}) || !db.Stale()) {
					t.Fatal("Lost is a change, or does not make stale")
				}
				was, loaded := slices.Collect(db.Policies()), !db.Stale()
				for _, ev := range o.dump() {
					if db.Apply(ev) {
						t.Fatalf("%T of a dump shows before its end", ev)
					}
				}
				live := rapid.Bool().Draw(t, "an event before the end")
				if live {
					ev := genEvent().Draw(t, "event")
					db.Apply(ev)
					o.apply(ev)
				}
				if db.Apply(ResyncEnd{}) && !live {
					t.Fatal("a dump of the same is a change")
				}
				if db.Stale() {
					t.Fatal("stale after a dump")
				}
				if !live && db.Version() != version {
					t.Fatal("version moved")
				}
				if !live && loaded && !slices.Equal(was, slices.Collect(db.Policies())) {
					t.Fatal("pointers of unchanged policies moved")
				}
			},
			"dump of something else": func(t *rapid.T) {
				other := &slowDB{sas: map[SAKey]*SA{}}
				for _, ev := range rapid.SliceOfN(genEvent(), 0, 8).Draw(t, "events") {
					other.apply(ev)
				}
				for _, sa := range other.sas {
					sa.Dying = false // not in a dump
				}
				// The DB keeps Dying for an SA that it knows.
				for k, sa := range other.sas {
					if was := o.sas[k]; was != nil && was.Dying && was.AddTime == sa.AddTime {
						delete(other.sas, k)
					}
				}
				for _, ev := range append(other.dump(), ResyncEnd{}) {
					db.Apply(ev)
				}
				o.policies, o.sas, o.def = other.policies, other.sas, other.def
			},
			"": func(t *rapid.T) { agree(t, db, o) },
		})
	})
}

func TestNoOpSetIsNoChange(t *testing.T) {
	db := NewDB()
	sa := func() *SA {
		return (&SA{Dst: addr("192.0.2.2"), Src: addr("192.0.2.1"), Proto: ESP, AEAD: Algorithm{"x", 1}}).keyed()
	}
	p, q := tunnelPolicyFor(1), tunnelPolicyFor(2)
	for i, tt := range []struct {
		ev      Event
		changed bool
	}{
		{PolicySet{Policy: p}, true},
		{PolicySet{Policy: tunnelPolicyFor(1)}, false},
		{PolicySet{Policy: q}, true},
		// q came later: now p goes behind it, since the kernel numbers an updated policy anew.
		{PolicySet{Policy: tunnelPolicyFor(1)}, true},
		{PolicySet{Policy: tunnelPolicyFor(1)}, false},
		{PolicyGone{99}, false},
		{SASet{SA: sa()}, true},
		{SASet{SA: sa()}, false},
		{SADying{sa().Key}, true},
		{SADying{sa().Key}, false},
		{SASet{SA: sa(), Update: true}, true}, // not dying any more
		{SAGone{sa().Key}, true},
		{SAGone{sa().Key}, false},
		{DefaultSet{}, false},
	} {
		if got := db.Apply(tt.ev); got != tt.changed {
			t.Errorf("%d: %T changed %v, want %v", i, tt.ev, got, tt.changed)
		}
	}
	if db.Precedes(p, q) || !db.Precedes(q, p) {
		t.Error("the policy that was set first precedes")
	}
}

func tunnelPolicyFor(i int) *Policy {
	return &Policy{Index: PolicyIndex(8*i + 1), Dir: Out, Priority: 100, Selector: selector("10.0.0.0/8",
		fmt.Sprintf("10.%d.%d.%d/32", byte(i>>16), byte(i>>8), byte(i))), Templates: []Template{{
		Dst: addr("192.0.2.2"), Src: addr("192.0.2.1"), Family: IPv4, Proto: ESP, Mode: Tunnel, Reqid: Reqid(i)}}}
}

// An UPDSA tells what was asked for; of that the kernel takes over a part.
func TestUpdateOfAnSAIsMerged(t *testing.T) {
	db := NewDB()
	sa := (&SA{Dst: addr("192.0.2.2"), Src: addr("192.0.2.1"), SPI: 1, Proto: ESP, Reqid: 7, AddTime: 5,
		AEAD: Algorithm{"rfc4106(gcm(aes))", 128}, Encap: Encap{2, 4500, 4500}}).keyed()
	db.Apply(SASet{SA: sa})
	db.Apply(SADying{sa.Key})
	asked := *sa
	asked.Reqid, asked.AddTime, asked.AEAD, asked.Encap.Dport, asked.IfID = 8, 9, Algorithm{}, 1024, 3
	db.Apply(SASet{SA: &asked, Update: true})
	want := *sa
	want.Encap.Dport, want.IfID = 1024, 3
	if got, _ := db.SA(sa.Key); !got.Equal(&want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestLarvalIsResolved(t *testing.T) {
	db := NewDB()
	larval := (&SA{Dst: addr("192.0.2.2"), Src: addr("192.0.2.1"), Proto: ESP, Reqid: 7, Larval: true}).keyed()
	valid := *larval
	valid.SPI, valid.Larval, valid.AEAD = 5, false, Algorithm{"rfc4106(gcm(aes))", 128}
	db.Apply(SASet{SA: larval})
	db.Apply(SASet{SA: valid.keyed()})
	if keys := slices.Collect(maps.Keys(db.cur.sas.byKey.Map)); len(keys) != 1 || keys[0].SPI != 5 {
		t.Errorf("got %v, want the valid one alone", keys)
	}
}

// The time for an event must not depend on the number of policies.
func BenchmarkApply(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			db := NewDB()
			for i := range n {
				db.Apply(PolicySet{Policy: tunnelPolicyFor(i)})
			}
			for range db.Policies() {
				break
			}
			var events []Event
			for i := range n {
				p := tunnelPolicyFor(i)
				p.Action = Block
				events = append(events, PolicySet{Policy: p}, PolicyGone{p.Index}, PolicySet{Policy: tunnelPolicyFor(i)})
			}
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				db.Apply(events[i%len(events)])
				if i++; i%1000 == 0 {
					b.StopTimer()
					for range db.Policies() {
						break
					}
					b.StartTimer()
				}
			}
		})
	}
}

func BenchmarkDecodePolicy(b *testing.B) {
	msg := wirePolicy(tunnelPolicyFor(1))
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := Decode(msgNewPolicy, msg); err != nil {
			b.Fatal(err)
		}
	}
}
