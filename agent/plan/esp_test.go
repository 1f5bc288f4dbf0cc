package plan

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tsoagent/ethtool"
	"tsoagent/routes"
)

// holdsOnlyWhatAPortLacks checks a hold of an esp-* feature by the words of the rule, from the
// device downwards.
func holdsOnlyWhatAPortLacks(w *world, h Hold) error {
	i := routes.Ifindex(h.Device.Index)
	at := func(i routes.Ifindex, f ethtool.Feature) ethtool.State { s, _ := w.features[i].Get(f); return s }
	st := at(i, h.Feature)
	_, ours := w.held.Holds[HoldKey{h.Device.Index, h.Feature}]
	_, oursToo := w.held.Holds[HoldKey{h.Device.Index, ethtool.ESPHWOffload}]
	switch {
	case !st.Changeable || !st.Wanted && !ours:
		return fmt.Errorf("hold on %s %s, which is %s", h.Device.Name, h.Feature, st)
	case !at(i, ethtool.ESPHWOffload).Wanted && !oursToo:
		return fmt.Errorf("hold on %s, to which no SA can be bound", h.Device.Name)
	case w.cfg.WithDefaults().dedicated(h.Device.Name) == Keep:
		return fmt.Errorf("hold on %s, which is to be kept", h.Device.Name)
	case len(h.Because) > 0 || h.Why == "":
		return fmt.Errorf("hold on %s %s without its reason", h.Device.Name, h.Feature)
	}
	var ports, sending []*routes.Link
	for _, l := range w.fib.Links() {
		if l.Master == i {
			ports = append(ports, l)
			if !l.Backup && (l.Up && l.Running || w.fib.Link(i).Kind == "bond") {
				sending = append(sending, l)
			}
		}
	}
	if len(sending) == 0 {
		sending = ports
	}
	for _, l := range sending {
		_, read := w.features[l.Index].Get(h.Feature)
		if !at(l.Index, h.Feature).Active && (read || ours) || !at(l.Index, ethtool.ESPHWOffload).Active || l.Kind == "bond" {
			return nil
		}
	}
	return fmt.Errorf("hold on %s %s, although all its ports can do it", h.Device.Name, h.Feature)
}

// TestHoldsOfESPFollowThePorts plays with bonds, teams and bridges at random. After each step the
// plan is applied: then nothing is left to do, the laws hold, and no device offers to bind SAs that
// one of its ports can't keep.
func TestHoldsOfESPFollowThePorts(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 7))
			w, err := newWorld(randomStack(r))
			if err != nil {
				t.Fatal(err)
			}
			for range 40 {
				shakeStack(w, r)
				in := w.input()
				pl := Make(in)
				for _, h := range pl.Holds {
					if err := holdsOnlyWhatAPortLacks(w, h); err != nil {
						t.Fatal(err)
					}
				}
				applyESP(w, Diff(in, pl, w.held))
				in = w.input()
				if diff := cmp.Diff(pl.Holds, Make(in).Holds); diff != "" {
					t.Fatalf("another plan once it is applied (-want +got):\n%s", diff)
				}
				if s := Diff(in, Make(in), w.held); !s.Empty() {
					t.Fatalf("not done after one round: %+v", s)
				}
				if err := offersInVain(w); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// randomStack are three devices with ports, as lines of a world. Ports can do all, none, or all but
// to segment.
func randomStack(r *rand.Rand) string {
	var b strings.Builder
	for i, kind := range []string{"bond", "team", "bridge"} {
		fmt.Fprintf(&b, "link %d %s0 kind %s\n", i+1, kind, kind)
		fmt.Fprintf(&b, "features %s0 esp-hw-offload on tx-esp-segmentation on esp-tx-csum-hw-offload on\n", kind)
	}
	for i := range 8 {
		fmt.Fprintf(&b, "link %d nic%d\n", i+10, i)
		state := []string{"on", "fixed", "off"}[r.IntN(3)]
		segments := []string{state, "fixed"}[r.IntN(2)]
		fmt.Fprintf(&b, "features nic%d esp-hw-offload %s esp-tx-csum-hw-offload %s tx-esp-segmentation %s\n", i, state, state, segments)
	}
	return b.String()
}

// shakeStack moves, raises, fails over or re-reads a port, or turns a feature of its master on or
// off as an admin would.
func shakeStack(w *world, r *rand.Rand) {
	i := routes.Ifindex(10 + r.IntN(8))
	l := *w.fib.Link(i)
	switch r.IntN(5) {
	case 0:
		l.Master = routes.Ifindex(r.IntN(4)) // 0 for none
		l.Backup = l.Master == 1 && r.IntN(2) == 0
	case 1:
		l.Up = !l.Up
		l.Running = l.Up
	case 2:
		if l.Master == 1 {
			for _, o := range w.fib.Links() {
				if o.Master == 1 {
					port := *o
					port.Backup = o.Index != i
					w.fib.Apply(routes.LinkSet{Link: &port})
				}
			}
			return
		}
	case 3:
		on := []string{"on", "off"}[r.IntN(2)]
		w.setFeatures(&l, map[ethtool.Feature]string{ethtool.ESPHWOffload: on, ethtool.ESPTxCsum: on, ethtool.ESPSegmentation: on})
	case 4:
		master := w.fib.Link(routes.Ifindex(1 + r.IntN(3)))
		setESP(w, master.Index, espFeatures[r.IntN(3)], r.IntN(2) == 0)
	}
	w.fib.Apply(routes.LinkSet{Link: &l})
}

// setESP sets one feature's bit, and leaves the others.
func setESP(w *world, i routes.Ifindex, f ethtool.Feature, on bool) {
	set := map[ethtool.Feature]string{}
	for _, o := range espFeatures {
		st, _ := w.features[i].Get(o)
		set[o] = map[bool]string{true: "on", false: "off"}[st.Wanted]
	}
	set[f] = map[bool]string{true: "on", false: "off"}[on]
	w.setFeatures(w.fib.Link(i), set)
}

// applyESP does what the agent would: at once, and overruling whoever turned a feature on.
func applyESP(w *world, s Steps) {
	for _, h := range append(s.Holds, s.Retaken...) {
		setESP(w, routes.Ifindex(h.Device.Index), h.Feature, false)
		w.held.Holds[HoldKey{h.Device.Index, h.Feature}] = HoldClaim{Device: h.Device, Was: true}
	}
	for _, k := range s.Unholds {
		setESP(w, routes.Ifindex(k.Index), k.Feature, true)
		delete(w.held.Holds, k)
	}
	for _, l := range s.LostHolds {
		delete(w.held.Holds, l.Key)
	}
}

// offersInVain finds a device that can bind SAs that one of its ports can't keep.
func offersInVain(w *world) error {
	for i := routes.Ifindex(1); i <= 3; i++ {
		up, _ := w.features[i].Get(ethtool.ESPHWOffload)
		sends := func(l *routes.Link) bool { return l.Master == i && !l.Backup && (i == 1 || l.Up) }
		for _, l := range w.fib.Links() {
			if st, _ := w.features[l.Index].Get(ethtool.ESPHWOffload); sends(l) && up.Wanted && !st.Active {
				return fmt.Errorf("%s offers esp-hw-offload, which %s has %s", w.fib.Link(i).Name, l.Name, st)
			}
		}
	}
	return nil
}
