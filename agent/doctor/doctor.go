// Package doctor turns what the agent knows into findings: what is wrong, and what a person can do
// about it. Each has a code that never changes, and a page. It is pure.
package doctor

import (
	"fmt"
	"strings"

	"tsoagent/agent"
	"tsoagent/agent/flows"
)

// Version is the version of the JSON form of Checkup. Fields and codes may be added under it.
const Version = 1

// Code names a kind of finding. It is also the heading in docs/doctor.md.
type Code string

// The codes.
const (
	// KeyCollateral is connections that lost offload as their listener holds a key for others.
	KeyCollateral Code = "key-collateral"
	// Unreadable is that the kernel does not let its sockets be read.
	Unreadable Code = "connections-unreadable"
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
		KeyCollateral, "a key on a listener takes offload from connections that are not signed",
		"Give the signed peers a listener of their own: another address or port, or another process. Then have the other connections " +
			"opened anew. Nothing that could be set from outside cures a live one, and taking the key away doesn't either.",
	},
	{
		Unreadable, "what the kernel's sockets say can't be read, so nobody looks for lost offload",
		"It takes CAP_BPF and CAP_PERFMON, and a kernel with BTF (CONFIG_DEBUG_INFO_BTF) and BPF iterators. All the rest works without.",
	},
}

// Finding is something that a person should look at.
type Finding struct {
	Code  Code   `json:"code"`
	Title string `json:"title"`
	Text  string `json:"text"` // what was found, here and now
	Do    string `json:"do"`
	Page  string `json:"page"`
}

// Checkup is what was found in a namespace.
type Checkup struct {
	Version  int       `json:"version"`
	Netns    string    `json:"netns,omitempty"`
	Findings []Finding `json:"findings"`
}

// Check looks at a diagnosis.
func Check(d *agent.Diagnosis) *Checkup {
	c := &Checkup{Version: Version, Findings: []Finding{}}
	for i := range d.Collateral {
		c.found(KeyCollateral, Collateral(&d.Collateral[i]))
	}
	if d.MoreCollateral > 0 {
		c.found(KeyCollateral, fmt.Sprintf("%s of more listeners", count(d.MoreCollateral, "connection", "connections")))
	}
	if d.Unreadable != "" {
		c.found(Unreadable, d.Unreadable)
	}
	return c
}

func (c *Checkup) found(code Code, text string) {
	for _, k := range Kinds {
		if k.Code == code {
			c.Findings = append(c.Findings, Finding{code, k.Title, text, k.Do, Page(code)})
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
