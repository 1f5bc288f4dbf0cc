package agent

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/journal"
	"tsoagent/agent/plan"
	"tsoagent/ethtool"
	"tsoagent/routes"
)

// A device that is moved to another namespace keeps its features and its MTU (KERNEL.md 76): what we
// changed goes with it. The claims go after it:
//
//	loop of the old namespace            Fleet                  loop of the new namespace
//	RTM_DELLINK, with where it went
//	journal: moved  ───────────── arrival ──────────────> the link is there, as it was
//	                                                      journal: the claims; held on, or given back
//	journal: done   <───────────── handed ───────────────
//
// Where nobody follows the new namespace, the entry stays and is told in reports until the device
// comes back or is gone. Nothing is entered for it: that is the admin's to do.
//
// The kernel numbers namespaces anew when they are gone, and indexes of devices too. So only the first offer, made when
// nothing else can be there, goes by the place alone. Later ones take a device that is known by its address. A NIC outlives
// its namespace and comes to the initial one (default_device_exit_net, net/core/dev.c), of which the loop that it once left hears
// nothing: it is looked for by its permanent address in all namespaces that are followed.

const kindMoved journal.Kind = "moved"

// movedDevice is the journal's entry for a device that left the namespace with what we changed.
type movedDevice struct {
	To       routes.Place      `json:"to"`
	Index    routes.Ifindex    `json:"ifindex"`         // that it had here
	Name     string            `json:"name"`            // that it had here
	There    string            `json:"there,omitempty"` // its name there, if it is another one
	Kind     string            `json:"kind,omitempty"`
	IfID     uint32            `json:"if_id,omitempty"`
	Addr     string            `json:"addr,omitempty"`
	PermAddr string            `json:"perm_addr,omitempty"`
	Features []ethtool.Feature `json:"features,omitempty"` // held off; each was wanted before
	MTU      *plan.MTUClaim    `json:"mtu,omitempty"`

	offered bool   // the loop of another namespace has it
	gone    bool   // it was not there when it was looked at: it can be back, and its event on the way
	looks   int    // how many resyncs have found it gone
	where   string // how the other namespace can be named, empty for unknown
	why     string // why the loop that follows the other namespace has not taken it, empty where none does
}

// An arrival is a device that was moved here, with the loop to tell what became of its claims.
type arrival struct {
	id    string // of the entry in the old namespace's journal
	dev   movedDevice
	from  *inbox
	until time.Time // when it is no longer waited for, zero before it was looked at
	fresh bool      // it has just left: no other device can be where it went
	lost  bool      // a NIC that is not where it went: it is known by its address, and its place is not
}

// handed tells the old namespace's loop that the new one has taken over the claims, or why it has not.
type handed struct {
	id  string
	why string // empty for taken
}

// carried is what became of claims that were to be brought to the loop of another namespace.
type carried struct {
	offered bool   // a loop has them, and will answer
	why     string // why not, although the device's namespace is one of those that are followed
	where   string // where a NIC was found, in a namespace that is not followed
	name    string // how it is called there
}

// others are the loops of other namespaces.
type others interface {
	// carry brings the claims on a device that left one namespace to the loop of the one where it is now.
	carry(from *Agent, x arrival) carried
	// announce lets the loops that miss devices offer them again.
	announce()
}

// movedID is the ID of the journal's entry for a device that went to a place. One can have gone on from there, and
// another one come, while the first is still told of or handed on.
func (a *Agent) movedID(p routes.Place) string {
	for n := 1; ; n++ {
		id := fmt.Sprintf("moved/%d/%d/%d", p.Netnsid, p.Index, n)
		if a.st.moved[id] == nil {
			return id
		}
	}
}

// like reports whether a link where the kernel said that the device went can be it. Whoever moves a device
// can change its name and hardware address in the same request.
func (d *movedDevice) like(l *routes.Link) bool {
	return l.Kind == d.Kind && l.IfID == d.IfID && l.PermAddr == d.PermAddr
}

// same reports whether a link can be the device, whatever its name and index are now. The hardware
// address of a NIC is anybody's to change, its permanent one is not.
func (d *movedDevice) same(l *routes.Link) bool {
	return d.like(l) && (l.HardwareAddr == d.Addr || d.Kind == "" && d.PermAddr != "")
}

// back reports whether a link that appeared in the old namespace is the device, of whose way back
// the kernel tells nothing.
func (d *movedDevice) back(l *routes.Link) bool {
	return d.same(l) && (sameName(l.Name, d.Name) || sameName(l.Name, d.There) || l.Index == d.Index || d.Kind == "" && d.PermAddr != "")
}

// nicKey is by what a NIC is known in whatever namespace, empty for other devices and the loopback.
func nicKey(l *routes.Link) string {
	addr := cmp.Or(l.PermAddr, l.HardwareAddr)
	if l.Kind != "" || l.Type == unix.ARPHRD_LOOPBACK || strings.Trim(addr, "0:") == "" {
		return ""
	}
	return addr
}

func (d *movedDevice) nicKey() string {
	return nicKey(&routes.Link{Kind: d.Kind, PermAddr: d.PermAddr, HardwareAddr: d.Addr})
}

// ours reports whether anything of ours can be left on the device.
func (d *movedDevice) ours() bool { return len(d.Features) > 0 || d.MTU != nil }

func (a *Agent) doneMoved(id string) {
	delete(a.st.moved, id)
	a.away.Store(int32(len(a.st.moved)))
	a.unbook(id)
}

// adoptMoved takes over what an earlier run remembers of a device that left.
func (a *Agent) adoptMoved(e journal.Entry) error {
	d := new(movedDevice)
	if err := json.Unmarshal(e.Data, d); err != nil {
		return err
	}
	a.st.moved[e.ID] = d
	a.away.Store(int32(len(a.st.moved)))
	return nil
}

// recallMoved looks once, before the first plan, where such devices are now.
func (a *Agent) recallMoved() {
	for _, l := range a.st.fib.Links() {
		a.returned(l)
	}
	a.offerAgain(false)
}
