package api

import (
	"slices"
	"time"

	"tsoagent/agent/flows"
)

// Report is what the agent knows, wants and has done. It is immutable.
type Report struct {
	Version int `json:"version"`
	// Program is the version of the agent, and PID its process, 0 without one.
	Program string `json:"program"`
	PID     int    `json:"pid"`
	Mode    Mode   `json:"mode"`
	// Paused says since when, and by whom, the agent writes nothing, whatever its mode is.
	Paused *Paused `json:"paused,omitempty"`
	// Live is false for a report that was made without an agent, from the kernel alone.
	Live bool `json:"live"`
	// Since is when the agent was started, or took over its configuration, and Now when the report was made.
	Since time.Time `json:"since"`
	Now   time.Time `json:"now"`
	// Stale names the sources that lost events and are being read again.
	Stale []string `json:"stale"`
	// Links, Routes, Policies and SAs count what the kernel has.
	Links     int              `json:"links"`
	Routes    int              `json:"routes"`
	Policies  int              `json:"policies"`
	SAs       int              `json:"sas"`
	Coverages []CoverageReport `json:"coverages"`
	Holds     []HoldReport     `json:"holds"`
	Locks     []LockReport     `json:"locks"`
	Rules     []RuleReport     `json:"rules"`
	Clones    []CloneReport    `json:"clones"`
	// Findings are what a person should look at.
	Findings []string       `json:"findings"`
	Counters Counters       `json:"counters"`
	Sources  []SourceReport `json:"sources"`
	// Lanes are the NICs whose covered flows take a lane (shared_nics: lane).
	Lanes []LaneReport `json:"lanes,omitempty"`
	// Clamps are the destinations of forwarded connections with a smaller MSS (partial: clamp).
	Clamps []ClampReport `json:"clamps,omitempty"`
	// DeviceMTUs are the carriers whose own MTU is set (carrier_mtu: device).
	DeviceMTUs []DeviceMTUReport `json:"device_mtus,omitempty"`
	// Diagnosis is what the connections themselves said when they were looked at last.
	Diagnosis *Diagnosis `json:"diagnosis,omitempty"`
	// Netns is how the namespace is called, empty for the one that the agent was started in.
	Netns string `json:"netns,omitempty"`
	// NotFollowed says that the configuration leaves the latter out.
	NotFollowed bool `json:"not_followed,omitempty"`
	// Namespaces are all that the agent follows, or is to follow, in the report of that one.
	Namespaces []NamespaceReport `json:"namespaces,omitempty"`
}

// SourceReport counts what a source of events brought since the start.
type SourceReport struct {
	Source      string `json:"source"` // xfrm, routes, ethtool, l2tp or sockopt
	Events      uint64 `json:"events"`
	Dumps       uint64 `json:"dumps"`
	Overruns    uint64 `json:"overruns"`    // receive buffer overflows
	Undecodable uint64 `json:"undecodable"` // messages that made no sense; each led to a new dump
	// Seconds is the CPU time of all looks, and Sockets what the last saw, of a source that polls.
	Seconds float64 `json:"seconds,omitempty"`
	Sockets int     `json:"sockets,omitempty"`
	// Traced are the kernel's functions whose calls it looks at at once, and the tracepoint inet_sock_set_state where it does when a socket
	// that holds keys begins to listen or to connect; Untraced is why there are no functions.
	Traced   []string `json:"traced,omitempty"`
	Untraced string   `json:"untraced,omitempty"`
}

// CoverageReport is the verdict for one coverage.
type CoverageReport struct {
	// Policy is the output policy's index, 0 for a key. Peer is the destination of the SA, where the policy
	// has one for each.
	Policy uint32 `json:"policy"`
	Peer   string `json:"peer,omitempty"`
	Key    string `json:"key,omitempty"` // "tcp-md5" or "tcp-ao" in place of a policy
	// Src, Dst, Proto, Sport, Dport, Mark and IfID are the selector.
	Src      string `json:"src"`
	Dst      string `json:"dst"`
	Proto    uint8  `json:"proto,omitempty"`
	Sport    uint16 `json:"sport,omitempty"`
	Dport    uint16 `json:"dport,omitempty"`
	Mark     string `json:"mark,omitempty"`
	IfID     uint32 `json:"if_id,omitempty"`
	Priority uint32 `json:"priority"`
	// Maybe says that all of the policy's templates are optional, Gone that the policy is gone and what was
	// done for it is given back soon.
	Maybe bool   `json:"maybe,omitempty"`
	Gone  bool   `json:"gone,omitempty"`
	MTU   int    `json:"mtu"` // bytes, 0 while it is not known
	Cut   string `json:"cut"` // socket, device, lane, nic or none
	// Carriers are the devices that the flows leave by, Held and Locked what was done for them, Notes why, or
	// why not.
	Carriers []string `json:"carriers"`
	Held     []string `json:"held"`
	Locked   []string `json:"locked"`
	Notes    []string `json:"notes"`
	// PeerPort is the peer's port where the key is a client's; Dev the VRF or other device that the
	// key's socket is bound to.
	PeerPort uint16 `json:"peer_port,omitempty"`
	Dev      string `json:"dev,omitempty"`
	// Listener says that the key is a listener's.
	Listener bool `json:"listener,omitempty"`
	// UID is the user of the key's socket, nil if the kernel doesn't tell.
	UID *uint32 `json:"uid,omitempty"`
}

// The states of holds, locks, rules and clones.
const (
	StateInPlace   = "in place"
	StateWanted    = "wanted"
	StateContested = "contested"
	StateRefused   = "refused"
	StateReleasing = "releasing"
	StateNotOurs   = "off already"
)

// HoldReport is one feature on one device.
type HoldReport struct {
	// Device is its name, and Index its ifindex.
	Device  string   `json:"device"`
	Index   int32    `json:"ifindex"`
	Feature string   `json:"feature"`
	State   string   `json:"state"` // in place, wanted, contested, refused, releasing or off already
	Why     string   `json:"why,omitempty"`
	Because []string `json:"because"` // the coverages that ask for it
}

// LockReport is one route that is locked in place.
type LockReport struct {
	// Route is its destination, with table and metric where they are not the usual ones.
	Route   string   `json:"route"`
	Family  string   `json:"family"`
	MTU     uint32   `json:"mtu"`    // bytes
	Locked  bool     `json:"locked"` // false with `mtu: advise`
	Was     uint32   `json:"was"`    // the owner's MTU metric in bytes, 0 for none
	Devices []string `json:"devices"`
	State   string   `json:"state"` // in place or wanted
	Because []string `json:"because"`
}

// RuleReport is one rule of ours.
type RuleReport struct {
	Family   string `json:"family"`
	Priority uint32 `json:"priority"`
	Table    uint32 `json:"table"`
	Text     string `json:"text"`  // in the words of `ip rule`
	State    string `json:"state"` // in place or wanted
}

// CloneReport is one route in a table of ours.
type CloneReport struct {
	Table   uint32   `json:"table"`
	Dst     string   `json:"dst"`
	Throw   bool     `json:"throw,omitempty"` // it sends what it matches on to the next rule
	Copy    bool     `json:"copy,omitempty"`  // for what is bound to a device alone (IPv6), which passes over throws: no lock of ours
	MTU     uint32   `json:"mtu,omitempty"`   // bytes
	Locked  bool     `json:"locked,omitempty"`
	Devices []string `json:"devices,omitempty"`
	State   string   `json:"state"` // in place or wanted
	// Of is the route that it is a clone or a copy of, none for a throw; Because the coverage that asks for it.
	Of      string   `json:"of,omitempty"`
	Because []string `json:"because,omitempty"`
}

// LaneReport is one NIC whose covered flows take a detour through an ifb that cuts them.
type LaneReport struct {
	Device  string   `json:"device"`
	Index   int32    `json:"ifindex"`
	IFB     string   `json:"ifb"`
	Matches []string `json:"matches"` // what leaves by the NIC and takes the lane
	State   string   `json:"state"`   // in place, wanted, refused or releasing
	Why     string   `json:"why,omitempty"`
	Because []string `json:"because"`
}

// ClampReport is one interval of destinations to and from which forwarded TCP connections get a
// smaller MSS.
type ClampReport struct {
	Dst     string   `json:"dst"` // a prefix, or first-last
	Family  string   `json:"family"`
	MSS     uint16   `json:"mss"`
	State   string   `json:"state"` // in place or wanted
	Because []string `json:"because"`
}

// DeviceMTUReport is one carrier whose own MTU is set.
type DeviceMTUReport struct {
	Device  string   `json:"device"`
	Index   int32    `json:"ifindex"`
	MTU     int      `json:"mtu"`   // bytes
	Was     int      `json:"was"`   // its owner's MTU in bytes
	State   string   `json:"state"` // in place, wanted, or contested where somebody else set it since
	Why     string   `json:"why,omitempty"`
	Because []string `json:"because"`
}

// Diagnosis is what the connections themselves say of offload that is lost for nothing.
type Diagnosis struct {
	At time.Time `json:"at"` // when it was made
	// Unreadable is why the kernel's sockets can't be read, and what to do; empty if they can.
	Unreadable  string             `json:"unreadable,omitempty"`
	Connections int                `json:"connections"`
	Lost        int                `json:"lost"` // for whatever reason, without being covered
	Collateral  []flows.Collateral `json:"collateral"`
	// MoreCollateral are the connections of listeners beyond those that are listed.
	MoreCollateral int `json:"more_collateral,omitempty"`
}

// Counters count since the start.
type Counters struct {
	Rounds  uint64 `json:"rounds"`  // plans that were made
	Events  uint64 `json:"events"`  // of the kernel
	Actions uint64 `json:"actions"` // changes that were made
	Failed  uint64 `json:"failed"`
	Repairs uint64 `json:"repairs"` // in-place writes that overwrote an owner's change and were mended
}

// The states of namespaces.
const (
	NetnsFollowed = "followed"
	NetnsStarting = "starting" // the kernel's state is being read
	NetnsLeaving  = "leaving"  // everything is being given back
	NetnsFailed   = "failed"   // it is tried again
	NetnsWaiting  = "waiting"  // nothing is there under the name
)

// NamespaceReport is one namespace that is followed, or that is to be.
type NamespaceReport struct {
	Name string `json:"name"` // how it is called
	// Names are all that lead to it.
	Names []string `json:"names"`
	State string   `json:"state"` // followed, starting, leaving, failed or waiting
	Why   string   `json:"why,omitempty"`
	// Paused says that the agent writes nothing there.
	Paused bool `json:"paused,omitempty"`
	// Degraded says that a person should look: at the namespace's own report, or at Why.
	Degraded  bool `json:"degraded"`
	Policies  int  `json:"policies"`
	Coverages int  `json:"coverages"`
	Holds     int  `json:"holds"`
	Locks     int  `json:"locks"`
	Rules     int  `json:"rules"`
	Clones    int  `json:"clones"`
}

// Degraded reports whether a person should look. An agent that is paused protects nothing that is new.
func (r *Report) Degraded() bool {
	return r.Paused != nil || len(r.Stale) > 0 || len(r.Findings) > 0 ||
		slices.ContainsFunc(r.Holds, func(h HoldReport) bool { return h.State == StateContested || h.State == StateRefused }) ||
		slices.ContainsFunc(r.DeviceMTUs, func(m DeviceMTUReport) bool { return m.State == StateContested }) ||
		slices.ContainsFunc(r.Lanes, func(l LaneReport) bool { return l.State == StateRefused }) ||
		slices.ContainsFunc(r.Namespaces, func(n NamespaceReport) bool { return n.Degraded })
}

// Mode says whether the agent writes.
type Mode string

// The modes.
const (
	// Enforce holds and locks.
	Enforce Mode = "enforce"
	// Observe computes and reports, and changes nothing.
	Observe Mode = "observe"
)
