package plan

import (
	"net/netip"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"tsoagent/routes"
)

// TestBoundSocketsGoWhereTheyWent asks for all that a socket can be bound to, in a world in which an IPv6 one passes over throws
// that stand beside a wider clone by its device.
func TestBoundSocketsGoWhereTheyWent(t *testing.T) {
	for _, file := range []string{"testdata/golden/bound-v6.txtar", "testdata/golden/bound-v6-nested.txtar"} {
		a, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		w, err := newWorld(string(a.Files[0].Data))
		if err != nil {
			t.Fatal(err)
		}
		in := w.input()
		pl := Make(in)
		if len(pl.Shapes) == 0 {
			t.Fatalf("%s: nothing is cloned", file)
		}
		with := w.clone()
		if err := with.apply(Diff(in, pl, w.held)); err != nil {
			t.Fatal(err)
		}
		asked := 0
		for _, dst := range w.addresses(routes.IPv6) {
			for _, l := range w.fib.Links() {
				for _, src := range []netip.Addr{{}, netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd0a::1")} {
					p := packet{family: routes.IPv6, src: src, dst: dst, proto: 6, sport: 5, dport: 80, iif: "lo", oif: l.Name}
					asked++
					if err := judgePacket(w, with, pl, p); err != nil {
						t.Errorf("%s: %s\n\t%v", file, p, err)
					}
				}
			}
		}
		if asked < 50 {
			t.Errorf("%s: only %d packets", file, asked)
		}
	}
}
