package routes

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// clonesOf writes clones of random routes into a table of ours, with other gateways and MTUs each time, replaces them, throws and takes them away.
func clonesOf(t *testing.T, rng *rand.Rand, sources []Route, n int) (writes []Write) {
	t.Helper()
	const table = 5450
	for range n {
		r := sources[rng.IntN(len(sources))]
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(rng.IntN(40)), 0}), 24)
		if r.Body.Family == IPv6 {
			dst = netip.MustParsePrefix(fmt.Sprintf("2001:db8:%x::/48", 0x1800+rng.IntN(40)))
		}
		metric := uint32(1 + rng.IntN(2))
		msg := must(EncodeClone(r, dst, table, ProtoTSOAgent, MTUMetric{1300 + uint32(rng.IntN(3)), true}, 0, metric))(t)
		switch rng.IntN(6) {
		case 0:
			writes = append(writes, Write{OpDelete, msg})
		case 1:
			writes = append(writes, Write{OpPut, must(EncodeThrow(r.Body.Family, dst, table, ProtoTSOAgent, metric))(t)})
		default:
			writes = append(writes, Write{OpPut, msg})
		}
	}
	return writes
}

// What a batch says of its writes is what every watcher is told of them, to the last attribute and in that order: the mirror can
// take it ahead of the watcher.
func TestBatchTellsWhatWatchersAreTold(t *testing.T) {
	vethNS(t)
	ip(t, `nexthop add id 1 via 10.0.0.2 dev a0
route add 198.51.100.0/24 via 10.0.0.2
route add 198.51.101.0/24 nexthop via 10.0.0.2 dev a0 nexthop via 10.0.1.2 dev b0
route add 198.51.102.0/24 dev b0 src 10.0.0.1
route add 198.51.103.0/24 nhid 1
-6 route add 2001:db8:a::/48 via fd00:a::2 dev a0
-6 route add 2001:db8:b::/48 nexthop via fd00:a::2 dev a0 nexthop via fd00:b::2 dev b0
-6 route add 2001:db8:c::/48 dev b0`)
	f := follow(t, WatchOptions{})
	var sources []Route
	for _, fam := range []Family{IPv4, IPv6} {
		for r := range f.fib.Table(fam, TableMain) {
			if r.Dst.Bits() > 0 && (strings.HasPrefix(r.Dst.String(), "198.51.") || strings.HasPrefix(r.Dst.String(), "2001:db")) {
				sources = append(sources, r)
			}
		}
	}
	if len(sources) != 7 {
		t.Fatalf("%d routes to clone", len(sources))
	}
	rng := rand.New(rand.NewPCG(5450, 1))
	var told []Event
	from := len(f.seen)
	for range 8 {
		writes := clonesOf(t, rng, sources, 700) // several system calls
		res, err := f.tb.Batch(writes)
		if err != nil || len(res) != len(writes) {
			t.Fatalf("%d results, %v", len(res), err)
		}
		for _, r := range res {
			told = append(told, r.Events...) // also where it failed: a delete of an IPv6 route of several ways can have taken one of them
		}
	}
	last, _ := originOf(told[len(told)-1])
	f.until(func(ev Event) bool { o, ok := originOf(ev); return ok && o == last })
	f.exact()
	var seen []Event
	for _, ev := range f.seen[from:] {
		if o, ok := originOf(ev); ok && o.Port == f.tb.Port() {
			seen = append(seen, ev)
		}
	}
	if len(told) < 3000 {
		t.Errorf("only %d events", len(told))
	}
	if d := cmp.Diff(words(seen), words(told), cmpopts.EquateEmpty()); d != "" {
		t.Errorf("the batch says something else (-watcher +batch):\n%s", d)
	}

	own, asks := NewFIB(), map[netip.Prefix]bool{}
	for _, ev := range told {
		if e := own.Own(ev); e.Resync != nil {
			asks[dstOfEvent(ev)] = true // only a dump tells
		}
	}
	if len(asks) > 60 {
		t.Errorf("a dump is asked for at %d of 80 destinations", len(asks))
	}
	for _, fam := range []Family{IPv4, IPv6} {
		if d := cmp.Diff(tableWords(f.fib, fam, 5450, asks), tableWords(own, fam, 5450, asks)); d != "" {
			t.Errorf("what was told makes another table of it (-watcher +batch):\n%s", d)
		}
	}
}

func dstOfEvent(ev Event) netip.Prefix {
	switch ev := ev.(type) {
	case RouteSet:
		return ev.Route.Dst
	case RouteGone:
		return ev.Route.Dst
	}
	return netip.Prefix{}
}

func originOf(ev Event) (Origin, bool) {
	switch ev := ev.(type) {
	case RouteSet:
		return ev.Origin, true
	case RouteGone:
		return ev.Origin, true
	}
	return Origin{}, false
}

func words(events []Event) (out []string) {
	for _, ev := range events {
		switch ev := ev.(type) {
		case RouteSet:
			out = append(out, fmt.Sprintf("set %s %x replace %t append %t seq %d", ev.Route.Key(), ev.Route.Body.Raw, ev.Replace, ev.Append, ev.Origin.Seq))
		case RouteGone:
			out = append(out, fmt.Sprintf("gone %s %x seq %d", ev.Route.Key(), ev.Route.Body.Raw, ev.Origin.Seq))
		default:
			out = append(out, fmt.Sprintf("%T", ev))
		}
	}
	return out
}

func tableWords(f *FIB, fam Family, id TableID, but map[netip.Prefix]bool) (out []string) {
	for r := range f.Table(fam, id) {
		if but[r.Dst] {
			continue
		}
		out = append(out, fmt.Sprintf("%s %x", r.Key(), r.Body.Raw))
	}
	return out
}
