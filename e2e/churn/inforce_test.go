package churn

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// inForce compares what an agent at rest believes with the kernel: it has the rules and clones of the plan, and no others, and says of packets that
// a rule of the plan leads to a clone that they have the clone's MTU.
func (l *lab) inForce(got plan) {
	l.Helper()
	l.inPlace(got)
	asked := 0
	for _, r := range got.rules {
		src, ok := sourceOf(r)
		if !ok {
			continue
		}
		for _, c := range got.clones {
			if (r.Family == "ipv6") != c.Dst.Addr().Is6() {
				continue
			}
			dst := c.Dst.Addr()
			if !c.Dst.IsSingleIP() {
				dst = dst.Next()
			}
			want, ok := got.mtu(src, dst)
			if !ok {
				continue
			}
			asked++
			if have := l.lockedMTU(src, dst); have != want {
				l.Errorf("the kernel's MTU from %s to %s is locked at %d (0 for not), the plan's at %d", src, dst, have, want)
			}
		}
	}
	l.Logf("the kernel was asked about %d flows", asked)
}

func (l *lab) inPlace(got plan) {
	l.Helper()
	var rules, clones, wantRules, wantClones []string
	for family, flag := range map[string]string{"ipv4": "-4", "ipv6": "-6"} {
		var have struct {
			rules []struct {
				Priority int
				Protocol any
			}
			routes []struct {
				Dst   string
				Table any
			}
		}
		l.ip(&have.rules, flag, "rule", "show")
		l.ip(&have.routes, flag, "route", "show", "table", "all", "proto", protocol)
		for _, r := range have.rules {
			if fmt.Sprint(r.Protocol) == protocol {
				rules = append(rules, fmt.Sprintf("%s %d", family, r.Priority))
			}
		}
		for _, r := range have.routes {
			clones = append(clones, fmt.Sprintf("%s %s table %v", family, r.Dst, r.Table))
		}
	}
	for _, r := range got.rules {
		wantRules = append(wantRules, fmt.Sprintf("%s %d", r.Family, r.Priority))
	}
	for _, c := range got.clones {
		dst, family := c.Dst.String(), "ipv4"
		if c.Dst.Addr().Is6() {
			family = "ipv6"
		}
		if c.Dst.Bits() == 0 {
			dst = "default"
		} else if c.Dst.IsSingleIP() {
			dst = c.Dst.Addr().String()
		}
		wantClones = append(wantClones, fmt.Sprintf("%s %s table %d", family, dst, c.Table))
	}
	order := cmpopts.SortSlices(strings.Compare)
	if d := cmp.Diff(wantRules, rules, order); d != "" {
		l.Errorf("rules (-the agent's +the kernel's):\n%s", d)
	}
	if d := cmp.Diff(wantClones, clones, order); d != "" {
		l.Errorf("clones (-the agent's +the kernel's):\n%s", d)
	}
}

// protocol is that of the agent's rules and clones.
const protocol = "84"

func (l *lab) ip(into any, args ...string) {
	l.Helper()
	out, err := exec.Command("ip", append([]string{"-N", "-j"}, args...)...).Output()
	if err == nil {
		err = json.Unmarshal(out, into)
	}
	if err != nil {
		l.Fatalf("ip %s: %v", strings.Join(args, " "), err)
	}
}

// mtu is that of the clone to which the rules lead a packet, if they do.
func (p plan) mtu(src, dst netip.Addr) (mtu int, ok bool) {
	rules := slices.Clone(p.rules)
	slices.SortFunc(rules, func(a, b rule) int { return a.Priority - b.Priority })
	for _, r := range rules {
		if (r.Family == "ipv6") != dst.Is6() || !r.takes(src, dst) {
			continue
		}
		longest := clone{Throw: true}
		for _, c := range p.clones {
			if c.Table == r.Table && c.Dst.Contains(dst) && (!longest.Dst.IsValid() || c.Dst.Bits() > longest.Dst.Bits()) {
				longest = c
			}
		}
		if !longest.Throw {
			return longest.MTU, true
		}
	}
	return 0, false
}

// takes reports whether the rule is for such packets. The ones of this test have a source and a destination at most.
func (r rule) takes(src, dst netip.Addr) bool {
	for words := strings.Fields(r.Text); len(words) >= 2; words = words[2:] {
		of := src
		switch words[0] {
		case "to":
			of = dst
			fallthrough
		case "from":
			if p, ok := prefix(words[1]); words[1] != "all" && (!ok || !p.Contains(of)) {
				return false
			}
		}
	}
	return true
}

// sourceOf is an address that the rule takes packets from, which is nobody's here.
func sourceOf(r rule) (netip.Addr, bool) {
	words := strings.Fields(r.Text)
	if i := slices.Index(words, "from"); i >= 0 && i+1 < len(words) && words[i+1] != "all" {
		p, ok := prefix(words[i+1])
		if a := p.Addr(); ok && !p.IsSingleIP() {
			return a.Next().Next().Next(), true
		}
		return p.Addr(), ok
	}
	if r.Family == "ipv6" {
		return netip.MustParseAddr("fd77::7"), true
	}
	return netip.MustParseAddr("203.0.115.7"), true
}

func prefix(s string) (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(s)
	return p, err == nil
}

var mtuLock = regexp.MustCompile(`\bmtu lock (\d+)`)

// lockedMTU is what the kernel says of a packet that comes in by nic0, 0 if the MTU is not locked.
func (l *lab) lockedMTU(src, dst netip.Addr) int {
	out, err := exec.Command("ip", "route", "get", dst.String(), "from", src.String(), "iif", "nic0").CombinedOutput()
	m := mtuLock.FindSubmatch(out)
	if m == nil {
		l.Logf("from %s to %s: %v %s", src, dst, err, out)
		return 0
	}
	n, _ := strconv.Atoi(string(m[1])) // they are digits
	return n
}
