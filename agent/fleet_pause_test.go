package agent

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"tsoagent/agent/api"
	"tsoagent/agent/netns"
)

// waiting is a fleet with one member, which has no agent yet.
func waiting() (*Fleet, *member) {
	m := &member{names: []string{"a"}, turn: make(chan struct{})}
	f := &Fleet{look: make(chan struct{}, 1), members: map[netns.ID]*member{{}: m}}
	return f, m
}

type saidOf struct {
	api.PausedNamespace
	err error
}

func (f *Fleet) orders(t *testing.T, p *api.Paused) <-chan saidOf {
	said := make(chan saidOf, 1)
	go func() {
		list, err := f.ordered(t.Context(), "a", p)
		if err != nil {
			list = make([]api.PausedNamespace, 1)
		}
		said <- saidOf{list[0], err}
	}()
	synctest.Wait()
	return said
}

// TestPauseThatRestoresWaitsForAnAgent while there is none: nobody has given anything back yet.
func TestPauseThatRestoresWaitsForAnAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, m := waiting()
		if got := <-f.orders(t, &api.Paused{By: byRoot}); got.Why != "" || got.Paused == nil {
			t.Errorf("nobody writes, and yet: %+v", got)
		}
		said := f.orders(t, &api.Paused{By: byRoot, Restore: true})
		if len(said) > 0 {
			t.Fatalf("nobody is there, and yet: %+v", <-said)
		}
		w := bothWorld(t)
		w.crash(dedicatedOff())
		f.mu.Lock()
		m.agent = w.a
		m.handOn(w.a)
		f.mu.Unlock()
		stop := w.runLoop()
		w.read(tunnelPolicy, tunnelSA, partPolicy, partSA)
		if got := <-said; got.err != nil || got.Why != "" || got.Paused == nil || got.Paused.Left != 0 || !got.Paused.Restore {
			t.Errorf("it says %+v", got)
		}
		if off := w.held(ipsec1); off != "" {
			t.Errorf("given back, and yet off: %q", off)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// TestPauseThatRestoresWhereNobodyComes says why.
func TestPauseThatRestoresWhereNobodyComes(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*member)
		want   string
	}{
		"it can't be opened": {func(m *member) { m.why = "no way in" }, "it can't be followed: no way in"},
		"it has ended":       {func(m *member) { m.over = true }, errEndedAgent.Error()},
		"it takes too long":  {func(*member) {}, "not done within 20s"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, m := waiting()
				said := f.orders(t, &api.Paused{By: byRoot, Restore: true})
				f.mu.Lock()
				c.change(m)
				m.turns()
				f.mu.Unlock()
				if got := <-said; !strings.Contains(got.Why, c.want) || got.Paused != nil {
					t.Errorf("it says %+v, want %q", got, c.want)
				}
			})
		})
	}
}

// TestPauseOfAllLeavesOutWhatIsLetGo: that is no failure of the pause.
func TestPauseOfAllLeavesOutWhatIsLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, m := waiting()
		m.leaving, m.over = true, true
		if list, err := f.ordered(t.Context(), "", &api.Paused{By: byRoot, Restore: true}); err != nil || len(list) != 0 {
			t.Errorf("%+v, %v", list, err)
		}
		if _, err := f.ordered(t.Context(), "b", nil); err == nil || errors.Is(err, errEndedAgent) {
			t.Errorf("a name that there is not: %v", err)
		}
	})
}
