package agent

import (
	"cmp"
	"slices"

	"tsoagent/agent/journal"
	"tsoagent/routes"
)

// sameName reports whether a name that a link has is one that the journal has. The journal is JSON, which has U+FFFD for each byte that is
// no UTF-8, and the kernel takes any for a name (dev_valid_name, net/core/dev.c).
func sameName(link, noted string) bool { return link == noted || string([]rune(link)) == noted }

// renamed books the holds on a device under the name that it has now. Most devices with holds have
// no permanent address, so that a later run, or `tsoctl restore`, knows them by name and index.
func (a *Agent) renamed(l *routes.Link) {
	if a.lastP == nil {
		return // adopted claims are checked first: the index can be another device's now
	}
	var entries []journal.Entry
	for _, k := range a.st.holdsOn(l.Index) {
		c := a.st.holds[k]
		if c.Device.Name == l.Name {
			continue
		}
		c.Device.Name = l.Name
		a.st.hold(k, c)
		entries = append(entries, entry(holdID(k), kindHold, heldFeature{c, k.Feature}))
	}
	if len(entries) == 0 || a.cfg.Mode != Enforce {
		return
	}
	slices.SortFunc(entries, func(a, b journal.Entry) int { return cmp.Compare(a.ID, b.ID) })
	if err := a.journal.Put(entries...); err != nil {
		a.failed("journal can't be written", err, "device", l.Name)
	}
}
