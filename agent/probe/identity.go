package probe

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Identity is what a result depends on: the kernel's build, and which of the modules that
// matter it has.
type Identity struct {
	// Release, KernelVersion and Machine are those of uname(2). The version has the build's
	// number and date, so another build of the same release differs.
	Release       string `json:"release"`
	KernelVersion string `json:"version"`
	Machine       string `json:"machine"`
	// Modules has the state of each of the relevant modules.
	Modules map[string]ModuleState `json:"modules"`
}

// ModuleState is whether and how the kernel has a module.
type ModuleState string

// The states of a module.
const (
	// Builtin: compiled into the kernel.
	Builtin ModuleState = "builtin"
	// Loaded: in use now.
	Loaded ModuleState = "loaded"
	// Available: can be loaded, and isn't.
	Available ModuleState = "available"
	// Absent: no trace of it was found.
	Absent ModuleState = "absent"
)

// ErrOtherKernel is matched (errors.Is) by the errors of Valid.
var ErrOtherKernel = errors.New("the result is of another kernel")

// Valid returns nil if the result tells anything about the kernel that id identifies, else an
// error that says what differs and matches ErrOtherKernel.
//
// A tunnel's module that has been loaded or unloaded since makes no difference. Those for ESP
// GSO do: an SA that is made while esp4_offload is absent has no GSO (docs/KERNEL.md 3). One
// that was loaded for the probe and isn't yet is fine, as the first SA loads it.
func (r *Result) Valid(id Identity) error {
	k := r.Kernel
	switch {
	case k.Release != id.Release || k.Machine != id.Machine:
		return fmt.Errorf("probe: %w: it is of %s %s, this is %s %s", ErrOtherKernel, k.Release, k.Machine, id.Release, id.Machine)
	case k.KernelVersion != id.KernelVersion:
		return fmt.Errorf("probe: %w: it is of the build %q, this is %q", ErrOtherKernel, k.KernelVersion, id.KernelVersion)
	}
	for _, name := range slices.Sorted(maps.Keys(id.Modules)) {
		then, now := k.Modules[name], id.Modules[name]
		if !sameModule(name, then, now) {
			return fmt.Errorf("probe: %w: module %s was %s, and is %s", ErrOtherKernel, name, then, now)
		}
	}
	return nil
}

// sameModule says whether the difference in a module's state is none for the result.
func sameModule(name string, then, now ModuleState) bool {
	switch {
	case then == now:
		return true
	case then == Absent || now == Absent || then == "":
		return false
	}
	if name == esp4Offload || name == esp6Offload {
		return then == Loaded && now == Available
	}
	return true
}

// The modules that give ESP its GSO.
const (
	esp4Offload = "esp4_offload"
	esp6Offload = "esp6_offload"
)

// A module and one function of it, by which it is found where the kernel tells nothing else of
// what is built in (/proc/kallsyms).
type module struct{ name, symbol string }

// modules are those that matter: for ESP, for its GSO, and for the tunnels.
var modules = []module{
	{"esp4", "esp_init_state"},
	{"esp6", "esp6_init_state"},
	{esp4Offload, "esp4_gso_segment"},
	{esp6Offload, "esp6_gso_segment"},
	{"geneve", "geneve_xmit"},
	{"gre", "gre_gso_segment"},
	{"ip6_gre", "ip6gre_tunnel_init"},
	{"ip6_tunnel", "ip6_tnl_xmit"},
	{"ip_gre", "ipgre_tunnel_init"},
	{"ipip", "ipip_tunnel_xmit"},
	{"l2tp_eth", "l2tp_eth_dev_xmit"},
	{"l2tp_ip", "l2tp_ip_recv"},
	{"l2tp_ip6", "l2tp_ip6_recv"},
	{"sit", "sit_tunnel_xmit"},
	{"vxlan", "vxlan_xmit"},
	{"xfrm_interface", "xfrmi_xmit"},
}

// kindModules are the modules that carry each kind.
var kindModules = map[string][]string{
	"gre": {"ip_gre"}, "gretap": {"ip_gre"}, "ip6gre": {"ip6_gre"}, "ip6gretap": {"ip6_gre"},
	"ipip": {"ipip"}, "sit": {"sit"}, "ip6tnl": {"ip6_tunnel"}, "vxlan": {"vxlan"}, "geneve": {"geneve"},
	"l2tp": {"l2tp_eth"}, "xfrm": {"xfrm_interface"},
}

// loadedSince lists the modules that were loaded between two looks.
func loadedSince(before, after Identity) []string {
	var names []string
	for name, now := range after.Modules {
		if now == Loaded && before.Modules[name] == Available {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
