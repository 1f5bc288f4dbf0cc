package ethtool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A mirror is what a reader of the events knows.
type mirror struct {
	t      *testing.T
	events chan Event
	dumped map[Ifindex]*Features // while a dump is under way
	known  map[Ifindex]*Features
	lost   int
}

// follow runs the watcher until the test ends, and checks that Run returns then.
func follow(t *testing.T, w *Watcher) *mirror {
	t.Helper()
	m := &mirror{t: t, events: make(chan Event, 1<<16), known: map[Ifindex]*Features{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func(events []Event) {
			for _, e := range events {
				m.events <- e
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v, want context.Canceled", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run does not return")
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	m.until("the first dump", func(e Event) bool { return e == Event(ResyncEnd{}) })
	return m
}

// until applies events up to the one that is wanted.
func (m *mirror) until(what string, wanted func(Event) bool) {
	m.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case e := <-m.events:
			m.apply(e)
			if wanted(e) {
				return
			}
		case <-deadline:
			m.t.Fatalf("no event: %s", what)
		}
	}
}

func (m *mirror) apply(e Event) {
	switch e := e.(type) {
	case Lost:
		m.lost++
	case ResyncBegin:
		m.dumped = map[Ifindex]*Features{}
	case ResyncEnd:
		m.known, m.dumped = m.dumped, nil
	case FeaturesSet:
		if m.dumped != nil {
			m.dumped[e.Features.Index] = e.Features
		} else {
			m.known[e.Features.Index] = e.Features
		}
	case Gone:
		delete(m.known, e.Index)
	}
}

func tsoIs(dev Device, want State) func(Event) bool {
	return func(e Event) bool {
		set, ok := e.(FeaturesSet)
		if !ok || set.Features.Device() != dev {
			return false
		}
		got, _ := set.Features.Get(TCPSegmentation)
		return got == want
	}
}

func watch(t *testing.T) *Watcher {
	t.Helper()
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWatcherTellsForeignChanges(t *testing.T) {
	enterNS(t)
	dev := addLink(t, veth("v0"))
	m := follow(t, watch(t))
	f := m.known[dev.Index]
	if f == nil || f.Name != "v0" {
		t.Fatalf("the dump has no v0: %v", m.known)
	}
	checkState(t, f, TCPSegmentation, on)

	c := dial(t)
	mustSet(t, c, dev, onlyTSO)
	m.until("tso off", tsoIs(dev, off))
	mustSet(t, c, dev, scatterOff)
	mustSet(t, c, dev, scatterOn)
	mustSet(t, c, dev, allTSO)
	m.until("tso on", tsoIs(dev, on))
	if m.lost > 0 {
		t.Errorf("%d events were lost", m.lost)
	}
}

// A request that sticks while its dependency is down changes nothing active, so the kernel does
// not notify of it: only a dump or a look finds it.
func TestWantedAloneIsSilent(t *testing.T) {
	enterNS(t)
	dev, c := addLink(t, veth("v0")), dial(t)
	w := watch(t)
	m := follow(t, w)
	mustSet(t, c, dev, scatterOff)
	m.until("requested on", tsoIs(dev, requestedOn))
	mustSet(t, c, dev, onlyTSO)
	// The next notification is of something else and shows both.
	mustSet(t, c, dev, map[Feature]bool{"rx-gro-list": true})
	m.until("any event", func(e Event) bool {
		set := e.(FeaturesSet)
		s, _ := set.Features.Get("rx-gro-list")
		if !s.Active {
			t.Errorf("a notification of the wanted bit: rewrite KERNEL.md:\n%s", text(set.Features))
		}
		return true
	})
	mustSet(t, c, dev, map[Feature]bool{TCPSegmentation: true})
	w.Look(dev.Index)
	m.until("look", tsoIs(dev, requestedOn))
	mustSet(t, c, dev, onlyTSO)
	w.Resync()
	m.until("resync", tsoIs(dev, off))
}

func TestWatcherFollowsDevices(t *testing.T) {
	enterNS(t)
	dev, c := addLink(t, veth("v0")), dial(t)
	w := watch(t)
	m := follow(t, w)

	link, err := vnl.LinkByName("v0")
	if err != nil {
		t.Fatal(err)
	}
	if err := vnl.LinkSetName(link, "w0"); err != nil {
		t.Fatal(err)
	}
	w.Look(dev.Index)
	renamed := Device{Index: dev.Index, Name: "w0"}
	m.until("renamed", tsoIs(renamed, on))

	if err := vnl.LinkDel(link); err != nil {
		t.Fatal(err)
	}
	again := addLink(t, veth("v0"))
	w.Look(dev.Index)
	w.Look(dev.Index)
	w.Look(again.Index)
	m.until("gone", func(e Event) bool { return e == Event(Gone{dev.Index}) })
	m.until("the new v0", tsoIs(again, on))
	mustSet(t, c, again, onlyTSO)
	m.until("tso off on the new v0", tsoIs(again, off))

	link, err = vnl.LinkByName("v0")
	if err != nil {
		t.Fatal(err)
	}
	if err := vnl.LinkDel(link); err != nil {
		t.Fatal(err)
	}
	w.Resync()
	m.until("resync", func(e Event) bool { return e == Event(ResyncEnd{}) })
	if m.known[again.Index] != nil {
		t.Error("a deleted device is in the dump")
	}
}

// An overflow of the socket buffer is told, and the state is right in the end.
func TestWatcherSurvivesAnOverflow(t *testing.T) {
	enterNS(t)
	dev, c := addLink(t, veth("v0")), dial(t)
	w := watch(t)
	if err := w.group.SetReadBuffer(1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	m := &mirror{t: t, events: make(chan Event, 1<<16), known: map[Ifindex]*Features{}}
	entered, release := make(chan struct{}), make(chan struct{})
	first := true
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func(events []Event) {
			for _, e := range events {
				m.events <- e
			}
			if first {
				first = false
				close(entered)
				<-release
			}
		})
	}()
	<-entered
	for i := range 400 {
		mustSet(t, c, dev, map[Feature]bool{TCPSegmentation: i%2 != 0})
	}
	mustSet(t, c, dev, onlyTSO)
	close(release)
	m.until("lost", func(e Event) bool { l, ok := e.(Lost); return ok && errors.Is(l.Err, unix.ENOBUFS) })
	m.until("dump", func(e Event) bool { return e == Event(ResyncEnd{}) })
	checkState(t, m.known[dev.Index], TCPSegmentation, off)
	mustSet(t, c, dev, allTSO)
	// The small buffer may overflow again, so this comes by a notification or by a dump.
	m.until("tso on", func(Event) bool {
		s, _ := m.known[dev.Index].Get(TCPSegmentation)
		return m.dumped == nil && s == on
	})
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// Nothing older comes after it.
	for len(m.events) > 0 {
		m.apply(<-m.events)
	}
	checkState(t, m.known[dev.Index], TCPSegmentation, on)
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

// TestDumpsUnderChange has devices come and go, which moves what a dump in parts goes on from, and features change, while one dump follows the
// other. What notifications and dumps tell, in the order in which they come, is what is there, with no dump at the end.
func TestDumpsUnderChange(t *testing.T) {
	enterNS(t)
	var devs []Device
	for i := range 40 { // several messages of a dump each, with what comes and goes between
		dev := addLink(t, veth(fmt.Sprintf("v%d", i)))
		devs = append(devs, dev, device(t, dev.Name+"p"))
	}
	w, c := watch(t), dial(t)
	m := follow(t, w)
	begun := w.Stats().Dumps
	random := rand.New(rand.NewPCG(1, 2))
	held := map[Device]bool{}
	temporary := map[string]vnl.Link{}
	for steps := 0; steps < 1500 || w.Stats().Dumps < begun+20; steps++ {
		if w.Resync(); steps > 100000 {
			t.Fatalf("no dumps: %+v", w.Stats())
		}
		switch name := fmt.Sprintf("t%d", random.IntN(8)); {
		case random.IntN(4) > 0:
			dev := devs[random.IntN(len(devs))]
			held[dev] = !held[dev]
			mustSet(t, c, dev, map[Feature]bool{TCPSegmentation: !held[dev]})
		case temporary[name] == nil:
			temporary[name] = veth(name)
			addLink(t, temporary[name])
		default:
			if err := vnl.LinkDel(temporary[name]); err != nil {
				t.Fatal(err)
			}
			delete(temporary, name)
		}
	}
	// What came by a notification came behind all older ones.
	for dumped := true; dumped; {
		before := w.Stats().Dumps
		for len(m.events) > 0 {
			m.apply(<-m.events)
		}
		held[devs[0]] = !held[devs[0]]
		mustSet(t, c, devs[0], map[Feature]bool{TCPSegmentation: !held[devs[0]]})
		want := on
		if held[devs[0]] {
			want = off
		}
		m.until("the last change", func(Event) bool {
			s, _ := m.known[devs[0].Index].Get(TCPSegmentation)
			return m.dumped == nil && s == want
		})
		dumped = w.Stats().Dumps != before
	}
	for _, dev := range devs {
		now, err := c.Features(dev)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(now, m.known[dev.Index]); diff != "" {
			t.Errorf("%s (-kernel +told):\n%s", dev.Name, diff)
		}
	}
	if s := w.Stats(); m.lost > 0 || s.Dumps < begun+20 {
		t.Errorf("%+v", s)
	}
}

// What can't be decoded, and a dump that fails, are told once and repaired by a dump.
func TestWatcherDumpsAgainAfterTrouble(t *testing.T) {
	get, ntf := captured(t, "get-compact"), captured(t, "ntf")
	dumps := 0
	client := fake(t, func(_ genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		if dumps++; dumps == 2 {
			return nil, genltest.Error(int(unix.EBUSY))
		}
		return message(unix.ETHTOOL_MSG_FEATURES_GET_REPLY, get), nil
	})
	notifications := make(chan []genetlink.Message)
	group := genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		msgs, ok := <-notifications
		if !ok {
			return nil, io.EOF
		}
		return msgs, nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan Event, 100)
	done := make(chan error, 1)
	go func() {
		done <- newWatcher(group, client).Run(ctx, func(batch []Event) {
			for _, e := range batch {
				events <- e
			}
		})
	}()
	expect := func(want ...string) {
		t.Helper()
		for _, want := range want {
			if diff := cmp.Diff(want, fmt.Sprintf("%T", <-events)); diff != "" {
				t.Errorf("event (-want +got):\n%s", diff)
			}
		}
	}
	dump := []string{"ethtool.ResyncBegin", "ethtool.FeaturesSet", "ethtool.ResyncEnd"}
	expect(dump...)
	notifications <- message(unix.ETHTOOL_MSG_RINGS_NTF, []byte{1})
	notifications <- message(unix.ETHTOOL_MSG_FEATURES_NTF, ntf)
	expect("ethtool.FeaturesSet")
	notifications <- message(unix.ETHTOOL_MSG_FEATURES_NTF, ntf[:50])
	expect("ethtool.Lost")
	expect(dump...)
	if dumps != 3 {
		t.Errorf("%d dumps, want 3: one at the start, one that fails, one more", dumps)
	}
	cancel()
	close(notifications)
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestBackoff(t *testing.T) {
	now := time.Unix(1000, 0)
	var b backoff
	for i, want := range []time.Duration{0, 10 * time.Millisecond, 20 * time.Millisecond, 40 * time.Millisecond} {
		if got := b.next(now); got != want {
			t.Errorf("loss %d: got %v, want %v", i, got, want)
		}
	}
	for range 20 {
		b.next(now)
	}
	if got := b.next(now); got != maxBackoff {
		t.Errorf("got %v, want %v", got, maxBackoff)
	}
	if got := b.next(now.Add(backoffQuiet + 1)); got != 0 {
		t.Errorf("after a quiet time: got %v, want 0", got)
	}
}
