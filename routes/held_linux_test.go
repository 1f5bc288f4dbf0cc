package routes

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestWhatHappensDuringDumpsIsNotLost changes one IPv4 key three times while a dump runs that shows the
// outcome only: told on top of it, the replace hits the route that was appended, and the removal takes it
// along. As the key is far behind in the table, the kernel has not come to it when the first items are here.
func TestWhatHappensDuringDumpsIsNotLost(t *testing.T) {
	for name, dumps := range map[string]int{"once": 1, "again and again": maxTries + 3} {
		t.Run(name, func(t *testing.T) {
			vethNS(t)
			storm(t, openTable(t), 5000, OpAdd, 2)
			f := follow(t, WatchOptions{Chunk: 16})
			writer := openTable(t)
			const key = 20000
			write := func(typ, flags uint16, gw byte) {
				t.Helper()
				if _, err := writer.c.request(typ, flags|unix.NLM_F_ACK, plain(key, gw), nil); err != nil {
					t.Fatal(err)
				}
			}
			write(rtmNewRoute, unix.NLM_F_CREATE, 10)
			f.exact()
			family := Scope{RoutesOnly: true, Family: IPv4}
			f.w.Resync(family)
			for i := range dumps {
				f.until(func(ev Event) bool { return ev == ResyncBegin{Scope: family} })
				write(rtmNewRoute, unix.NLM_F_CREATE|unix.NLM_F_APPEND, byte(11+i))
				write(rtmNewRoute, unix.NLM_F_REPLACE, 100)
				write(rtmDelRoute, 0, 100)
				f.until(func(ev Event) bool { return ev == ResyncEnd{Scope: family} })
			}
			f.exact()
			if d := cmp.Diff(knowledge(freshFIB(t)), knowledge(f.fib)); d != "" {
				t.Errorf("(-kernel +mirror), stats %+v:\n%s", f.w.Stats(), d)
			}
		})
	}
}
