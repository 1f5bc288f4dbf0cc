package agent

import (
	"slices"

	"tsoagent/agent/plan"
	"tsoagent/index"
	"tsoagent/xfrmwatch"
)

// peerNeeds counts who needs the way to a peer (plan.PeersOf), so that a change of one policy costs no look at the
// others. The ways themselves have the counts. What a policy has needed is worked out when the first event comes that can change it, and what it needs now at
// the end of the batch.
type peerNeeds struct {
	// bySA are the policies that an SA can concern, but for those that are noted.
	bySA  index.Index[xfrmwatch.SAPlace, xfrmwatch.PolicyIndex]
	delta map[plan.Peer]int32 // what changes of how many use a way
	noted map[xfrmwatch.PolicyIndex]bool
	// lingering are the peers of what lingers, as of that version of it.
	lingering []plan.Peer
	lingers   uint64
	anew      bool // anything may differ
}

func newPeerNeeds() peerNeeds {
	return peerNeeds{delta: map[plan.Peer]int32{}, noted: map[xfrmwatch.PolicyIndex]bool{}}
}

// placesOf is where a policy's templates look for SAs (xfrm_state_find, net/xfrm/xfrm_state.c, compares the reqid
// whatever it is).
func placesOf(p *xfrmwatch.Policy) []xfrmwatch.SAPlace {
	if covers, _ := p.Covers(); !covers {
		return nil
	}
	var out []xfrmwatch.SAPlace
	for _, t := range p.Templates {
		at := xfrmwatch.SAPlace{Reqid: t.Reqid}
		if !t.TakesFlow() {
			at.Dst = t.Dst
		}
		if !slices.Contains(out, at) {
			out = append(out, at)
		}
	}
	return out
}

// notePolicy hears of what can change the needs of a policy, before it does.
func (n *peerNeeds) notePolicy(db *xfrmwatch.DB, index xfrmwatch.PolicyIndex) {
	if n.anew || n.noted[index] {
		return
	}
	n.noted[index] = true
	p, ok := db.Policy(index)
	if !ok {
		return
	}
	for _, peer := range plan.PeersOf(db.Coverage(p)...) {
		n.delta[peer]--
	}
	for _, at := range placesOf(p) {
		n.bySA.Remove(at, index)
	}
}

// noteSA hears of an SA that comes, goes or changes, before it does.
func (n *peerNeeds) noteSA(db *xfrmwatch.DB, sa *xfrmwatch.SA) {
	if n.anew {
		return
	}
	for _, at := range []xfrmwatch.SAPlace{{Dst: sa.Dst, Reqid: sa.Reqid}, {Reqid: sa.Reqid}} {
		for _, index := range slices.Collect(n.bySA.Of(at)) {
			n.notePolicy(db, index)
		}
	}
}

// settle works out who needs what now, and returns which of the ways is needed by how many more, or fewer.
func (n *peerNeeds) settle(st *state, ways *ways) (changed map[plan.Peer]int32) {
	if n.anew {
		*n = newPeerNeeds()
		for w := range ways.toPeers {
			n.delta[w.peer] = -w.uses
		}
		for p := range st.db.Policies() {
			n.learn(st.db, p)
		}
	}
	for index := range n.noted {
		if p, ok := st.db.Policy(index); ok {
			n.learn(st.db, p)
		}
	}
	n.noted = emptied(n.noted)
	if n.lingers != st.lingers {
		for _, peer := range n.lingering {
			n.delta[peer]--
		}
		n.lingering, n.lingers = plan.PeersOf(st.lingeringCoverages()...), st.lingers
		for _, peer := range n.lingering {
			n.delta[peer]++
		}
	}
	if len(n.delta) == 0 {
		return nil
	}
	changed, n.delta = n.delta, map[plan.Peer]int32{}
	return changed
}

// first is settle for policies where nobody needs anything yet, and what lingers is left to settle.
func (n *peerNeeds) first(db *xfrmwatch.DB, ways *ways) {
	*n = peerNeeds{delta: map[plan.Peer]int32{}, noted: map[xfrmwatch.PolicyIndex]bool{}}
	n.bySA.Grow(db.PolicyCount())
	var covs []xfrmwatch.Coverage
	for p := range db.Policies() {
		covs = db.AppendCoverage(covs[:0], p)
		for _, peer := range plan.PeersOf(covs...) {
			ways.use(peer, 1)
		}
		for _, at := range placesOf(p) {
			n.bySA.Add(at, p.Index)
		}
	}
}

func (n *peerNeeds) learn(db *xfrmwatch.DB, p *xfrmwatch.Policy) {
	for _, peer := range plan.PeersOf(db.Coverage(p)...) {
		n.delta[peer]++
	}
	for _, at := range placesOf(p) {
		n.bySA.Add(at, p.Index)
	}
}

// emptied is a map without what was in it. One that was large is given up: Go's maps never shrink, and to go through one, or to clear
// it, takes as long as it would if it were still full.
func emptied[K comparable, V any](m map[K]V) map[K]V {
	if len(m) > keptMap {
		return map[K]V{}
	}
	clear(m)
	return m
}

// keptMap is how many entries a map may have had that is used again.
const keptMap = 64
