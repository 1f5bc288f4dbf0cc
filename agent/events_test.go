package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"tsoagent/agent/api"
	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// told are the events since the last call, a line for each.
func (w *world) told(since *uint64) string {
	events, lost, last := w.a.ring.after(*since, maxEvents, nil)
	if lost > 0 {
		w.t.Errorf("%d events are lost", lost)
	}
	*since = last
	var b strings.Builder
	for _, e := range events {
		if e.Cause != "" {
			fmt.Fprintf(&b, "%s: %s -> %s", e.Kind, e.Cause, e.Text)
		} else {
			fmt.Fprintf(&b, "%s: %s", e.Kind, e.Text)
		}
		if e.Seconds > 0 {
			fmt.Fprintf(&b, " (%gs)", e.Seconds)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func TestEventsTellCauseAndEffect(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	var since uint64
	var have txtar.Archive
	tell := func(what string) {
		t.Helper()
		have.Files = append(have.Files, txtar.File{Name: what, Data: []byte(w.told(&since))})
	}
	w.start(tunnelPolicy, tunnelSA)
	tell("start")
	w.xfrm(partPolicy)
	w.settle()
	tell("a policy without an SA")
	w.xfrm(partSA)
	w.now = w.now.Add(3 * time.Millisecond) // as long as it takes to be read
	w.settle()
	tell("its SA")
	w.xfrm(cbc(0x300, 1), saGone(tunnelSA))
	w.settle()
	tell("a rekey to a larger overhead")
	w.replaceRoute("10.2.0.0/16", hop{oif: ipsec2})
	w.settle()
	tell("a route that moves to where nothing is covered")
	w.advance(10 * time.Second)
	tell("quiet")
	w.replaceRoute("10.2.0.0/16", hop{oif: ipsec1})
	w.addRoute("10.9.0.0/16", hop{oif: 2})
	w.settle()
	tell("and back, with another one")
	for range 2 {
		w.turn(ipsec1, ethtool.TCPSegmentation, true)
		w.settle()
	}
	tell("somebody turns a held feature on, twice")
	l := *w.kernel.Link(ipsec1)
	l.Up = false
	w.routing(routes.LinkSet{Link: &l})
	w.settle()
	tell("a link goes down")
	w.xfrm(gone(partPolicy))
	w.settle()
	tell("a policy goes")
	w.advance(10 * time.Second)
	tell("and it is quiet")
	var many []xfrmwatch.Event
	for i := range 200 {
		many = append(many, policy(1000+8*i, "10.1.0.0/16", fmt.Sprintf("10.%d.%d.0/24", 100+i/2, i%2), 0))
	}
	w.xfrm(append(many, partSA)...)
	w.settle()
	lines := strings.SplitAfter(w.told(&since), "\n")
	have.Files = append(have.Files, txtar.File{
		Name: "200 policies at once: the first and the last lines", Data: []byte(strings.Join(append(lines[:2:2], lines[len(lines)-4:]...), "")),
	})
	if n := len(lines); n > maxOfRound+8 {
		t.Errorf("%d lines of 200 policies", n)
	}
	w.dumpXFRM(tunnelPolicy, cbc(0x300, 1))
	w.settle()
	w.advance(time.Minute)
	w.told(&since)
	w.tell(&api.Paused{By: byRoot, Until: w.now.Add(time.Minute)})
	w.xfrm(partPolicy)
	w.settle()
	w.advance(2 * time.Minute)
	tell("a pause of a minute")
	w.tell(&api.Paused{By: api.Peer{Login: "alice", Process: "tsoctl", PID: 7}, Restore: true})
	w.tell(nil)
	tell("a pause that restores, and its end")
	w.xfrm(xfrmwatch.Lost{Err: errNoDevice})
	w.settle()
	tell("lost events")

	have.Comment = []byte("What the loop tells of what it does. go test ./agent -run TestEventsTell -update writes it.\n\n")
	const file = "testdata/events.txtar"
	if *update {
		if err := os.WriteFile(file, txtar.Format(&have), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(txtar.Format(&have))); d != "" {
		t.Errorf("%s (-want +got):\n%s", file, d)
	}
}

func TestStormOfRoutesTellsNothing(t *testing.T) {
	w := coveredWorld(t)
	var since uint64
	w.told(&since)
	for i := range 300 {
		w.addRoute(fmt.Sprintf("10.%d.%d.0/24", 50+i/256, i%256), hop{oif: 2})
	}
	w.settle()
	if got := w.told(&since); got != "" {
		t.Errorf("told:\n%s", got)
	}
	if c := &w.a.st.causes; len(c.kept)+c.more > 0 {
		t.Errorf("causes stay: %+v", c)
	}
}

func TestRingTellsWhatIsLost(t *testing.T) {
	r := newRing(time.Time{})
	read := func(since uint64, most int) string {
		events, lost, last := r.after(since, most, nil)
		if len(events) == 0 {
			return fmt.Sprintf("lost %d, none of %d", lost, last)
		}
		for i, e := range events {
			if e.Seq != events[0].Seq+uint64(i) || e.Text != fmt.Sprint(e.Seq) {
				t.Errorf("event %d is %+v", i, e)
			}
		}
		return fmt.Sprintf("lost %d, %d to %d of %d", lost, events[0].Seq, events[len(events)-1].Seq, last)
	}
	add := func(n int) {
		for range n {
			r.add(api.Event{Text: fmt.Sprint(r.last + 1)})
		}
	}
	check := func(since uint64, most int, want string) {
		t.Helper()
		if got := read(since, most); got != want {
			t.Errorf("after %d: %s, want %s", since, got, want)
		}
	}
	check(0, 10, "lost 0, none of 0")
	check(7, 10, "lost 0, none of 0")
	add(3)
	check(0, 10, "lost 0, 1 to 3 of 3")
	check(1, 1, "lost 0, 2 to 2 of 3")
	check(3, 10, "lost 0, none of 3")
	check(4, 10, "lost 0, 1 to 3 of 3") // of another agent
	add(maxEvents)
	check(0, 10, "lost 3, 4 to 13 of 2051")
	check(2, 10, "lost 1, 4 to 13 of 2051")
	check(3, 10, "lost 0, 4 to 13 of 2051")
	check(maxEvents, 10, "lost 0, 2049 to 2051 of 2051")
	check(maxEvents+3, 10, "lost 0, none of 2051")
	more := r.more(r.last)
	select {
	case <-more:
		t.Error("told of an event that there is not")
	default:
	}
	other := r.more(r.last)
	add(1)
	<-more
	<-other
	<-r.more(r.last - 1)
	if len(r.events) != maxEvents {
		t.Errorf("%d events are kept", len(r.events))
	}
}

// follower reads the lines of a stream of events.
func follower(t *testing.T, c interface {
	Do(*http.Request) (*http.Response, error)
}, path string) *bufio.Scanner {
	t.Helper()
	res, err := c.Do(newRequest(t, http.MethodGet, path))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = res.Body.Close() })
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != api.NDJSON {
		t.Fatalf("%s: %s, %s", path, res.Status, res.Header.Get("Content-Type"))
	}
	return bufio.NewScanner(res.Body)
}

func nextLine(t *testing.T, s *bufio.Scanner) api.EventLine {
	t.Helper()
	var line api.EventLine
	if !s.Scan() {
		t.Fatalf("the stream ends: %v", s.Err())
	}
	if err := json.Unmarshal(s.Bytes(), &line); err != nil {
		t.Fatalf("%q: %v", s.Text(), err)
	}
	return line
}

func TestFollowerHearsOfWhatHappens(t *testing.T) {
	w := controlWorld(t)
	w.start()
	c := w.serve()
	s := follower(t, c, "/v1/events?follow=true")
	if line := nextLine(t, s); line.Event == nil || line.Text != "ready: mode enforce, coverages 0" {
		t.Errorf("the first line is %+v", line)
	}
	w.a.ring.add(api.Event{Text: "next"})
	if line := nextLine(t, s); line.Event == nil || line.Text != "next" || line.Seq != 2 {
		t.Errorf("the next line is %+v", line)
	}
	l, err := c.EventsIn(t.Context(), "", 1)
	if err != nil || len(l.Events) != 1 || l.Events[0].Text != "next" || l.Last != 2 || l.Lost != 0 || l.Version != api.Version {
		t.Errorf("listed %+v, %v", l, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var got []string
	err = c.Follow(ctx, "", 0, func(line api.EventLine) error {
		if got = append(got, line.Text); len(got) == 2 {
			cancel()
		}
		return nil
	})
	if ctx.Err() == nil || len(got) != 2 {
		t.Errorf("followed %q, %v", got, err)
	}
}

// One who does not read holds nobody up, and is told how much he has missed.
func TestFollowerWhoDoesNotReadIsToldWhatHeMissed(t *testing.T) {
	w := controlWorld(t)
	w.start()
	s := follower(t, w.serve(), "/v1/events?follow=true&since=0")
	first := nextLine(t, s)
	for range 20 * maxEvents {
		w.a.ring.add(api.Event{Text: strings.Repeat("x", 200)})
	}
	last, lost := first.Seq, uint64(0)
	for last < w.a.ring.last {
		line := nextLine(t, s)
		if line.Event == nil {
			lost, last = lost+line.Lost, last+line.Lost
			continue
		}
		if line.Seq != last+1 {
			t.Fatalf("%d comes after %d", line.Seq, last)
		}
		last = line.Seq
	}
	if lost == 0 || lost > 19*maxEvents {
		t.Errorf("lost %d", lost)
	}
}

func TestFollowerEndsWithTheAgent(t *testing.T) {
	w := controlWorld(t)
	w.start()
	s := follower(t, w.serve(), "/v1/events?follow=true")
	nextLine(t, s)
	w.a.ring.add(api.Event{Text: "the last"})
	w.a.ring.end()
	if line := nextLine(t, s); line.Text != "the last" {
		t.Errorf("the last line is %+v", line)
	}
	if s.Scan() {
		t.Errorf("the stream goes on: %s", s.Text())
	}
}

func TestFollowersAreBounded(t *testing.T) {
	w := controlWorld(t)
	w.start()
	c := w.serve()
	for range maxFollows {
		nextLine(t, follower(t, c, "/v1/events?follow=true"))
	}
	res, err := c.Do(newRequest(t, http.MethodGet, "/v1/events?follow=true"))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("one more: %s", res.Status)
	}
	if _, err := c.EventsIn(t.Context(), "", 0); err != nil {
		t.Errorf("who does not follow: %v", err)
	}
}
