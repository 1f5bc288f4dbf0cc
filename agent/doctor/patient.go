package doctor

import (
	"iter"
	"net/netip"

	"tsoagent/agent"
	"tsoagent/agent/plan"
	"tsoagent/xfrmwatch"
)

// Patient is all that is known of a network namespace. The zero value of a part means that it is not known, or not there.
type Patient struct {
	// Looked says that the kernel was looked at: what follows is what an agent's plan follows from, and the plan.
	Looked bool
	Input  plan.Input
	Plan   *plan.Plan

	// Diagnosis is what the connections say.
	Diagnosis *agent.Diagnosis
	// LostBy are the connections that leave by a device and have lost offload without being covered; nil if nobody knows.
	LostBy map[string]int
	// Report is a running agent's.
	Report *agent.Report
	// Clamps are the rules that set an MSS.
	Clamps []Clamp
	// SourceLess is what the kernel answers for a coverage's destination without a source: the MTU in bytes of the route.
	SourceLess map[xfrmwatch.CoverageID]int
	// Networkd is a systemd-networkd in this namespace, nil for none.
	Networkd *Networkd
	// Modules are the kernel's modules that matter here and are loaded, by their names.
	Modules map[string]Module
	// Processes are the agent and whoever asks, with what they may do.
	Processes []Process
	// Now is the time in seconds since the epoch.
	Now uint64
	// NotSeen is what could not be looked at.
	NotSeen []string
}

// Destinations yields, where there are clamps, an address for each coverage of flows that the host forwards: that is where a clamp looks.
func (p *Patient) Destinations() iter.Seq2[xfrmwatch.CoverageID, netip.Addr] {
	return func(yield func(xfrmwatch.CoverageID, netip.Addr) bool) {
		if len(p.Clamps) == 0 {
			return
		}
		for i := range p.Plan.Verdicts {
			if v := &p.Plan.Verdicts[i]; p.forwarded(v) && !yield(v.ID, sample(v.Selector.Dst)) {
				return
			}
		}
	}
}

// Clamp is one rule of nftables, or of iptables on top of it, that sets the MSS of TCP connections.
type Clamp struct {
	Family string // ip, ip6 or inet
	Table  string
	Chain  string
	Handle uint64
	// MSS is the number that is set, 0 for what the path MTU of the route leaves, and UnknownMSS where it comes from a map.
	MSS int
	// Iptables says that iptables-nft wrote it.
	Iptables bool
	// Hook is where the chain hangs, empty for one that others jump to.
	Hook string
}

// UnknownMSS is the MSS of a rule that looks it up.
const UnknownMSS = -1

// Module is a module of the kernel.
type Module struct {
	// Refs is how many refer to it, -1 if that is not known. Each SA that was added while esp4_offload or esp6_offload was loaded refers to
	// it (xfrm_get_type_offload, net/xfrm/xfrm_state.c), whatever its namespace.
	Refs int
}

// Process is one with its effective capabilities, a bit for each.
type Process struct {
	Name string // tsoagent, or what asks
	PID  int
	Caps uint64
	// Agent says that it is the agent, and Elsewhere that it is to follow other namespaces than its own.
	Agent, Elsewhere bool
}

// Networkd is a systemd-networkd that runs, with what its configuration says of what others have set up (networkd.conf(5)).
type Networkd struct {
	PID int
	// Routes and Rules say that it deletes routes and rules that it doesn't know (ManageForeignRoutes=, ManageForeignRoutingPolicyRules=):
	// its default. Routes of protocol kernel, and rules of that, it leaves alone; ours are of another one.
	Routes, Rules bool
	// Source is where that is set, or "the default".
	Source string
}

// sample is an address of a prefix that stands for all of it.
func sample(p netip.Prefix) netip.Addr {
	switch {
	case p.Bits() == 0 && p.Addr().Is4():
		return netip.AddrFrom4([4]byte{198, 51, 100, 1}) // documentation addresses (RFC 5737, RFC 3849)
	case p.Bits() == 0:
		return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 1})
	case p.IsSingleIP():
		return p.Addr()
	}
	return p.Masked().Addr().Next()
}
