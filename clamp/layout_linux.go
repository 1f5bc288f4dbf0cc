package clamp

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// priority is that of our chain: behind mangle (-150), where clamps are set by custom.
const priority = -150 + 10

const (
	chainForward = "forward"
	chainMSS     = "mss"
)

// half is what is different for a family.
type half struct {
	prefix string // of the names of its sets
	proto  byte
	key    nftables.SetDatatype
	src    uint32 // the offset of the source address in the network header; the destination follows
}

var halves = []half{
	{"v4_", unix.NFPROTO_IPV4, nftables.TypeIPAddr, 12},
	{"v6_", unix.NFPROTO_IPV6, nftables.TypeIP6Addr, 8},
}

// layout is what our table consists of.
type layout struct {
	table        *nftables.Table
	mss, forward *nftables.Chain
	sets         []sized
}

// sized is one set of ours.
type sized struct {
	half
	mss     uint16
	set     *nftables.Set
	entries []Entry
}

func table() *nftables.Table { return &nftables.Table{Name: Name, Family: nftables.TableFamilyINet} }

// layoutOf is the table for entries: a set for each family and MSS, in that order.
func layoutOf(entries []Entry) layout {
	t := table()
	accept := nftables.ChainPolicyAccept
	l := layout{
		table: t,
		mss:   &nftables.Chain{Name: chainMSS, Table: t},
		forward: &nftables.Chain{
			Name: chainForward, Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward,
			Priority: nftables.ChainPriorityRef(priority), Policy: &accept,
		},
	}
	for _, h := range halves {
		byMSS := map[uint16][]Entry{}
		var values []uint16
		for _, e := range entries {
			if e.Lo.BitLen() != int(h.key.Bytes)*8 {
				continue
			}
			if byMSS[e.MSS] == nil {
				values = append(values, e.MSS)
			}
			byMSS[e.MSS] = append(byMSS[e.MSS], e)
		}
		slices.Sort(values)
		for _, mss := range values {
			l.sets = append(l.sets, sized{h, mss, &nftables.Set{
				Table: t, Name: fmt.Sprintf("%s%d", h.prefix, mss), Interval: true, KeyType: h.key, Comment: Name,
			}, byMSS[mss]})
		}
	}
	return l
}

// rules are those of both chains. The rule for the destination limits what comes back from
// there, the one for the source what is sent to it.
func (l layout) rules() []*nftables.Rule {
	var out []*nftables.Rule
	add := func(c *nftables.Chain, exprs ...expr.Any) {
		out = append(out, &nftables.Rule{
			Table: l.table, Chain: c, Exprs: exprs,
			UserData: userdata.AppendString(nil, userdata.TypeComment, Name),
		})
	}
	for _, s := range l.sets {
		for _, offset := range []uint32{s.src + s.key.Bytes, s.src} {
			add(l.mss,
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{s.proto}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: s.key.Bytes},
				&expr.Lookup{SourceRegister: 1, SetName: s.set.Name},
				&expr.Immediate{Register: 1, Data: []byte{byte(s.mss >> 8), byte(s.mss)}},
				&expr.Exthdr{SourceRegister: 1, Type: tcpoptMSS, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
			)
		}
	}
	add(l.forward,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{tcpSYN}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
		&expr.Verdict{Kind: expr.VerdictJump, Chain: chainMSS},
	)
	return out
}

const (
	tcpFlags  = 13   // offset of the flags in the TCP header
	tcpSYN    = 0x02 // set in SYN and SYN/ACK
	tcpoptMSS = 2    // TCPOPT_MSS, linux/tcp.h; its value stands 2 bytes into the option
)

// is reports whether what was read is just this layout, but for the elements of the sets.
func (l layout) is(chains []*nftables.Chain, sets []*nftables.Set, rules map[string][]*nftables.Rule) bool {
	if len(chains) != 2 || len(sets) != len(l.sets) {
		return false
	}
	for _, want := range []*nftables.Chain{l.mss, l.forward} {
		if !slices.ContainsFunc(chains, func(c *nftables.Chain) bool { return sameChain(c, want) }) {
			return false
		}
		var own []*nftables.Rule
		for _, r := range l.rules() {
			if r.Chain == want {
				own = append(own, r)
			}
		}
		if !slices.EqualFunc(rules[want.Name], own, sameRule) {
			return false
		}
	}
	return true
}

func sameChain(a, b *nftables.Chain) bool {
	return a.Name == b.Name && a.Type == b.Type && same(a.Hooknum, b.Hooknum) && same(a.Priority, b.Priority) && same(a.Policy, b.Policy)
}

func same[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }

func sameRule(a, b *nftables.Rule) bool {
	return slices.EqualFunc(a.Exprs, b.Exprs, func(x, y expr.Any) bool { return reflect.DeepEqual(x, y) })
}

// mssOf is the MSS that the name of a set of ours says.
func mssOf(s *nftables.Set) (uint16, bool) {
	for _, h := range halves {
		if digits, ok := strings.CutPrefix(s.Name, h.prefix); ok && s.Interval && !s.IsMap && s.KeyType.Name == h.key.Name {
			n, err := strconv.ParseUint(digits, 10, 16)
			return uint16(n), err == nil && n != 0 && s.Name == fmt.Sprintf("%s%d", h.prefix, n)
		}
	}
	return 0, false
}

// ours reports whether a table with these chains and rules is of our making.
func ours(chains []*nftables.Chain, rules map[string][]*nftables.Rule) bool {
	n := 0
	for _, list := range rules {
		for _, r := range list {
			if text, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok && text == Name {
				return true
			}
		}
		n += len(list)
	}
	// Flushed. Nobody else has just these two chains, and nothing in them.
	return n == 0 && len(chains) == 2 && rules[chainMSS] == nil && rules[chainForward] == nil &&
		slices.ContainsFunc(chains, func(c *nftables.Chain) bool { return c.Name == chainMSS }) &&
		slices.ContainsFunc(chains, func(c *nftables.Chain) bool { return c.Name == chainForward })
}
