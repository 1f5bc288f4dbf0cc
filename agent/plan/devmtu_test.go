package plan

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"tsoagent/routes"
)

// deviceWorld has an xfrm interface with a connected route, which the kernel owns, and another one.
const deviceWorld = `link 1 lo mtu 65536
link 2 eth0
link 4 xfrm0 if_id 7
route 192.0.2.0/24 dev eth0 proto kernel
route 0.0.0.0/0 via 192.0.2.254 dev eth0
route 10.0.0.0/24 dev xfrm0 proto kernel
route 10.2.0.0/16 dev xfrm0
sa esp 192.0.2.1 192.0.2.2 spi 1 gcm if_id 7
sa esp 192.0.2.1 192.0.2.2 spi 2 cbc-sha256 reqid 2 if_id 7
`

// mtuWorld is a world with the claims on devices.
type mtuWorld struct {
	*world
	mtus map[routes.Ifindex]MTUClaim
}

func newMTUWorld(text string) (*mtuWorld, error) {
	w, err := newWorld(text)
	if err != nil {
		return nil, err
	}
	w.cfg.CarrierMTU = CarrierDevice
	return &mtuWorld{w, map[routes.Ifindex]MTUClaim{}}, nil
}

func (w *mtuWorld) input() Input {
	in := w.world.input()
	in.MTUs = w.mtus
	return in
}

// set is what the kernel does: IPv6's own MTU follows.
func (w *mtuWorld) set(i routes.Ifindex, mtu int) {
	l := *w.fib.Link(i)
	l.MTU, l.MTU6 = mtu, 0
	w.fib.Apply(routes.LinkSet{Link: &l})
}

func (w *mtuWorld) applyMTUs(s MTUSteps) {
	for _, d := range s.Set {
		w.set(d.Device.Index, d.Want)
		w.mtus[d.Device.Index] = MTUClaim{Was: d.Was, Ours: d.Want}
	}
	for _, y := range s.Yield {
		c := y.Claim
		c.Theirs = y.Device.MTU
		w.mtus[y.Device.Index] = c
	}
	for _, b := range s.Back {
		w.set(b.Device.Index, b.Claim.Was)
		delete(w.mtus, b.Device.Index)
	}
	for _, i := range s.Drop {
		delete(w.mtus, i)
	}
}

func (w *mtuWorld) text(pl *Plan) string {
	var out []string
	for _, d := range pl.DeviceMTUs {
		out = append(out, fmt.Sprintf("%s %d was %d because %s", d.Device.Name, d.Want, d.Was, renderIDs(d.Because)))
	}
	for _, l := range pl.Locks {
		out = append(out, fmt.Sprintf("lock %s %s", l.Route.Dst, l.Want))
	}
	for _, sh := range pl.Shapes {
		for c := range sh.Clones() {
			out = append(out, fmt.Sprintf("clone %s %s", c.Dst, c.MTU))
		}
	}
	return strings.Join(out, "; ")
}

func TestDeviceMTUs(t *testing.T) {
	const policy = "policy 17 src 0.0.0.0/0 dst 0.0.0.0/0 if_id 7 priority 2 tmpl esp tunnel 192.0.2.1 192.0.2.2"
	for _, c := range []struct{ name, world, want, why string }{
		{"one policy", policy, "xfrm0 1446 was 1500 because policy 17", ""},
		{"two that agree", "policy 1 src 10.1.0.0/16 dst 10.2.0.0/16 if_id 7 priority 1 tmpl esp tunnel 192.0.2.1 192.0.2.2\n" + policy + " reqid 1\nsa esp 192.0.2.1 192.0.2.2 spi 3 gcm if_id 7 reqid 1",
			"xfrm0 1446 was 1500 because policy 1, policy 17", ""},
		{"two that don't", "policy 1 src 0.0.0.0/0 dst 10.2.0.0/16 if_id 7 priority 1 tmpl esp tunnel 192.0.2.1 192.0.2.2 reqid 2\n" + policy,
			"lock 10.2.0.0/16 mtu lock 1438; clone 10.0.0.0/24 mtu lock 1446", "different MTUs left"},
		{"the device has room", policy + "\nlink 4 xfrm0 if_id 7 mtu 1400", "", "leaves room"},
		{"before the first SA", policy + " reqid 9", "", "no valid SA"},
		{"below 1280", policy + "\npeer 192.0.2.2 1320", "lock 10.2.0.0/16 mtu lock 1266; clone 10.0.0.0/24 mtu lock 1266", "below 1280"},
		{"an IPv6 route with its own MTU", "route fd02::/16 dev xfrm0 mtu 1480\n" + policy, "lock 10.2.0.0/16 mtu lock 1446; clone 10.0.0.0/24 mtu lock 1446", "MTU of its own"},
		{"an IPv6 route with a locked one", "route fd02::/16 dev xfrm0 mtu lock 1480\n" + policy, "xfrm0 1446 was 1500 because policy 17", ""},
		{"the way to the peer", "route 192.0.2.2/32 dev xfrm0\n" + policy, "lock 10.2.0.0/16 mtu lock 1446; clone 10.0.0.0/24 mtu lock 1446", "outer packets"},
		{"one that goes past the tunnel and has room", "link 10 tun0 gre local 192.0.2.1 remote 192.0.2.2 mtu 1400\nroute 192.0.2.2/32 dev xfrm0\nroute 10.9.0.0/16 dev tun0\n" +
			"policy 1 src 0.0.0.0/0 dst 10.9.1.0/24 priority 1 tmpl esp tunnel 192.0.2.1 192.0.2.2 reqid 8\nsa esp 192.0.2.1 192.0.2.2 spi 8 reqid 8 gcm\n" +
			"policy 2 src 0.0.0.0/0 dst 10.9.2.0/24 priority 1 tmpl esp tunnel 192.0.2.1 198.51.100.9 reqid 9\nsa esp 192.0.2.1 198.51.100.9 spi 9 reqid 9 gcm\n" + policy,
			"lock 10.2.0.0/16 mtu lock 1446; clone 10.0.0.0/24 mtu lock 1446; clone 10.9.1.0/24 mtu lock 1390", "room for 1400"},
		{"no policy", "", "", ""},
		{"no if_id", "policy 17 src 0.0.0.0/0 dst 10.2.0.0/16 tmpl esp tunnel 192.0.2.1 192.0.2.2\nsa esp 192.0.2.1 192.0.2.2 spi 9 gcm", "xfrm0 1446 was 1500 because policy 17", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, err := newMTUWorld(deviceWorld + c.world)
			if err != nil {
				t.Fatal(err)
			}
			pl := Make(w.input())
			if diff := cmp.Diff(c.want, w.text(pl)); diff != "" {
				t.Errorf("(-want +got)\n%s\n%s", diff, w.render(pl, Steps{}))
			}
			notes := ""
			for _, v := range pl.Verdicts {
				notes += strings.Join(v.Notes, "\n")
			}
			if !strings.Contains(notes, c.why) {
				t.Errorf("nothing says %q:\n%s", c.why, notes)
			}
		})
	}
}

func TestDeviceMTUFollowsAndYields(t *testing.T) {
	w, err := newMTUWorld(deviceWorld + "policy 17 src 0.0.0.0/0 dst 0.0.0.0/0 if_id 7 tmpl esp tunnel 192.0.2.1 192.0.2.2\n")
	if err != nil {
		t.Fatal(err)
	}
	step := func(what, wantPlan string, wantMTU int, wantClaim MTUClaim) {
		t.Helper()
		for range 2 { // the second time there is nothing to do
			in := w.input()
			pl := Make(in)
			if diff := cmp.Diff(wantPlan, w.text(pl)); diff != "" {
				t.Errorf("%s: (-want +got)\n%s", what, diff)
			}
			w.applyMTUs(DiffMTUs(in, pl))
		}
		if s := DiffMTUs(w.input(), Make(w.input())); !s.Empty() {
			t.Errorf("%s: still to do: %+v", what, s)
		}
		if got := w.fib.Link(4).MTU; got != wantMTU {
			t.Errorf("%s: mtu %d, not %d", what, got, wantMTU)
		}
		if diff := cmp.Diff(wantClaim, w.mtus[4]); diff != "" {
			t.Errorf("%s: claim (-want +got)\n%s", what, diff)
		}
	}
	set := "xfrm0 1446 was 1500 because policy 17"
	step("at first", set, 1446, MTUClaim{Was: 1500, Ours: 1446})
	w.peers[Peer{Addr: netip.MustParseAddr("192.0.2.2")}] = 1400
	step("a smaller path", "xfrm0 1346 was 1500 because policy 17", 1346, MTUClaim{Was: 1500, Ours: 1346})
	delete(w.peers, Peer{Addr: netip.MustParseAddr("192.0.2.2")})
	step("back", set, 1446, MTUClaim{Was: 1500, Ours: 1446})

	// Died between the journal and the write.
	w.mtus[4] = MTUClaim{Was: 1500, Ours: 1346, Prev: 1446}
	step("died ahead of a write", set, 1446, MTUClaim{Was: 1500, Ours: 1446})
	w.mtus[4] = MTUClaim{Was: 1500, Ours: 1446, Prev: 1500}
	w.set(4, 1500)
	step("died ahead of the first write", set, 1446, MTUClaim{Was: 1500, Ours: 1446})

	w.set(4, 1480)
	step("somebody sets it", "lock 10.2.0.0/16 mtu lock 1446; clone 10.0.0.0/24 mtu lock 1446", 1480, MTUClaim{Was: 1500, Ours: 1446, Theirs: 1480})
	w.set(4, 1446)
	step("even to ours", "", 1446, MTUClaim{Was: 1500, Ours: 1446, Theirs: 1480})
	w.set(4, 1500)
	step("and back", "lock 10.2.0.0/16 mtu lock 1446; clone 10.0.0.0/24 mtu lock 1446", 1500, MTUClaim{Was: 1500, Ours: 1446, Theirs: 1480})

	in := w.input()
	w.applyMTUs(DiffMTUs(in, &Plan{}))
	if len(w.mtus) != 0 || w.fib.Link(4).MTU != 1500 {
		t.Errorf("the cause is gone: %v, mtu %d", w.mtus, w.fib.Link(4).MTU)
	}
	step("another cause", set, 1446, MTUClaim{Was: 1500, Ours: 1446})
	w.fib.Apply(routes.Lost{})
	if s := DiffMTUs(w.input(), &Plan{}); !s.Empty() {
		t.Errorf("given back although the routes may be stale: %+v", s)
	}
	w.fib.Apply(routes.LinkGone{Index: 4})
}

func TestDeviceMTUsKeepTheirPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := genWorld(t)
		w, err := newMTUWorld(text)
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		if err := deviceLaws(w, rng); err != nil {
			t.Fatalf("%v\n\nin the world\n%s", err, text)
		}
	})
}

func deviceLaws(w *mtuWorld, rng *rand.Rand) error {
	in := w.input()
	pl := Make(in)
	want := map[routes.Ifindex]int{}
	for _, d := range pl.DeviceMTUs {
		if d.Want < 1280 || d.Want >= d.Was || len(d.Because) == 0 || d.Was != d.Device.MTU {
			return fmt.Errorf("%s from %d to %d because %v", d.Device.Name, d.Was, d.Want, d.Because)
		}
		want[d.Device.Index] = d.Want
	}
	onSet := func(b *routes.Body) bool {
		return len(b.Nexthops) > 0 && !slices.ContainsFunc(b.Nexthops, func(n routes.Nexthop) bool { return want[n.Oif] == 0 })
	}
	for _, l := range pl.Locks {
		if onSet(l.Route.Body) {
			return fmt.Errorf("%s is locked besides", l.Route.Key())
		}
	}
	for _, sh := range pl.Shapes {
		for c := range sh.Clones() {
			if !c.Throw && onSet(c.Of.Body) {
				return fmt.Errorf("%s is cloned besides", c.Dst)
			}
		}
	}
	// No flow through a set device has less left than its MTU.
	for _, p := range w.packets(rng, 250) {
		at := w.lookup(p)
		if at.route.Body == nil || !onSet(at.route.Body) {
			continue
		}
		for i, f := range w.fates(p, at.route) {
			mtu := want[at.route.Body.Nexthops[i].Oif]
			if f.kind == uncovered || f.kind == unknown {
				return fmt.Errorf("%s\n\tgoes uncovered by a device whose MTU is set: %s", p, at)
			}
			if f.kind != covered {
				continue
			}
			path := w.pathMTU(at.route)
			if f.left != 0 {
				path = min(path, f.left)
			}
			if !f.wrapped && leavesToPeer(f.cov) && w.leftOf(f.cov, path) == path && mtu < path {
				return fmt.Errorf("%s\n\thas room for %d, and the device's MTU is %d: %s", p, path, mtu, at)
			}
			if left := w.expected(f, at.route, false); left != 0 && left != mtu {
				return fmt.Errorf("%s\n\thas %d left, and the device's MTU is %d: %s", p, left, mtu, at)
			}
		}
	}
	// Once it is done, the plan stays, and can be undone.
	with := &mtuWorld{w.clone(), map[routes.Ifindex]MTUClaim{}}
	with.applyMTUs(DiffMTUs(in, pl))
	for id, mtu := range pl.MTU {
		with.last[id] = mtu
	}
	again := Make(with.input())
	compare := append(slices.Clone(comparePlans), cmpopts.IgnoreFields(DeviceMTU{}, "Device"))
	if diff := cmp.Diff(pl.DeviceMTUs, again.DeviceMTUs, compare...); diff != "" {
		return fmt.Errorf("the plan changes once it is applied (-first +second):\n%s", diff)
	}
	if diff := cmp.Diff(w.text(pl), with.text(again)); diff != "" {
		return fmt.Errorf("the plan changes once it is applied (-first +second):\n%s", diff)
	}
	if s := DiffMTUs(with.input(), again); !s.Empty() {
		return fmt.Errorf("there are still steps to take: %+v", s)
	}
	with.applyMTUs(DiffMTUs(with.input(), &Plan{}))
	for _, l := range w.fib.Links() {
		if got := with.fib.Link(l.Index).MTU; got != l.MTU {
			return fmt.Errorf("%s has mtu %d in the end, not %d", l.Name, got, l.MTU)
		}
	}
	return nil
}
