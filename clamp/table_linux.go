package clamp

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"

	"tsoagent/failpoint"
)

// ErrForeign is the error of a write where the kernel has a table of our name that is not ours.
var ErrForeign = errors.New("the table is not ours")

// Table reads and writes our table in the network namespace of the thread that opened it. It is
// not safe for concurrent use.
type Table struct {
	c *nftables.Conn
}

// Open opens a connection in the network namespace of the calling thread. Where the kernel has no
// nftables, the first Read or Write says so.
func Open() (*Table, error) {
	c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(buffers))
	if err != nil {
		return nil, fmt.Errorf("clamp: open nfnetlink: %w", err)
	}
	return &Table{c}, nil
}

// buffers makes room for a whole transaction, which is one datagram, and for its answers.
func buffers(c *netlink.Conn) error {
	return errors.Join(c.SetWriteBuffer(32<<20), c.SetReadBuffer(8<<20))
}

// Close closes the connection. The table stays.
func (t *Table) Close() error { return t.c.CloseLasting() }

// chunk bounds the elements of one message: the length of a netlink attribute has 16 bits.
const chunk = 256

// Write makes our table be just the entries, which must be disjoint and in order (Flatten), in
// one transaction: no packet sees a part of it. A table of our name that is not ours is left
// alone (ErrForeign).
func (t *Table) Write(entries []Entry) error {
	s, err := t.Read()
	if err != nil {
		return err
	}
	if s.There && !s.Ours {
		return fmt.Errorf("clamp: write table inet %s: %w", Name, ErrForeign)
	}
	if s.There {
		t.c.DelTable(table())
	}
	want := layoutOf(entries)
	t.c.CreateTable(want.table) // EEXIST if somebody was quicker
	t.c.AddChain(want.mss)
	t.c.AddChain(want.forward)
	for _, s := range want.sets {
		if err := t.c.AddSet(s.set, nil); err != nil {
			return fmt.Errorf("clamp: set %s: %w", s.set.Name, err)
		}
		for part := range slices.Chunk(s.elements(), chunk) {
			if err := t.c.SetAddElements(s.set, part); err != nil {
				return fmt.Errorf("clamp: set %s: %w", s.set.Name, err)
			}
		}
	}
	for _, r := range want.rules() {
		t.c.AddRule(r)
	}
	if err := t.flush(); err != nil {
		return fmt.Errorf("clamp: write table inet %s: %w", Name, err)
	}
	return nil
}

// Delete deletes our table. One that is not there is no error, one that is not ours is left alone
// (ErrForeign).
func (t *Table) Delete() error {
	s, err := t.Read()
	switch {
	case err != nil:
		return err
	case !s.There:
		return nil
	case !s.Ours:
		return fmt.Errorf("clamp: delete table inet %s: %w", Name, ErrForeign)
	}
	t.c.DelTable(table())
	if err := t.flush(); err != nil && !gone(err) {
		return fmt.Errorf("clamp: delete table inet %s: %w", Name, err)
	}
	return nil
}

// flush does what was asked for, in one transaction.
func (t *Table) flush() error {
	failpoint.Hit("nft-before")
	err := t.c.Flush()
	failpoint.Hit("nft-after")
	return err
}

// Read reads what the kernel has. It reads piece by piece: while somebody else writes the table,
// the state can be a mix, and a Watcher then tells of another change.
func (t *Table) Read() (State, error) {
	var s State
	nt, err := t.c.ListTableOfFamily(Name, nftables.TableFamilyINet)
	if gone(err) {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("clamp: read table inet %s: %w", Name, err)
	}
	s.There = true
	chains, err := t.chains(nt)
	if err != nil {
		return s, fmt.Errorf("clamp: read chains: %w", err)
	}
	rules := map[string][]*nftables.Rule{}
	for _, c := range chains {
		if rules[c.Name], err = t.c.GetRules(nt, c); err != nil && !gone(err) {
			return s, fmt.Errorf("clamp: read rules: %w", err)
		}
	}
	if s.Ours = ours(chains, rules); !s.Ours {
		return s, nil
	}
	sets, err := t.c.GetSets(nt)
	if err != nil && !gone(err) {
		return s, fmt.Errorf("clamp: read sets: %w", err)
	}
	s.Whole = true
	for _, set := range sets {
		set.Table = nt
		elems, err := t.c.GetSetElements(set)
		if err != nil && !gone(err) {
			return s, fmt.Errorf("clamp: read set %s: %w", set.Name, err)
		}
		mss, ok := mssOf(set)
		entries, whole := intervals(elems, set.KeyType.Bytes, mss)
		s.Entries, s.Whole = append(s.Entries, entries...), s.Whole && ok && whole
	}
	slices.SortFunc(s.Entries, Compare)
	s.Whole = s.Whole && layoutOf(s.Entries).is(chains, sets, rules)
	return s, nil
}

// gone says that something is not there. While the table is read, it may go away.
func gone(err error) bool { return errors.Is(err, os.ErrNotExist) }

// chains are those of our table.
func (t *Table) chains(nt *nftables.Table) ([]*nftables.Chain, error) {
	all, err := t.c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	own := slices.DeleteFunc(all, func(c *nftables.Chain) bool { return c.Table == nil || c.Table.Name != Name })
	for _, c := range own {
		c.Table = nt
	}
	return own, nil
}

// elements are those of the set. An interval is two: its first address, and the one behind its
// last as its end, which is left out where the family ends.
func (s sized) elements() []nftables.SetElement {
	var out []nftables.SetElement
	for _, e := range s.entries {
		out = append(out, nftables.SetElement{Key: e.Lo.AsSlice()})
		if end := e.Hi.Next(); end.IsValid() {
			out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

// intervals turns a set's elements back into entries. whole is false if they are none that we
// would write.
func intervals(elems []nftables.SetElement, addrLen uint32, mss uint16) (out []Entry, whole bool) {
	type edge struct {
		at  netip.Addr
		end bool
	}
	var edges []edge
	for _, e := range elems {
		a, ok := netip.AddrFromSlice(e.Key)
		if !ok || len(e.Key) != int(addrLen) {
			return nil, false
		}
		edges = append(edges, edge{a, e.IntervalEnd})
	}
	// An end goes ahead of an interval that begins at its address. A set that was made by nft has
	// an end at its first address where no interval begins there.
	slices.SortFunc(edges, func(a, b edge) int {
		switch c := a.at.Compare(b.at); {
		case c != 0 || a.end == b.end:
			return c
		case a.end:
			return -1
		}
		return 1
	})
	open := false
	for _, x := range edges {
		switch n := len(out); {
		case x.end && open:
			out[n-1].Hi = x.at.Prev()
		case !x.end && open:
			return nil, false
		case !x.end:
			out = append(out, Entry{x.at, last(netip.PrefixFrom(x.at, 0)), mss})
		}
		open = !x.end
	}
	return out, true
}
