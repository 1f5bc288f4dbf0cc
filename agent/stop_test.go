package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/xfrmwatch"
)

// runLoop runs the agent's own loop on the world, in a synctest bubble, until the context ends.
// stop ends it and returns what it returned.
func (w *world) runLoop() (stop func() error) {
	w.live = true
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() {
		err := w.a.loop(ctx, nil)
		w.a.reports.end(w.a)
		close(w.a.ended)
		done <- err
	}()
	return func() error {
		cancel()
		return <-done
	}
}

// read lets the running agent read everything, and waits until it has done what it wants.
func (w *world) read(items ...xfrmwatch.Event) {
	w.t.Helper()
	w.resync()
	w.dumpXFRM(items...)
	synctest.Wait()
}

func TestGracefulStopRestoresOrKeeps(t *testing.T) {
	for name, c := range map[string]struct {
		onStop OnStop
		keeps  bool
	}{"default": {"", false}, "restore": {RestoreOnStop, false}, "keep": {KeepOnStop, true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := dedicatedOff()
				cfg.OnStop = c.onStop
				w := tunnelWorld(t, cfg)
				stop := w.runLoop()
				w.read(tunnelPolicy, tunnelSA, partPolicy, partSA)
				w.mustProtect()
				w.mustLead()
				w.took()
				began := time.Now()
				if err := stop(); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took > 100*time.Millisecond {
					t.Errorf("the stop took %s", took)
				}
				if c.keeps {
					// Nobody follows rules and clones from now on; the rest doesn't go stale.
					if n := w.count("set ") + w.count("replace "); n > 0 {
						t.Errorf("on_stop: keep, and written: %q", w.ops)
					}
					w.mustProtect()
					if got := w.ownRules() + w.table(5450); got != "" {
						t.Errorf("still there: %s", got)
					}
					return
				}
				w.mustBeBare() // the entry of our tables is gone, too
				if got := w.ownRules() + w.table(5450); got != "" {
					t.Errorf("still there: %s", got)
				}
			})
		})
	}
}

func TestStopBeforeAnythingIsKnownEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, Config{})
		stop := w.runLoop()
		synctest.Wait()
		if w.a.Report() != nil {
			t.Error("a report before the first plan")
		}
		began := time.Now()
		err := stop()
		if took := time.Since(began); took > time.Second || err != nil {
			t.Errorf("after %s: %v", took, err)
		}
	})
}

func TestStopBeforeAnythingIsKnownTellsOfWhatWasAdopted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, Config{})
		w.a.st.holds[plan.HoldKey{Index: 7, Feature: ethtool.TCPSegmentation}] = plan.HoldClaim{Was: true}
		stop := w.runLoop()
		synctest.Wait()
		if err := stop(); err == nil || !strings.Contains(err.Error(), "tsoctl restore") {
			t.Errorf("stopped with %v", err)
		}
	})
}

// A stop that comes before the first plan says so of each kind of what an earlier run has left.
func TestStopBeforeAnythingIsKnownTellsOfEachKind(t *testing.T) {
	claim := deviceMTU{Index: 7, Name: "ipsec1", Claim: plan.MTUClaim{Was: 1500, Ours: 1446}}
	for _, e := range []journal.Entry{
		entry(clampID, kindClamp, clampRecord{Table: "tsoagent"}),
		entry(mtuDeviceID(7), kindDeviceMTU, claim),
		entry(laneID(2), kindLane, laneRecord{2, "nic1"}),
	} {
		t.Run(string(e.Kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := tunnelWorld(t, Config{})
				w.a.adopt(&journal.Recovery{Entries: []journal.Entry{e}})
				stop := w.runLoop()
				synctest.Wait()
				if err := stop(); err == nil || !strings.Contains(err.Error(), "tsoctl restore") {
					t.Errorf("stopped with %v", err)
				}
			})
		})
	}
}

// A namespace can be let go before all is given back. Its journal stays then: who still lives in
// it can be found by a process.
func TestNamespaceThatIsLetGoTooEarlyKeepsItsJournal(t *testing.T) {
	for _, left := range []bool{false, true} {
		t.Run(fmt.Sprint("left ", left), func(t *testing.T) {
			w, f := laneWorld(t, laneConfig())
			w.a.dir = cookieDir(t.TempDir(), 4711)
			if err := os.MkdirAll(w.a.dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if left {
				f.removeErr = errors.New("busy")
				w.start(partPolicy, partSA)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			cancel(errLetGo)
			if err := (&Fleet{}).closeMember(ctx, &member{names: []string{"blue"}}, w.a, nil); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(w.a.dir); (err == nil) != left {
				t.Errorf("the journal's directory: %v", err)
			}
			if told := strings.Contains(w.logs.String(), "before everything was given back"); told != left {
				t.Errorf("the log:\n%s", w.logs.String())
			}
		})
	}
}

func TestStopThatCannotRestoreSaysWhatToDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, Config{})
		stop := w.runLoop()
		w.read(tunnelPolicy, tunnelSA)
		w.replaceErr = errors.New("out of order")
		began := time.Now()
		err := stop()
		if took := time.Since(began); took >= stopWithin || err == nil || !strings.Contains(err.Error(), "tsoctl restore") || !strings.Contains(err.Error(), "10.2.0.0/16") {
			t.Errorf("after %s: %v", took, err)
		}
		if n := strings.Count(w.logs.String(), "mtu can't be given back"); n != stuckAfter {
			t.Errorf("tried %d times, want %d", n, stuckAfter)
		}
	})
}

func TestLoopIsIdleWithoutEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := tunnelWorld(t, dedicatedOff())
		w.a.cfg.ResyncEvery = Duration(24 * time.Hour) // the fakes have no sources to resync
		stop := w.runLoop()
		w.read(tunnelPolicy, tunnelSA)
		before := w.a.stats.Rounds
		time.Sleep(time.Hour) // the bubble's time
		synctest.Wait()
		if n := w.a.stats.Rounds - before; n > 0 {
			t.Errorf("%d rounds in an idle hour", n)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestObserverStopsWithoutAWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := dedicatedOff()
		cfg.Mode = Observe
		w := tunnelWorld(t, cfg)
		stop := w.runLoop()
		w.read(tunnelPolicy, tunnelSA)
		if err := stop(); err != nil {
			t.Error(err)
		}
		if ops := w.took(); len(ops) > 0 {
			t.Errorf("written: %q", ops)
		}
	})
}
