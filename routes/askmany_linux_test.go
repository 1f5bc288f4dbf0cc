package routes

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestLookupAllAnswersAsLookup: many questions at once, in both families, with such among them that have no answer, can't be asked, and
// with room for answers that some don't fit into.
func TestLookupAllAnswersAsLookup(t *testing.T) {
	vethNS(t)
	tb := openTable(t)
	storm(t, tb, 500, OpAdd, 2)
	ip(t, "route add 10.77.0.0/16"+strings.Repeat(" nexthop dev a0", 20)+"\n-6 route add 2001:db8:77::/48 dev a0")
	var queries []Query
	for i := range 3*asksAtOnce + 5 {
		q := Query{Dst: netip.AddrFrom4([4]byte{10, 77, byte(i), 1})}
		switch i % 6 {
		case 1:
			q.Dst = netip.MustParseAddr("2001:db8:77::1")
		case 2:
			q.Dst = netip.MustParseAddr("2001:db8:78::1") // no route
		case 3:
			q.Src = netip.MustParseAddr("203.0.113.77") // not ours
		case 4:
			q = Query{}
		case 5:
			q.FibMatch = true
		}
		queries = append(queries, q)
	}
	type answer struct {
		Answer
		Err string
	}
	var want, got []answer
	text := func(ans Answer, err error) answer {
		if err != nil {
			return answer{Err: err.Error()}
		}
		return answer{ans, ""}
	}
	for _, q := range queries {
		want = append(want, text(tb.Lookup(q)))
	}
	same := cmp.Options{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b *Body) bool { return a == b || a != nil && b != nil && a.Raw == b.Raw }),
	}
	for _, room := range []int{answerLen, 150} {
		tb.answers = newTrain(asksAtOnce, room)
		got = nil
		tb.LookupAll(queries, func(i int, ans Answer, err error) {
			if i != len(got) {
				t.Errorf("answer %d is for question %d", len(got), i)
			}
			if queries[i].Src.IsValid() != errors.Is(err, ErrUnreachable) && queries[i].Dst.Is4() {
				t.Errorf("%+v: %v", queries[i], err)
			}
			got = append(got, text(ans, err))
		})
		if d := cmp.Diff(want, got, same); d != "" {
			t.Errorf("room for %d bytes (-one by one +at once):\n%s", room, d)
		}
	}
}

// TestCalmDumpsSaySo: a full dump says that no event came while it ran, and says nothing if one did.
func TestCalmDumpsSaySo(t *testing.T) {
	vethNS(t)
	storm(t, openTable(t), 5000, OpAdd, 2)
	f := follow(t, WatchOptions{Chunk: 16})
	calm := func() bool {
		n := len(f.seen)
		return n > 1 && f.seen[n-2] == Calm{}
	}
	if !calm() {
		t.Error("the first dump was disturbed by nobody, and says no such thing")
	}
	writer := openTable(t)
	f.w.Resync(Scope{})
	f.until(func(ev Event) bool { return ev == ResyncBegin{} })
	if _, err := writer.c.request(rtmNewRoute, unix.NLM_F_ACK|unix.NLM_F_CREATE, plain(20000, 10), nil); err != nil {
		t.Fatal(err)
	}
	f.until(func(ev Event) bool { return ev == ResyncEnd{} })
	if calm() {
		t.Errorf("a route came while it ran: %v", f.seen[len(f.seen)-2:])
	}
	f.w.Resync(Scope{})
	f.until(func(ev Event) bool { return ev == ResyncEnd{} })
	if !calm() {
		t.Error("after a dump that was disturbed another one says nothing")
	}
}
