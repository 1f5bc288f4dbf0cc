package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"tsoagent/agent/netns"
	"tsoagent/ethtool"
	"tsoagent/routes"
)

// locate finds a name, else a process, by which the namespace of a moved device can be entered.
func (a *Agent) locate(d *movedDevice) {
	d.where = ""
	if a.ids == nil {
		return
	}
	names, _ := netns.Names() // without them a process may still lead there
	for _, name := range names {
		if ns, err := netns.Open(netns.Path(name)); err == nil {
			id, err := a.ids.Of(ns)
			_ = ns.Close()
			if err == nil && id == d.To.Netnsid {
				d.where = name
				return
			}
		}
	}
	_ = netns.Processes(func(pid int, ns *netns.Namespace) bool { // else it stays unknown
		if id, err := a.ids.Of(ns); err == nil && id == d.To.Netnsid {
			d.where = fmt.Sprintf("pid:%d", pid)
		}
		return d.where == ""
	})
}

// says is the finding: what was left on which device, and how to give it back.
func (d *movedDevice) says() string {
	in, place := "in there ", fmt.Sprintf("a network namespace without a name (number %d in `ip netns list-id`)", d.To.Netnsid)
	if d.where == netns.Host {
		in, place = "", "the network namespace that the agent was started in"
	} else if pid, is := strings.CutPrefix(d.where, "pid:"); is {
		in, place = "nsenter -t "+pid+" -n ", "the network namespace of process "+pid
	} else if d.where != "" {
		in, place = "ip netns exec "+shellWord(d.where)+" ", "network namespace "+d.where
	}
	name := cmp.Or(d.There, d.Name)
	what, how := d.undo(in, name)
	told, back := strings.Join(what, ", "), strings.Join(how, " and ")
	if d.why != "" {
		return fmt.Sprintf("%s was moved to %s and took along what this agent changed (%s), which is not taken over there yet (%s): it is tried again, or give it back with %s",
			name, place, told, d.why, back)
	}
	return fmt.Sprintf("%s was moved to %s, which is not followed, and took along what this agent changed (%s): give it back with %s, or follow that namespace",
		name, place, told, back)
}

// undo is in words what was changed on a device, and the commands that undo it, in a namespace that they enter with in.
func (d *movedDevice) undo(in, name string) (what, how []string) {
	name = shellWord(name)
	if len(d.Features) > 0 {
		cmd := in + "ethtool -K " + name
		for _, f := range d.Features {
			what, cmd = append(what, string(f)), cmd+" "+string(f)+" on"
		}
		what, how = []string{strings.Join(what, ", ") + " held off"}, append(how, "`"+cmd+"`")
	}
	if d.MTU != nil {
		what = append(what, fmt.Sprintf("mtu %d", d.MTU.Ours))
		how = append(how, fmt.Sprintf("`%sip link set %s mtu %d`", in, name, d.MTU.Was))
	}
	return what, how
}

// shellWord is a name as a word of a shell's command. Who may do in a namespace of a container as he likes names its devices with all
// but blanks, slashes and colons (dev_valid_name, net/core/dev.c), and root pastes what we say.
func shellWord(name string) string {
	plain := func(r rune) bool {
		return r < utf8.RuneSelf && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("_-.@+,:%", r))
	}
	if name != "" && !strings.ContainsFunc(name, func(r rune) bool { return !plain(r) }) {
		return name
	}
	var b strings.Builder
	b.WriteString("$'")
	for i := range len(name) {
		if c := name[i]; plain(rune(c)) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, `\x%02x`, c)
		}
	}
	return b.String() + "'"
}

// lost is the finding about a device that is not where it went.
func (d *movedDevice) lost() string {
	name := cmp.Or(d.There, d.Name)
	what, how := d.undo("", name)
	addr := ""
	if key := d.nicKey(); key != "" {
		addr = " (" + key + ")"
	}
	return fmt.Sprintf("%s%s is not where it was moved to any more, or its network namespace is gone, and it took along what this agent changed (%s): if it is anywhere, give it back there with %s",
		name, addr, strings.Join(what, ", "), strings.Join(how, " and "))
}

// movedFindings are the devices that took changes of ours to where nobody follows. Of those that are gone NICs are told, which
// are not gone for good, once they had the time to come back.
func (a *Agent) movedFindings() []string {
	var out []string
	for _, id := range slices.Sorted(maps.Keys(a.st.moved)) {
		switch d := a.st.moved[id]; {
		case d.offered, d.gone && (d.looks == 0 || d.nicKey() == ""):
		case d.gone:
			out = append(out, d.lost())
		default:
			out = append(out, d.says())
		}
	}
	return out
}

// missHeld notes which devices went while no agent ran, with features of theirs held off. Nothing tells whether they
// were deleted, or moved with what we changed.
func (a *Agent) missHeld() {
	devices := map[ethtool.Device][]string{}
	for k, c := range a.st.holds {
		if a.st.fib.Link(routes.Ifindex(k.Index)) == nil {
			devices[c.Device] = append(devices[c.Device], string(k.Feature))
		}
	}
	for dev, features := range devices {
		slices.Sort(features)
		a.log.Info("a device is gone on which features were held off", "device", dev.Name, "features", features)
		a.st.missed = append(a.st.missed, fmt.Sprintf("%s is gone, with %s held off: if it was moved to another network namespace, give it back there with `ethtool -K %s %s on`",
			dev.Name, strings.Join(features, ", "), shellWord(dev.Name), strings.Join(features, " on ")))
		a.st.missedHolds += len(features)
	}
	slices.Sort(a.st.missed)
}
