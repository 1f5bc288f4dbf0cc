package agent

import "time"

// Action is what the loop does to the kernel or to the journal, as metrics count it.
type Action uint8

// The actions.
const (
	ActOther Action = iota // none of those below; there is no such action, which a test holds
	ActHold
	ActUnhold
	ActLock
	ActUnlock
	ActClone
	ActUnclone
	ActRule
	ActUnrule
	ActLane
	ActUnlane
	ActClamp
	ActUnclamp
	ActDeviceMTU
	ActUnDeviceMTU
	ActMove
	ActJournal
	actions
)

// Actions are how actions are called, in their order.
var Actions = [actions]string{
	"other", "hold", "give_back_feature", "lock", "give_back_route", "clone", "delete_clone", "add_rule", "delete_rule",
	"make_lane", "delete_lane", "clamp", "delete_clamp", "set_device_mtu", "give_back_device_mtu", "follow_moved_device", "write_journal",
}

// Result is how an action ended.
type Result uint8

// The results.
const (
	Done Result = iota
	Failed
	results
)

// Results are how results are called, in their order.
var Results = [results]string{"done", "failed"}

// actionOf tells by the message of the log which action it is: there is one message for each thing that can
// be done, or fail, and a test holds this table to the calls.
var actionOf = map[string]Action{
	"feature held off":                                        ActHold,
	"journal can't be written, nothing is held":               ActHold,
	"features were to be held off, and can't be read back":    ActHold,
	"features can't be set":                                   ActHold,
	"feature given back":                                      ActUnhold,
	"feature can't be given back":                             ActUnhold,
	"mtu locked":                                              ActLock,
	"journal can't be written, nothing is locked":             ActLock,
	"mtu can't be locked":                                     ActLock,
	"the owner's version can't be written again":              ActLock,
	"mtu given back":                                          ActUnlock,
	"mtu can't be given back":                                 ActUnlock,
	"route thrown to the next rule":                           ActClone,
	"clone moved":                                             ActClone,
	"route cloned with a locked mtu":                          ActClone,
	"route can't be cloned":                                   ActClone,
	"clone can't be written":                                  ActClone,
	"copy can't be written":                                   ActClone,
	"clone deleted":                                           ActUnclone,
	"clone can't be deleted":                                  ActUnclone,
	"clones can't be deleted":                                 ActUnclone,
	"rule added":                                              ActRule,
	"rule can't be added":                                     ActRule,
	"journal can't be written, no lock in a table of our own": ActRule,
	"rule deleted":                                            ActUnrule,
	"rule can't be deleted":                                   ActUnrule,
	lockWithdrawn:                                             ActUnrule,
	"covered flows take a lane":                               ActLane,
	"a lane was changed by somebody else: made again":         ActLane,
	"journal can't be written, no lane is made":               ActLane,
	laneRefused:                                               ActLane,
	"lanes can't be read":                                     ActLane,
	"lane taken away":                                         ActUnlane,
	"lane can't be taken away":                                ActUnlane,
	"somebody changed the clamp: written again":               ActClamp,
	"forwarded connections clamped":                           ActClamp,
	"journal can't be written, nothing is clamped":            ActClamp,
	"nftables can't be opened":                                ActClamp,
	"the clamp can't be read":                                 ActClamp,
	"the clamp can't be written":                              ActClamp,
	"the clamp can't be deleted":                              ActUnclamp,
	"clamp deleted":                                           ActUnclamp,
	"device mtu set":                                          ActDeviceMTU,
	"the device's mtu can't be read back":                     ActDeviceMTU,
	"the device's mtu can't be set, its routes are locked":    ActDeviceMTU,
	"device mtu given back":                                   ActUnDeviceMTU,
	"the device's mtu can't be given back":                    ActUnDeviceMTU,
	"a device that was moved here can't be taken over":        ActMove,
	"journal can't be written: a device that was moved is not remembered": ActMove,
	"journal can't be written":       ActJournal,
	"journal entry can't be removed": ActJournal,
}

// ReactionBounds are the upper bounds of the classes in which reactions are counted, in seconds.
var ReactionBounds = [...]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10}

// Tally is what the loop has done since its start, in numbers that only grow.
type Tally struct {
	Actions [actions][results]uint64
	// Reactions count the rounds that wrote something because of an event, by the time from when the
	// oldest of these events was delivered until the last write was done: one for each of ReactionBounds, and
	// one for longer ones.
	Reactions [len(ReactionBounds) + 1]uint64
	// ReactionSum is how long all of them took together.
	ReactionSum time.Duration
}

// Figures are what metrics say of a namespace beyond its report. They are immutable.
type Figures struct {
	Tally
	// Features are those that are held, or are to be.
	Features []ManagedFeature
	// JournalEntries are what the journal holds.
	JournalEntries int
	// RestingLocks are routes that did not keep their lock, WithdrawnLocks selectors whose rules the kernel's
	// own lookup refuted, StuckRestores routes that could not be given back yet.
	RestingLocks, WithdrawnLocks, StuckRestores int
	// ContestedClamp says that the table of the clamp is, or was made, somebody else's.
	ContestedClamp bool
}

// ManagedFeature is a feature that is held, or is to be.
type ManagedFeature struct {
	Device  string
	Feature string
	Active  bool // the kernel has it on now
}

// figuresNow are the figures without their features.
func (a *Agent) figuresNow(now time.Time) Figures {
	f := Figures{
		Tally: a.tally, JournalEntries: a.journal.Len(), WithdrawnLocks: len(a.st.withheld), StuckRestores: len(a.st.stuck),
		ContestedClamp: len(a.clampConflicts(now)) > 0,
	}
	for k := range a.st.resting {
		if a.st.rests(k, now) {
			f.RestingLocks++
		}
	}
	return f
}

// count counts an action, which the log calls what.
func (a *Agent) count(what string, r Result) {
	if r == Done {
		a.stats.Actions++
	} else {
		a.stats.Failed++
	}
	a.tally.Actions[actionOf[what]][r]++
}

// reacted is called when a round has done its writes. What a timer asked for, and the first round, are no
// reaction to an event.
func (a *Agent) reacted(wrote bool) {
	if !wrote || a.lastP == nil || a.since.IsZero() {
		return
	}
	d := a.clock().Sub(a.since)
	class := 0
	for class < len(ReactionBounds) && d.Seconds() > ReactionBounds[class] {
		class++
	}
	a.tally.Reactions[class]++
	a.tally.ReactionSum += d
}

// counts is what an agent has counted, for the one that takes its place: the process is the same, and no counter falls.
type counts struct {
	stats   Counters
	tally   Tally
	sources map[string]SourceReport
	// mtus are those that were valid last, of who only looks: no journal has them.
	mtus []rememberedMTU
}

// counts is for an agent whose Run has returned.
func (a *Agent) counts() counts {
	c := counts{stats: a.stats, tally: a.tally, sources: map[string]SourceReport{}}
	if a.cfg.Mode == Observe {
		for id, mtu := range a.st.last {
			if p, there := a.st.db.Policy(id.Policy); there {
				c.mtus = append(c.mtus, rememberedMTU{Policy: id.Policy, Peer: id.Peer, Selector: p.Selector, Mark: p.Mark, IfID: p.IfID, MTU: mtu})
			}
		}
		c.mtus = append(c.mtus, a.st.adopted...) // by one that has not planned yet
	}
	if a.sources != nil {
		for _, s := range a.sources.stats() {
			c.sources[s.Source] = s
		}
	}
	return c
}

// goOn counts from there. It is for an agent that does not run yet.
func (a *Agent) goOn(c counts) {
	a.stats, a.tally = c.stats, c.tally
	if a.cfg.Mode == Observe {
		a.st.adopted = append(a.st.adopted, c.mtus...)
	}
	if a.sources == nil {
		return
	}
	for _, s := range c.sources {
		a.sources.goOn(s)
	}
}
