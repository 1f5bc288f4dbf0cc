package routes

import (
	"maps"
	"slices"
)

// scopeSet is a set of resyncs that are due. A wider one swallows the narrower ones. The zero
// value is empty.
type scopeSet struct {
	full bool
	ipv4 bool // all routes of the family
	ipv6 bool
	oifs map[Ifindex]Scope // routes of single devices
}

// maxOifs bounds the dumps by device; above it all routes are dumped once, which is cheaper
// (the kernel walks whole tables for each device).
const maxOifs = 8

func (s *scopeSet) add(c Scope) {
	switch {
	case s.full:
	case !c.RoutesOnly:
		*s = scopeSet{full: true}
	case c.Oif == 0:
		s.ipv4 = s.ipv4 || c.Family != IPv6
		s.ipv6 = s.ipv6 || c.Family != IPv4
	default:
		if s.oifs == nil {
			s.oifs = make(map[Ifindex]Scope)
		}
		if old, ok := s.oifs[c.Oif]; ok && old.Family != c.Family {
			c.Family = 0
		}
		s.oifs[c.Oif] = c
		if len(s.oifs) > maxOifs {
			*s = scopeSet{ipv4: true, ipv6: true}
		}
	}
}

func (s *scopeSet) merge(o scopeSet) {
	for _, c := range o.list() {
		s.add(c)
	}
}

func (s *scopeSet) empty() bool { return !s.full && !s.ipv4 && !s.ipv6 && len(s.oifs) == 0 }

// list is the shortest list of scopes that covers the set.
func (s *scopeSet) list() []Scope {
	switch {
	case s.full:
		return []Scope{{}}
	case s.ipv4 && s.ipv6:
		return []Scope{{RoutesOnly: true}}
	}
	var out []Scope
	if s.ipv4 {
		out = append(out, Scope{RoutesOnly: true, Family: IPv4})
	}
	if s.ipv6 {
		out = append(out, Scope{RoutesOnly: true, Family: IPv6})
	}
	for _, i := range slices.Sorted(maps.Keys(s.oifs)) {
		c := s.oifs[i]
		switch {
		case s.ipv4 && c.Family == IPv4, s.ipv6 && c.Family == IPv6:
			continue
		case s.ipv4:
			c.Family = IPv6
		case s.ipv6:
			c.Family = IPv4
		}
		out = append(out, c)
	}
	return out
}
