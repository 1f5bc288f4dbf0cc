package agent

// A table that shrinks to a fraction leaves the memory of its size behind: Go moves nothing, and keeps a page for as long as a single object in
// it lives. So where little is left of very much, and nothing goes on, the agent of that namespace makes way for another one, as it does for
// another configuration: that one reads the kernel, adopts what is in place and has a heap of the tables as they are now. Nothing is given back
// in between.

// slimmed is how events call it.
const slimmed = "the tables have shrunk: the state is made anew"

// errSlim is the errRenew of that.
var errSlim error = slimError{}

type slimError struct{}

func (slimError) Error() string { return slimmed }

// Is has it end a Run as errRenew does.
func (slimError) Is(target error) bool { return target == errRenew }

// What is worth it: most of the routes and policies of a table that was large have gone. Making the state anew takes as long as a start with
// what is left.
const (
	slimFrom = 50_000 // routes and policies, some ten MiB
	slimTo   = 4      // a quarter of them
)

// weigh notes whether the agent would be much smaller if it was started now, and loses nothing by that: another one knows neither what was contested
// nor who was overruled once, nor how long something is to stay. While a backlog waits, most of what is there now may be about to go.
func (a *Agent) weigh(reached bool) {
	n := a.st.fib.Len() + a.st.db.PolicyCount()
	a.most = max(a.most, n)
	stout := reached && a.most >= slimFrom && n*slimTo <= a.most && !a.once && a.st.paused == nil &&
		a.backlog.empty() && len(a.st.lingering)+len(a.st.moved)+len(a.st.contested)+len(a.st.retakes) == 0
	if !a.stout.Swap(stout) && stout {
		// Where tables go slowly, what goes last can be too little work to have memory given back for.
		a.heap.Soon()
	}
}

// slim has the agents make way that would be much smaller. It reports whether one does.
func (f *Fleet) slim() (some bool) {
	said := f.makeWay()
	for _, say := range said {
		say()
	}
	return len(said) > 0
}

// makeWay is slim, and returns what is to be said of it.
func (f *Fleet) makeWay() (said sayings) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		if m.agent != nil && m.again != nil && m.generation == f.generation && m.agent.stout.Load() {
			said.add(f.log.Info, slimmed, "netns", m.names[0])
			m.again(errSlim)
		}
	}
	return said
}
