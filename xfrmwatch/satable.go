package xfrmwatch

import (
	"net/netip"

	"tsoagent/index"
)

// saTable holds SAs by key, and indexed the two ways in which an output policy finds them: by
// destination and reqid (as the kernel's bydst hash), and by reqid alone, to list the
// destinations of a transport policy that is wider than one peer.
type saTable struct {
	byKey index.Shrinking[SAKey, heldSA]
	byDst index.Index[dstReqid, *SA]
	peers map[Reqid]map[netip.Addr]int // number of SAs for each destination, of the modes that policies are split by
	// clock counts up with each live SA and dumpClock down with each dumped one (a dump lists
	// the newest first).
	clock, dumpClock int64
}

// heldSA is an SA, and when it came, for a tie of AddTime.
type heldSA struct {
	*SA
	born int64
}

type dstReqid struct {
	dst   netip.Addr
	reqid Reqid
}

func (t *saTable) put(sa *SA) {
	if t.peers == nil {
		t.peers = make(map[Reqid]map[netip.Addr]int)
	}
	born := t.byKey.Map[sa.Key].born
	t.remove(sa.Key)
	t.byKey.Set(sa.Key, heldSA{sa, born})
	t.byDst.Add(dstReqid{sa.Dst, sa.Reqid}, sa)
	if !sa.Mode.takesFlow() {
		return
	}
	if t.peers[sa.Reqid] == nil {
		t.peers[sa.Reqid] = make(map[netip.Addr]int)
	}
	t.peers[sa.Reqid][sa.Dst]++
}

func (t *saTable) remove(key SAKey) bool {
	sa := t.byKey.Map[key].SA
	if sa == nil {
		return false
	}
	t.byKey.Delete(key)
	t.byDst.Remove(dstReqid{sa.Dst, sa.Reqid}, sa)
	if !sa.Mode.takesFlow() {
		return true
	}
	peers := t.peers[sa.Reqid]
	if peers[sa.Dst]--; peers[sa.Dst] == 0 {
		if delete(peers, sa.Dst); len(peers) == 0 {
			delete(t.peers, sa.Reqid)
		}
	}
	return true
}

// equal compares values and the order of birth of SAs that share a destination.
func (t *saTable) equal(o *saTable) bool {
	if len(t.byKey.Map) != len(o.byKey.Map) {
		return false
	}
	for key, sa := range t.byKey.Map {
		if other := o.byKey.Map[key]; other.SA == nil || !sa.Equal(other.SA) {
			return false
		}
	}
	return true
}

// setSA stores an SA. visible is the set that readers see: from there a dump takes over what
// the kernel does not tell (Dying) and the pointers of unchanged SAs.
func (t *tables) setSA(ev SASet, visible *saTable) bool {
	sa := ev.SA
	if sa == nil {
		return false
	}
	old := t.sas.byKey.Map[sa.Key].SA
	switch {
	case ev.Dumped && old != nil:
		return false // a live event overtook the dump
	case ev.Dumped:
		if was := visible.byKey.Map[sa.Key].SA; was != nil {
			// The kernel does not dump km.dying.
			if was.Dying && !sa.Dying && was.AddTime == sa.AddTime {
				dying := *sa
				dying.Dying = true
				sa = &dying
			}
			if was.Equal(sa) {
				sa = was
			}
		}
		t.sas.dumpClock--
		t.sas.put(sa)
		t.sas.byKey.Set(sa.Key, heldSA{sa, t.sas.dumpClock})
		return true
	case ev.Update && old != nil && !old.Larval:
		sa = old.updated(sa)
	}
	if old != nil && old.Equal(sa) {
		return false
	}
	if !sa.Larval {
		t.dropLarval(sa)
	}
	t.sas.put(sa)
	if old == nil || old.Larval {
		t.sas.clock++
		t.sas.byKey.Set(sa.Key, heldSA{sa, t.sas.clock})
	}
	return true
}

// updated returns the SA after a successful XFRM_MSG_UPDSA with the values of u: only these are
// taken over from the request (xfrm_state_update, net/xfrm/xfrm_state.c).
func (s *SA) updated(u *SA) *SA {
	n := *s
	n.Dying = false
	if u.Encap.Type == n.Encap.Type {
		n.Encap = u.Encap
	}
	if u.OutputMark != (Mark{}) {
		n.OutputMark = u.OutputMark
	}
	if u.IfID != 0 {
		n.IfID = u.IfID
	}
	return &n
}

// dropLarval forgets the larval SA without an SPI that a new SA resolves: the kernel deletes it
// without an event (xfrm_state_add, net/xfrm/xfrm_state.c).
func (t *tables) dropLarval(sa *SA) {
	key := sa.Key
	key.SPI = 0
	if l := t.sas.byKey.Map[key].SA; l != nil && l.Larval && l.Reqid == sa.Reqid && l.Mode == sa.Mode &&
		l.Src == sa.Src && l.IfID == sa.IfID {
		t.sas.remove(key)
	}
}
