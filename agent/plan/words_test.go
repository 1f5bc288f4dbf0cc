package plan

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"tsoagent/routes"
)

// words is a line that is read word by word. The first error stays.
type words struct {
	w   []string
	err error
}

func (f *words) fail(format string, args ...any) {
	if f.err == nil {
		f.err = fmt.Errorf(format, args...)
	}
}

func (f *words) more() bool { return len(f.w) > 0 && f.err == nil }

func (f *words) next() string {
	if len(f.w) == 0 {
		f.fail("a word is missing at the end")
		return ""
	}
	s := f.w[0]
	f.w = f.w[1:]
	return s
}

// is takes the next word if it is s.
func (f *words) is(s string) bool {
	if len(f.w) > 0 && f.w[0] == s {
		f.w = f.w[1:]
		return true
	}
	return false
}

func (f *words) num() int {
	s := f.next()
	n, err := strconv.ParseInt(strings.TrimSuffix(s, ":"), 0, 64)
	if err != nil {
		f.fail("%q is no number", s)
	}
	return int(n)
}

func (f *words) addr() netip.Addr {
	s := f.next()
	a, err := netip.ParseAddr(s)
	if err != nil {
		f.fail("%q is no address", s)
	}
	return a
}

func (f *words) prefix() netip.Prefix {
	s := f.next()
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil {
			f.fail("%q is no prefix", s)
			return netip.Prefix{}
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if p != p.Masked() {
		f.fail("%s has bits outside its length", s)
	}
	return p
}

// mark reads value/mask; without a mask all bits count.
func (f *words) mark() (value, mask uint32) {
	s := f.next()
	v, m, masked := strings.Cut(s, "/")
	a, err := strconv.ParseUint(v, 0, 32)
	b := uint64(0xffffffff)
	if err == nil && masked {
		b, err = strconv.ParseUint(m, 0, 32)
	}
	if err != nil {
		f.fail("%q is no mark", s)
	}
	return uint32(a), uint32(b)
}

func (f *words) proto() uint8 {
	s := f.next()
	names := map[string]uint8{"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "esp": 50, "ah": 51, "comp": 108}
	if n, ok := names[s]; ok {
		return n
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil {
		f.fail("%q is no protocol", s)
	}
	return uint8(n)
}

func (f *words) end() error {
	if f.err == nil && len(f.w) > 0 {
		f.fail("what is %q?", f.w[0])
	}
	return f.err
}

func (f *words) ports() routes.PortRange {
	lo, hi, ranged := strings.Cut(f.next(), "-")
	a, err := strconv.ParseUint(lo, 10, 16)
	b := a
	if err == nil && ranged {
		b, err = strconv.ParseUint(hi, 10, 16)
	}
	if err != nil {
		f.fail("no port")
	}
	return routes.PortRange{Lo: uint16(a), Hi: uint16(b)}
}

func tableOf(f *words) routes.TableID {
	names := map[string]routes.TableID{"main": routes.TableMain, "local": routes.TableLocal, "default": routes.TableDefault}
	if len(f.w) > 0 {
		if t, ok := names[f.w[0]]; ok {
			f.next()
			return t
		}
	}
	return routes.TableID(f.num())
}
