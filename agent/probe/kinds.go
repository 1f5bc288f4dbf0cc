package probe

import (
	"fmt"
	"slices"
	"strings"
)

// A shape is one way to make a tunnel of a kind.
type shape struct {
	kind    string
	variant string
	outer   Family
	inner   []Family
	// proto is the IP protocol of the outer packets, which the policy selects; 0 for any.
	proto int
	// modes of ESP that make sense below it.
	modes []string
}

// What makes up the shapes.
var (
	both    = []Family{IPv4, IPv6}
	only4   = []Family{IPv4}
	only6   = []Family{IPv6}
	modes   = []string{Transport, Tunnel}
	oneMode = []string{Tunnel} // an xfrmi is given whole packets
)

// Protocol numbers (linux/in.h).
const (
	protoIPIP = 4
	protoUDP  = 17
	protoIPv6 = 41
	protoGRE  = 47
	protoL2TP = 115
)

// shapes are all tunnels that are probed. vti and vti6 are not among them: their features are
// fixed, so there is nothing to switch.
var shapes = []shape{
	{"gre", "", IPv4, both, protoGRE, modes},
	{"gretap", "", IPv4, both, protoGRE, modes},
	{"ip6gre", "", IPv6, both, protoGRE, modes},
	{"ip6gretap", "", IPv6, both, protoGRE, modes},
	{"ipip", "", IPv4, only4, protoIPIP, modes},
	{"sit", "", IPv4, only6, protoIPv6, modes},
	{"ip6tnl", "ip6ip6", IPv6, only6, protoIPv6, modes},
	{"ip6tnl", "ipip6", IPv6, only4, protoIPIP, modes},
	{"vxlan", "", IPv4, both, protoUDP, modes},
	{"vxlan", "", IPv6, both, protoUDP, modes},
	{"geneve", "", IPv4, both, protoUDP, modes},
	{"geneve", "", IPv6, both, protoUDP, modes},
	{"l2tp", "udp", IPv4, both, protoUDP, modes},
	{"l2tp", "ip", IPv4, only4, protoL2TP, modes},
	{"l2tp", "udp", IPv6, both, protoUDP, modes},
	{"l2tp", "ip", IPv6, only4, protoL2TP, modes},
	{"xfrm", "", IPv4, both, 0, oneMode},
	{"xfrm", "external", IPv4, both, 0, oneMode},
	{"xfrm", "", IPv6, both, 0, oneMode},
	{"xfrm", "external", IPv6, both, 0, oneMode},
}

// Kinds returns the names of all kinds, in the order in which they are probed.
func Kinds() []string {
	var kinds []string
	for _, s := range shapes {
		if !slices.Contains(kinds, s.kind) {
			kinds = append(kinds, s.kind)
		}
	}
	return kinds
}

// A task is one case to measure, with the shapes that it is made of.
type task struct {
	kind   string
	outer  Family
	mode   string
	suite  suite
	shapes []shape
}

// String names the task.
func (t task) String() string { return fmt.Sprintf("%s %s %s", t.kind, t.outer, t.mode) }

// tasksFor lists the cases of the kinds (none: all) and SAs (none: DefaultSA).
func tasksFor(kinds, sas []string) ([]task, error) {
	if len(kinds) == 0 {
		kinds = Kinds()
	}
	if len(sas) == 0 {
		sas = []string{DefaultSA}
	}
	for _, k := range kinds {
		if !slices.Contains(Kinds(), k) {
			return nil, fmt.Errorf("there is no kind %q; known are %s", k, strings.Join(Kinds(), ", "))
		}
	}
	var tasks []task
	var names []string
	for _, sa := range sas {
		u, err := suiteOf(sa)
		if err != nil {
			return nil, err
		}
		if slices.Contains(names, u.name()) {
			continue // named twice, or two key lengths of the same
		}
		names = append(names, u.name())
		for _, s := range shapes {
			for _, mode := range s.modes {
				if slices.Contains(kinds, s.kind) {
					tasks = addShape(tasks, task{s.kind, s.outer, mode, u, []shape{s}})
				}
			}
		}
	}
	return tasks, nil
}

// addShape adds a task, or its shape to the task that there is.
func addShape(tasks []task, t task) []task {
	for i := range tasks {
		if have := &tasks[i]; have.kind == t.kind && have.outer == t.outer && have.mode == t.mode && have.suite == t.suite {
			have.shapes = append(have.shapes, t.shapes...)
			return tasks
		}
	}
	return append(tasks, t)
}
