package api

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Explanation says what happens to one flow: the route and rule that the kernel uses, the
// policy and SA that apply, what they cost, and what was done about it.
type Explanation struct {
	Version int    `json:"version"`
	Dst     string `json:"dst"`
	From    string `json:"from"`
	Device  string `json:"device"`
	Gateway string `json:"gateway,omitempty"`
	Table   uint32 `json:"table"`
	// Type is the route's, in the words of `ip route`: local, broadcast, multicast or anycast; empty for unicast.
	Type string `json:"type,omitempty"`
	// RouteMTU is what the route says now, in bytes; RouteMTULocked its lock.
	RouteMTU       uint32 `json:"route_mtu"`
	RouteMTULocked bool   `json:"route_mtu_locked"`
	DeviceMTU      int    `json:"device_mtu"`
	// Policy is the one that matches, 0 for none; Losers match too, but others go first.
	Policy   uint32   `json:"policy"`
	Action   string   `json:"action"` // none, bypass, block, ipsec
	Selector string   `json:"selector,omitempty"`
	Losers   []string `json:"losers"`
	// Costs are the bytes of each transformation, the innermost first.
	Costs []StepCost `json:"costs"`
	// MTU is what a packet of the flow may have in bytes, before IPsec, 0 while it is not known, or where none gets through; MSS what
	// TCP has of it without options.
	MTU      int             `json:"mtu"`
	MSS      int             `json:"mss"`
	Coverage *CoverageReport `json:"coverage,omitempty"`
	Notes    []string        `json:"notes"`
	// Live says that an agent answers, and so what is held and locked is in place; without one it is what one would do.
	Live bool `json:"live"`
	// Rule is the FIB rule whose table has the route, in the words of `ip rule`, and Route that route; empty where they can't be told.
	Rule  string `json:"rule,omitempty"`
	Route string `json:"route,omitempty"`
	// Segmentation says where super-packets of a local TCP sender are cut, and why there; empty where nothing gets through.
	Segmentation string `json:"segmentation,omitempty"`
	// WouldChange is what would change the answer.
	WouldChange []string `json:"would_change"`
}

// StepCost is what one transformation takes.
type StepCost struct {
	Template string     `json:"template"`
	SA       string     `json:"sa"`
	MTU      int        `json:"outer_mtu"` // what it is given, in bytes
	Items    []CostItem `json:"items"`
	Inner    int        `json:"inner_mtu"` // what it leaves, in bytes
	// Losers are other SAs for the same template that the kernel doesn't use now.
	Losers []string `json:"losers,omitempty"`
}

// CostItem is one line of a cost.
type CostItem struct {
	Name  string `json:"name"`
	Bytes int    `json:"bytes"`
}

// Question asks what happens to a flow. From may be invalid; the zero values of the rest mean
// any.
type Question struct {
	Dst, From netip.Addr
	Proto     uint8
	Port      uint16 // destination port
	Mark      uint32
}

// Values is the question as a query of the control API.
func (q Question) Values() url.Values {
	v := url.Values{"dst": {q.Dst.String()}}
	if q.From.IsValid() {
		v.Set("from", q.From.String())
	}
	for _, n := range []struct {
		key string
		val uint64
	}{{"proto", uint64(q.Proto)}, {"port", uint64(q.Port)}, {"mark", uint64(q.Mark)}} {
		if n.val != 0 {
			v.Set(n.key, strconv.FormatUint(n.val, 10))
		}
	}
	return v
}

// ParseQuestion reads what Values wrote. The error names all that is wrong.
func ParseQuestion(v url.Values) (Question, error) {
	var q Question
	var errs []error
	addr := func(key string, into *netip.Addr) {
		s := v.Get(key)
		if s == "" {
			return
		}
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			errs = append(errs, fmt.Errorf("%s: %q is no IP address", key, s))
			return
		}
		*into = a.Unmap()
	}
	number := func(key string, bits int) uint64 {
		s := v.Get(key)
		if s == "" {
			return 0
		}
		n, err := strconv.ParseUint(s, 0, bits)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %q is no number of %d bits", key, s, bits))
		}
		return n
	}
	addr("dst", &q.Dst)
	addr("from", &q.From)
	q.Proto = uint8(number("proto", 8))
	q.Port = uint16(number("port", 16))
	q.Mark = uint32(number("mark", 32))
	switch {
	case len(errs) > 0:
	case !q.Dst.IsValid():
		errs = append(errs, errors.New("dst is missing"))
	case q.From.IsValid() && q.From.Is4() != q.Dst.Is4():
		errs = append(errs, errors.New("dst and from are of different families"))
	}
	return q, errors.Join(errs...)
}

// SetMTU says what MTU a flow to the destination has, and what TCP has of it without options.
func (e *Explanation) SetMTU(mtu int, dst string) {
	header := 40
	if strings.Contains(dst, ":") {
		header = 60
	}
	e.MTU, e.MSS = mtu, max(mtu-header, 0)
}

// AddNote adds a sentence once.
func (e *Explanation) AddNote(text string) {
	if !slices.Contains(e.Notes, text) {
		e.Notes = append(e.Notes, text)
	}
}

// PathMTU is the smaller of the route's own MTU and its device's, in bytes.
func (e *Explanation) PathMTU() int {
	if e.RouteMTU != 0 && (e.DeviceMTU == 0 || int(e.RouteMTU) < e.DeviceMTU) {
		return int(e.RouteMTU)
	}
	return e.DeviceMTU
}

// AddChange adds what would change the answer, once.
func (e *Explanation) AddChange(text string) {
	if !slices.Contains(e.WouldChange, text) {
		e.WouldChange = append(e.WouldChange, text)
	}
}
