// Package doctor turns what the agent knows into findings: what is wrong, and what a person can do
// about it. Each has a code that never changes, and a page. It is pure.
package doctor

import (
	"fmt"
	"strings"

	"tsoagent/agent/flows"
)

// Version is the version of the JSON form of Checkup. Fields and codes may be added under it.
const Version = 1

// Code names a kind of finding. It is also the heading in docs/doctor.md.
type Code string

// The codes.
const (
	// TSOOff is a device whose flows are not covered, and that has its segmentation offload off all the same.
	TSOOff Code = "tso-off"
	// ClampInVain is an MSS clamp that doesn't know of IPsec.
	ClampInVain Code = "clamp-in-vain"
	// LockDefeated is a lock that a rule of somebody else's keeps from what it is for.
	LockDefeated Code = "lock-defeated"
	// NetworkdForeign is that systemd-networkd deletes routes and rules that it doesn't know.
	NetworkdForeign Code = "networkd-foreign"
	// ESPOffloadLate is SAs that are older than the module that would offload them.
	ESPOffloadLate Code = "esp-offload-late"
	// BondOffers is a bond, bridge or team that offers an offload of ESP that its ports lack.
	BondOffers Code = "bond-offers"
	// OffloadNotDone is an SA that is bound to an offload that is not done.
	OffloadNotDone Code = "offload-not-done"
	// LarvalSA is an SA that is asked for, and not there yet.
	LarvalSA Code = "larval-sa"
	// TunnelMTU is a tunnel whose MTU is larger than what is left to what it wraps.
	TunnelMTU Code = "tunnel-mtu"
	// RouteMTU is a route whose owner sets another MTU or MSS than IPsec leaves.
	RouteMTU Code = "route-mtu"
	// KeyCollateral is connections that lost offload as their listener holds a key for others.
	KeyCollateral Code = "key-collateral"
	// Unreadable is that the kernel does not let its sockets be read.
	Unreadable Code = "connections-unreadable"
	// MissingCapability is a capability that the agent, or who asks, lacks.
	MissingCapability Code = "missing-capability"
)

// Kind is what all findings with a code have in common.
type Kind struct {
	Code  Code
	Title string
	Do    string // what helps
}

// Kinds are all that can be found, in the order in which they are told.
var Kinds = []Kind{
	{
		TSOOff, "segmentation offload is off on a device that needs it on",
		"Turn it on: covered flows lose nothing by it, as the kernel cuts them at their sockets, and the others send 1.5 to 2 times as much for " +
			"the same CPU.",
	},
	{
		ClampInVain, "an MSS clamp can't know what IPsec leaves",
		"Clamp to a number instead, in both directions, or give the route the MTU, as the agent's locks do: a clamp to the path MTU asks for the " +
			"route without a source address, and without IPsec.",
	},
	{
		LockDefeated, "a rule of somebody else's keeps flows from their lock",
		"An agent that runs places its rules anew; where none runs, take away what one has left. Where there can be no lock, give that rule " +
			"another priority, or selectors that leave the covered flows alone.",
	},
	{
		NetworkdForeign, "systemd-networkd deletes the agent's routes and rules when it starts, or configures a device",
		"Tell it to leave alone what it doesn't know.",
	},
	{
		ESPOffloadLate, "SAs are older than the module that would offload them",
		"Rekey them: what an SA can do is settled when it is added. Have the modules loaded at boot, before the first SA.",
	},
	{
		BondOffers, "a device offers an offload of ESP that the ports it sends by can't do",
		"Turn the offer off before the next SA is added, or let the agent do it: SAs keep what they were bound to.",
	},
	{
		OffloadNotDone, "an SA is bound to an offload that is not done",
		"Rekey it, so that the next one is bound to nothing, or to a device that does it.",
	},
	{
		LarvalSA, "an SA is asked for and not there: what it is for is dropped",
		"If it stays for more than some seconds, nobody negotiates, or the peer doesn't answer: see whether the IKE daemon runs and what it logs.",
	},
	{
		TunnelMTU, "a tunnel's MTU is larger than what IPsec leaves",
		"Set the device's MTU, or let the agent lock its routes (or set it: carrier_mtu: device).",
	},
	{
		RouteMTU, "a route sets another MTU or MSS than IPsec leaves",
		"Take the setting out: the agent's locks have the right number, and follow each rekey. It is mtu or mss of charon.plugins.kernel-netlink " +
			"(strongswan.conf), mtu= of a connection of libreswan's (ipsec.conf), or whoever else wrote the route. An MSS that is too large stays while a lock is on the route itself.",
	},
	{
		KeyCollateral, "a key on a listener takes offload from connections that are not signed",
		"Give the signed peers a listener of their own: another address or port, or another process. Then have the other connections " +
			"opened anew. Nothing that could be set from outside cures a live one, and taking the key away doesn't either.",
	},
	{
		Unreadable, "what the kernel's sockets say can't be read, so nobody looks for lost offload",
		"It takes CAP_BPF and CAP_PERFMON, and a kernel with BTF (CONFIG_DEBUG_INFO_BTF) and BPF iterators. All the rest works without.",
	},
	{
		MissingCapability, "a capability is missing",
		"Give it to the service, or to the container that it runs in.",
	},
}

// Finding is something that a person should look at.
type Finding struct {
	Code  Code   `json:"code"`
	Title string `json:"title"`
	Text  string `json:"text"` // what was found, here and now
	Do    string `json:"do"`
	// Commands can be pasted into root's shell, one after the other. None is listed where no command is sure to help.
	Commands []string `json:"commands,omitempty"`
	Page     string   `json:"page"`
}

// Checkup is what was found in a namespace.
type Checkup struct {
	Version  int       `json:"version"`
	Netns    string    `json:"netns,omitempty"`
	Findings []Finding `json:"findings"`
	// NotSeen is what could not be looked at, and why: no finding there proves nothing.
	NotSeen []string `json:"not_seen,omitempty"`
}

// Check judges all that is known of a namespace. What could not be looked at is not judged.
func Check(p *Patient) *Checkup {
	c := &Checkup{Version: Version, Findings: []Finding{}, NotSeen: p.NotSeen}
	if p.Looked {
		c.tso(p)
		c.clamps(p)
		c.defeated(p)
		c.networkd(p)
		c.lateOffload(p)
		c.offers(p)
		c.unbound(p)
		c.larval(p)
		c.tunnels(p)
		c.routeMTUs(p)
	}
	if d := p.Diagnosis; d != nil {
		for i := range d.Collateral {
			c.found(KeyCollateral, Collateral(&d.Collateral[i]))
		}
		if d.MoreCollateral > 0 {
			c.found(KeyCollateral, fmt.Sprintf("%s of more listeners", count(d.MoreCollateral, "connection", "connections")))
		}
		if d.Unreadable != "" {
			c.found(Unreadable, d.Unreadable)
		}
	}
	c.capabilities(p)
	return c
}

func (c *Checkup) found(code Code, text string, commands ...string) {
	for _, k := range Kinds {
		if k.Code == code {
			c.Findings = append(c.Findings, Finding{code, k.Title, text, k.Do, commands, Page(code)})
		}
	}
}

// Page is where a code is explained.
func Page(c Code) string { return "docs/doctor.md#" + string(c) }

// Collateral says in a sentence what the keys of one listener cost others.
func Collateral(c *flows.Collateral) string {
	lost := count(c.Lost, "connection that is not signed has", "connections that are not signed have") + " lost offload"
	if c.Listener == "" {
		return lost + " for a key that is gone: theirs, or that of a listener that is not there any more"
	}
	who := "listener " + c.Listener
	if c.Device != "" {
		who += " on " + c.Device
	}
	switch {
	case len(c.Processes) > 0:
		who += " of " + Processes(c.Processes)
	case c.ProcessesUnknown != "":
		who += " (" + c.ProcessesUnknown + ")"
	}
	why := "held a key once"
	var keys []string
	if c.MD5Keys > 0 {
		keys = append(keys, count(c.MD5Keys, "TCP-MD5 key", "TCP-MD5 keys"))
	}
	if c.AOKeys > 0 {
		keys = append(keys, count(c.AOKeys, "TCP-AO key", "TCP-AO keys"))
	}
	if len(keys) > 0 {
		why = "holds " + strings.Join(keys, " and ")
	}
	return fmt.Sprintf("%s %s: %s; %d signed", who, why, lost, c.Signed)
}

// Processes names some of a list.
func Processes(list []flows.Process) string {
	const most = 3
	var out []string
	for _, p := range list[:min(len(list), most)] {
		out = append(out, fmt.Sprintf("%s (pid %d)", p.Name, p.PID))
	}
	text := strings.Join(out, ", ")
	if n := len(list) - most; n > 0 {
		text += fmt.Sprintf(" and %d more", n)
	}
	return text
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
