// Package plan decides. From what was observed and the configuration it works out all holds,
// locks and verdicts (Make), and from those and what is in place the steps to take (Diff).
//
// It is pure: no I/O, no clock, no log. The same input gives the same plan in the same order.
package plan

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"tsoagent/ethtool"
	"tsoagent/lane"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// Input is all that a plan follows from. Make changes nothing in it.
type Input struct {
	Config   Config
	XFRM     *xfrmwatch.DB
	FIB      *routes.FIB
	Features map[routes.Ifindex]*ethtool.Features
	Keys     []sockopt.Key
	// Trusted are the users, besides root, whose keys count like policies on NICs that are shared. Setting a key takes no privilege.
	Trusted []uint32
	// KeysStale says that the keys could not be read since they changed last, or never.
	KeysStale bool
	// Lingering are coverages whose policy went away a short while ago and which are kept until
	// it has been quiet: a daemon that replaces a policy must not cost its flows the lock.
	Lingering []xfrmwatch.Coverage
	// Peers has the route to each outer peer (PeersOf), as the kernel answered last; nil for none.
	Peers Paths
	// Outers holds the route of the outer packets of each tunnel (OutersOf), by the tunnel's
	// index, as the kernel answered last.
	Outers map[routes.Ifindex]Path
	// L2TP is how the L2TP devices wrap what they send: their links don't tell.
	L2TP map[routes.Ifindex]routes.Encap
	// Probed is what a probe has shown on this very kernel.
	Probed map[ProbeKey]Probed
	// Last is the last inner MTU that was valid for a coverage, kept while its policy stays.
	Last map[xfrmwatch.CoverageID]int
	// Locks are the in-place locks that are ours.
	Locks map[routes.Key]LockClaim
	// Holds are the holds that are ours.
	Holds map[HoldKey]HoldClaim
	// MTUs are the devices whose MTU we have set.
	MTUs map[routes.Ifindex]MTUClaim
	// Withheld are shapes of selectors for which the kernel's own lookup did not answer as
	// foreseen, with the reason.
	Withheld map[ShapeID]string
	// Forwarding tells for each family whether the host forwards.
	Forwarding map[routes.Family]bool
}

// PathsOf answers as Make counts it what is left, in bytes, to the packets of an SA by the way to its peer,
// and whether that is known.
func PathsOf(in Input) func(*xfrmwatch.SA) (int, bool) {
	p := newPlanner(in)
	p.collect()
	p.readPaths()
	p.findTunnels()
	return p.peerMTU
}

// Peer is an outer peer of an SA with what takes part in the lookup of the route to it.
type Peer struct {
	Addr, Src netip.Addr
	Mark      xfrmwatch.Mark
}

// Path is the route to an address as the kernel answered: the MTU of what it carries in bytes,
// the device it leaves by, the table that has it and the source that it chooses. The zero value
// means that there is none.
type Path struct {
	MTU   int
	Oif   routes.Ifindex
	Table routes.TableID
	Src   netip.Addr
}

// Paths are the routes to outer peers. There can be as many as policies.
type Paths interface {
	// Path is the route to a peer. It is false where there is none.
	Path(Peer) (Path, bool)
	// All yields them all.
	All() iter.Seq2[Peer, Path]
}

// PathsTo are routes by their peers.
type PathsTo map[Peer]Path

var _ Paths = PathsTo(nil)

// Path is the route to a peer.
func (p PathsTo) Path(peer Peer) (Path, bool) {
	path, ok := p[peer]
	return path, ok
}

// All yields them all.
func (p PathsTo) All() iter.Seq2[Peer, Path] { return maps.All(p) }

// ProbeKey names what a probe tries: a kind of device (IFLA_INFO_KIND) above SAs of one kind.
type ProbeKey struct {
	Kind   string
	Family routes.Family // of the outer packets
	Mode   xfrmwatch.Mode
	SA     string // xfrmwatch.SA.Suite
}

// Probed is what a probe has shown.
type Probed struct {
	KeepTSO   bool // super-packets are carried correctly and at least as fast
	BreaksUDP bool // UDP_SEGMENT senders lose data with tx-udp-segmentation on
}

// PeerOf is the peer of an SA.
func PeerOf(sa *xfrmwatch.SA) Peer { return Peer{Addr: sa.Dst, Src: sa.Src, Mark: sa.OutputMark} }

// MTUMetric is a route's MTU metric: its value in bytes, 0 for none, and its lock bit.
type MTUMetric = routes.MTUMetric

// LockClaim says that we locked a route in place: what its MTU metric was, and what we wrote.
type LockClaim struct {
	Was  MTUMetric `json:"was"`
	Ours MTUMetric `json:"ours"`
	// Prev is what we had written before Ours: the journal is written before the kernel, so
	// after a crash either can be in place.
	Prev MTUMetric `json:"prev,omitzero"`
}

// Wrote reports whether a route's metric is one that we wrote.
func (c LockClaim) Wrote(m MTUMetric) bool {
	return m == c.Ours || c.Prev.MTU != 0 && m == c.Prev
}

// Plan is what is to be held and locked, and a verdict for each coverage.
type Plan struct {
	Holds    []Hold
	Locks    []Lock
	Shapes   []Shape
	Lanes    []Lane
	Tunnels  []Tunnel
	Verdicts []Verdict
	// MTU holds the inner MTU of each coverage that has a valid SA now; the caller keeps it as
	// Input.Last.
	MTU map[xfrmwatch.CoverageID]int
	// Current are the coverages of this plan without the lingering ones; the caller keeps those
	// whose policy goes away.
	Current []xfrmwatch.Coverage
	// Clamp are the MSS values for forwarded connections (partial: clamp), in the order of addresses.
	Clamp []ClampEntry
	// DeviceMTUs are the carriers whose own MTU is to be set (carrier_mtu: device).
	DeviceMTUs []DeviceMTU
	// Yielded are carriers whose MTU would be set had not somebody else set it since we did.
	Yielded []routes.Ifindex

	complete func(*Plan)
	counts   *planner // while it has no newer plan
}

// Complete puts together the locks, verdicts, MTUs, coverages and the holds' causes, which take as long as there are of them, and
// returns the plan. A plan of a Planner has them only then, and only until the next one.
func (pl *Plan) Complete() *Plan {
	if fn := pl.complete; fn != nil {
		pl.complete = nil
		fn(pl)
	}
	return pl
}

// Hold is one feature that is kept off on one carrier.
type Hold struct {
	Device  ethtool.Device
	Feature ethtool.Feature
	// Because are the coverages that ask for it. A plan of a Planner that is not complete has none here: see Plan.Causes.
	Because []xfrmwatch.CoverageID
	// Keys are the TCP keys that ask for it, under `shared_nics: off`.
	Keys []sockopt.Key
	// Why says what asks for it where that is no coverage and no key.
	Why string
}

// Tunnel is a dedicated tunnel, or a device in a stack above one, with what becomes of its outer
// packets.
type Tunnel struct {
	Index routes.Ifindex
	Encap routes.Encap // its Header counts the tags of VLANs
	Path  int          // the MTU of the outer packets' route without our lock, in bytes, 0 if it is not known
	MTU   int          // what is left to an inner packet, in bytes, 0 if it is not known
	// Own are the coverages whose policies take the outer packets; those that they leave alone
	// leave by a dedicated carrier.
	Own []xfrmwatch.CoverageID
}

// Lane is the detour of covered flows on a shared NIC through an ifb that cuts them.
type Lane struct {
	lane.Lane
	Because []xfrmwatch.CoverageID
	Keys    []sockopt.Key
}

// Lock is one route whose MTU is locked in place.
type Lock struct {
	Route   routes.Route // as the mirror has it
	Owner   MTUMetric    // what the route's owner set
	Want    MTUMetric
	Because []xfrmwatch.CoverageID
}

// ShapeID names a shape of selectors: what a rule of ours selects, but for the destination,
// and the rule that it stands ahead of. It is comparable and stable over restarts.
type ShapeID struct {
	Flows routes.Flows // Dst is the family's whole space
	Base  uint32       // the priority of the rule whose table decides
	Table routes.TableID
}

// Shape is one table of ours with the rules that lead to it.
type Shape struct {
	ID    ShapeID
	Base  *routes.Rule
	Table routes.TableID
	Rules []routes.Rule
	live  *shaped // what it holds, while its planner has no newer plan
	kept  []Clone // else, in the order of destinations
}

// Clone is one route of ours: the shadow of a route with a locked MTU, or a throw that gives
// the next rule its turn.
type Clone struct {
	Dst     netip.Prefix
	Throw   bool
	Of      routes.Route // zero for a throw
	MTU     MTUMetric
	AdvMSS  uint32
	Because xfrmwatch.CoverageID
	Behind  []Copy // at the same destination
}

// Cut says where the segments of covered flows are cut.
type Cut string

// The places of the ladder.
const (
	CutSocket Cut = "socket" // the kernel takes GSO from the covered sockets, or cuts in ESP
	CutDevice Cut = "device" // TSO is off on the dedicated carrier
	CutLane   Cut = "lane"   // a segmenting ifb takes exactly the covered flows
	CutNIC    Cut = "nic"    // TSO is off on a shared NIC, for everybody
	CutNone   Cut = "none"   // nothing is covered now
)

// Verdict says for one coverage what is known, where its segments are cut, what is done and
// why.
type Verdict struct {
	ID       xfrmwatch.CoverageID
	Selector xfrmwatch.Selector
	Priority uint32
	IfID     uint32
	Mark     xfrmwatch.Mark
	Key      *sockopt.Key // set for a TCP signature instead of a policy
	Maybe    bool
	Gone     bool // the policy went away; kept until it is quiet
	MTU      int  // inner MTU in bytes, 0 if there is none yet
	Cut      Cut
	Carriers []string
	Held     []string
	Locked   []string
	Notes    []string
}

// Note adds a sentence once.
func (v *Verdict) note(text string) {
	if !slices.Contains(v.Notes, text) {
		v.Notes = append(v.Notes, text)
	}
}
