package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tsoagent/ethtool"
	"tsoagent/routes"
)

func TestObserveWritesNothingAtAll(t *testing.T) {
	cfg := dedicatedOff()
	cfg.Mode = Observe
	w := tunnelWorld(t, cfg)
	w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
	r := w.a.Report()
	if len(r.Coverages) != 2 || len(r.Holds) != 3 || len(r.Locks) != 1 || len(r.Rules) != 1 || len(r.Clones) != 1 {
		t.Errorf("the report lacks something: %+v", r)
	}
	for _, h := range r.Holds {
		if h.State != StateWanted {
			t.Errorf("hold %+v", h)
		}
	}
	if r.Locks[0].State != StateWanted {
		t.Errorf("lock %+v", r.Locks[0])
	}
	w.turn(ipsec1, tso, false)
	w.turn(ipsec1, tso, true)
	w.replaceRoute("10.2.0.0/16", hop{oif: ipsec2})
	w.settle()
	w.dumpXFRM()
	w.settle()
	w.advance(time.Hour)
	if ops := w.took(); len(ops) > 0 {
		t.Errorf("written:\n%s", strings.Join(ops, "\n"))
	}

	// Nor does it change the journal that an earlier run has left.
	e := bothWorld(t)
	e.turn(ipsec1, tso, true)
	e.crash(cfg)
	e.start(policy(81, "0.0.0.0/0", "10.2.0.0/16", 1))
	e.turn(ipsec1, ethtool.TCP6Segmentation, true)
	e.routing(routes.LinkGone{Index: ipsec1})
	e.settle()
	e.advance(time.Hour)
	if ops := e.took(); len(ops) > 0 {
		t.Errorf("after an earlier run, written:\n%s", strings.Join(ops, "\n"))
	}
}

func TestRestoreWithoutAnAgent(t *testing.T) {
	t.Run("everything", func(t *testing.T) {
		w := bothWorld(t)
		w.crash(Config{})
		w.a.once, w.a.goal = true, restoreAll
		w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
		if !w.settle() {
			t.Error("the goal is not reached")
		}
		w.mustBeBare()
		if got := w.ownRules() + w.table(5450); got != "" || w.a.dropped.rules != 1 || w.a.dropped.clones != 1 {
			t.Errorf("still there: %s; dropped %+v", got, w.a.dropped)
		}
	})
	t.Run("without a journal, by the numbers", func(t *testing.T) {
		w := bothWorld(t)
		w.restart(Config{})
		w.a.once, w.a.goal = true, restoreAll
		w.start()
		if got := w.ownRules() + w.table(5450); got != "" {
			t.Errorf("still there: %s", got)
		}
	})
	t.Run("stale only", func(t *testing.T) {
		w := bothWorld(t)
		w.crash(Config{})
		w.a.once, w.a.goal = true, restoreStale
		w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
		if !w.settle() {
			t.Error("the goal is not reached")
		}
		want := []string{"delete rule 32765 from 10.1.0.0/16 to 10.3.0.0/16 lookup 5450", "delete 10.3.0.0/16 table 5450 metric 1446", "journal remove tables"}
		if d := cmp.Diff(want, w.took()); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
		w.mustProtect()
		w.crash(dedicatedOff())
		w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
		w.mustLead()
		if n := w.count("set ") + w.count("replace "); n > 0 {
			t.Errorf("holds and locks were there:\n%s", strings.Join(w.ops, "\n"))
		}
	})
	t.Run("a feature that can't be given back keeps its entry", func(t *testing.T) {
		w := coveredWorld(t)
		w.crash(Config{})
		w.a.once, w.a.goal = true, restoreAll
		w.setErr = errors.New("out of order")
		w.resync()
		w.dumpXFRM()
		if w.step() {
			t.Error("the goal is reached although a feature is still off")
		}
		w.settle()
		w.advance(time.Second)
		w.mustBeBare()
	})
}
