package agent

import (
	"net/netip"
	"slices"

	"tsoagent/agent/plan"
	"tsoagent/xfrmwatch"
)

// peerNeeds counts who needs the way to a peer (plan.PeersOf), so that a change of one policy costs no look at the
// others. What a policy has needed is worked out when the first event comes that can change it, and what it needs now at
// the end of the batch.
type peerNeeds struct {
	uses map[plan.Peer]int
	// bySA are the policies that an SA can concern, but for those that are noted.
	bySA  map[saPlace][]xfrmwatch.PolicyIndex
	delta map[plan.Peer]int // what changes of uses
	noted map[xfrmwatch.PolicyIndex]bool
	// lingering are the peers of what lingers, as of that version of it.
	lingering []plan.Peer
	lingers   uint64
	anew      bool // anything may differ
}

// saPlace is where a template looks for SAs: a destination, invalid for one that takes the flow's own addresses, and a
// reqid (xfrm_state_find, net/xfrm/xfrm_state.c, compares it whatever it is).
type saPlace struct {
	dst   netip.Addr
	reqid xfrmwatch.Reqid
}

func newPeerNeeds() peerNeeds {
	return peerNeeds{
		uses: map[plan.Peer]int{}, bySA: map[saPlace][]xfrmwatch.PolicyIndex{},
		delta: map[plan.Peer]int{}, noted: map[xfrmwatch.PolicyIndex]bool{},
	}
}

// placesOf is where a policy's templates look for SAs.
func placesOf(p *xfrmwatch.Policy) []saPlace {
	if covers, _ := p.Covers(); !covers {
		return nil
	}
	var out []saPlace
	for _, t := range p.Templates {
		at := saPlace{reqid: t.Reqid}
		if !t.TakesFlow() {
			at.dst = t.Dst
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
		list := n.bySA[at]
		if i := slices.Index(list, index); i >= 0 {
			list[i] = list[len(list)-1]
			list = list[:len(list)-1]
		}
		if n.bySA[at] = list; len(list) == 0 {
			delete(n.bySA, at)
		}
	}
}

// noteSA hears of an SA that comes, goes or changes, before it does.
func (n *peerNeeds) noteSA(db *xfrmwatch.DB, sa *xfrmwatch.SA) {
	for _, at := range []saPlace{{sa.Dst, sa.Reqid}, {reqid: sa.Reqid}} {
		for list := n.bySA[at]; len(list) > 0 && !n.anew; list = n.bySA[at] {
			n.notePolicy(db, list[len(list)-1])
		}
	}
}

// settle works out who needs what now, and returns which peers came to be needed, and which are no more.
func (n *peerNeeds) settle(st *state) (came, gone []plan.Peer) {
	if n.anew {
		clear(n.bySA)
		clear(n.delta)
		clear(n.noted)
		for peer, uses := range n.uses {
			n.delta[peer] = -uses
		}
		for p := range st.db.Policies() {
			n.learn(st.db, p)
		}
		n.lingering, n.lingers, n.anew = nil, 0, false
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
	for peer, by := range n.delta {
		was := n.uses[peer]
		switch now := was + by; {
		case now <= 0:
			delete(n.uses, peer)
			if was > 0 {
				gone = append(gone, peer)
			}
		default:
			if n.uses[peer] = now; was == 0 {
				came = append(came, peer)
			}
		}
	}
	n.delta = emptied(n.delta)
	return came, gone
}

func (n *peerNeeds) learn(db *xfrmwatch.DB, p *xfrmwatch.Policy) {
	for _, peer := range plan.PeersOf(db.Coverage(p)...) {
		n.delta[peer]++
	}
	for _, at := range placesOf(p) {
		n.bySA[at] = append(n.bySA[at], p.Index)
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
