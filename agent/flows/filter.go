package flows

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"tsoagent/sockopt"
)

// Filter says which flows are asked for. The zero value asks for all connections that are open, as
// `ss -t` does.
type Filter struct {
	Lost     bool       // only those that have lost offload without being covered
	Listener Listener   // only those that came from this listener, and it
	Device   string     // only those that leave by this device
	States   StateNames // only those in these states; none means those that are open
	// Processes asks for the processes of each.
	Processes bool
}

// Listener names a listener by its port, or by its address and port. Port 0 means none.
type Listener struct {
	Addr netip.Addr // invalid for any
	Port uint16
}

// ParseListener reads PORT, ADDR:PORT or [ADDR]:PORT.
func ParseListener(s string) (Listener, error) {
	wrong := fmt.Errorf("%q is no listener: give PORT, ADDRESS:PORT or [ADDRESS]:PORT, as in 179 or 192.0.2.1:179", s)
	if !strings.Contains(s, ":") {
		port, err := strconv.ParseUint(s, 10, 16)
		if err != nil || port == 0 {
			return Listener{}, wrong
		}
		return Listener{Port: uint16(port)}, nil
	}
	if port, all := strings.CutPrefix(s, "*:"); all {
		s = "[::]:" + port // as ss(8) shows it
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil || ap.Port() == 0 || ap.Addr().Zone() != "" {
		return Listener{}, wrong
	}
	return Listener{ap.Addr().Unmap(), ap.Port()}, nil
}

// String is what ParseListener reads.
func (l Listener) String() string {
	switch {
	case l.Port == 0:
		return ""
	case !l.Addr.IsValid():
		return strconv.Itoa(int(l.Port))
	}
	return netip.AddrPortFrom(l.Addr, l.Port).String()
}

// StateNames are names of TCP states, in the words of ss(8).
type StateNames []string

// shortStates are states as ss(8) shows them, where that is not how it filters by them.
var shortStates = map[string]string{"estab": "established", "listen": "listening", "unconn": "closed"}

// allStates asks for sockets in any state.
const allStates = "all"

// stateNames are the names of all states, sorted.
func stateNames() []string { return slices.Compact(slices.Sorted(slices.Values(states[1:]))) }

// StateList are the names that ParseStates knows.
func StateList() []string { return append(stateNames(), allStates) }

// ParseStates reads names of states, separated by commas.
func ParseStates(s string) (StateNames, error) {
	var out StateNames
	for name := range strings.SplitSeq(s, ",") {
		name = strings.ToLower(strings.TrimSpace(name))
		name = cmp.Or(shortStates[name], name)
		if name != allStates && (name == "" || !slices.Contains(states[:], name)) {
			return nil, fmt.Errorf("%q is no TCP state: %s, or all", name, strings.Join(stateNames(), ", "))
		}
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out, nil
}

func (n StateNames) match(s sockopt.State) bool {
	if len(n) == 0 {
		return connected(s)
	}
	return slices.Contains(n, StateName(s)) || slices.Contains(n, allStates)
}

// Values is the filter as a query of the control API.
func (f Filter) Values() url.Values {
	v := url.Values{}
	set := func(key, value string) {
		if value != "" {
			v.Set(key, value)
		}
	}
	if f.Lost {
		v.Set("lost", "true")
	}
	if f.Processes {
		v.Set("processes", "true")
	}
	set("listener", f.Listener.String())
	set("dev", f.Device)
	set("state", strings.Join(f.States, ","))
	return v
}

// FilterFrom reads what Values wrote. The error names all that is wrong.
func FilterFrom(v url.Values) (Filter, error) {
	f := Filter{Device: v.Get("dev")}
	var errs []error
	flag := func(key string, into *bool) {
		if s := v.Get(key); s != "" {
			on, err := strconv.ParseBool(s)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %q is neither true nor false", key, s))
			}
			*into = on
		}
	}
	flag("lost", &f.Lost)
	flag("processes", &f.Processes)
	var err error
	if s := v.Get("listener"); s != "" {
		if f.Listener, err = ParseListener(s); err != nil {
			errs = append(errs, fmt.Errorf("listener: %w", err))
		}
	}
	if s := v.Get("state"); s != "" {
		if f.States, err = ParseStates(s); err != nil {
			errs = append(errs, fmt.Errorf("state: %w", err))
		}
	}
	return f, errors.Join(errs...)
}
