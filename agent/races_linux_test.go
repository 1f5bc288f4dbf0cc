package agent

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/routes"
)

// racingTable has the owner of a route write it just before the agent does.
type racingTable struct {
	routeTable
	before func()
}

// Replace writes in place, after what the owner does.
func (r *racingTable) Replace(msg []byte) (uint32, error) {
	r.before()
	return r.routeTable.Replace(msg)
}

// Batch writes several, after what the owner does where there are some in place.
func (r *racingTable) Batch(writes []routes.Write) ([]routes.Result, error) {
	if slices.ContainsFunc(writes, func(w routes.Write) bool { return w.Op == routes.OpReplace }) {
		r.before()
	}
	return r.routeTable.Batch(writes)
}

// An owner is one of a route to a destination that the agent locks, which it writes in one of several versions.
type owner struct {
	dst      string
	family   routes.Family
	table    *routes.Table
	versions [][]byte
	hops     []routes.Nexthop
	last     int
	gone     bool
}

// owner learns the versions of a route from ip.
func (ns *testNS) owner(table *routes.Table, family routes.Family, dst string, ways ...string) *owner {
	ns.t.Helper()
	o := &owner{dst: dst, family: family, table: table}
	for _, way := range ways {
		flag := map[routes.Family]string{routes.IPv4: "", routes.IPv6: "-6 "}[family]
		ns.ip(flag + "route add " + dst + " " + way)
		r := o.read(ns.t)
		msg, err := routes.EncodeRoute(r)
		if err != nil {
			ns.t.Fatal(err)
		}
		o.versions, o.hops = append(o.versions, msg), append(o.hops, r.Body.Nexthops[0])
		ns.ip(flag + "route del " + dst)
	}
	o.gone = true
	return o
}

// read is the route as the kernel has it; there is one.
func (o *owner) read(t *testing.T) (found routes.Route) {
	t.Helper()
	n := 0
	err := o.table.Routes(routes.Filter{Family: o.family, Table: routes.TableMain}, func(r routes.Route) error {
		if r.Dst.String() == o.dst {
			found = r
			n++
		}
		return nil
	})
	if err != nil || n != 1 {
		t.Fatalf("%d routes to %s, %v", n, o.dst, err)
	}
	return found
}

// write writes one of the other versions, or deletes the route and adds it anew. It passes over the version that the kernel has already, where
// the agent has just given back one that was not the newest any more: IPv4 tells nobody of a replacement by the same (fib_table_insert in
// net/ipv4/fib_trie.c), and nobody can mend what is not told (docs/limits.md).
func (o *owner) write(t *testing.T, rng *rand.Rand) error {
	if !o.gone && rng.IntN(8) == 0 {
		if err := o.delete(); err != nil {
			return err
		}
	}
	next := func() { o.last = (o.last + 1 + rng.IntN(len(o.versions)-1)) % len(o.versions) }
	if next(); !o.gone && o.is(t, false) {
		next()
	}
	o.gone = false
	_, err := o.table.Put(o.versions[o.last])
	return err
}

// delete deletes the version that it wrote last, which is not there while the agent has overwritten it (docs/limits.md).
func (o *owner) delete() error {
	_, err := o.table.Delete(o.versions[o.last])
	o.gone = err == nil
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// is reports whether the kernel has the owner's newest version, with the lock or without an MTU.
func (o *owner) is(t *testing.T, locked bool) bool {
	t.Helper()
	r := o.read(t)
	mtu := routes.MTUMetricOf(r.Body)
	return len(r.Body.Nexthops) == 1 && r.Body.Nexthops[0] == o.hops[o.last] && mtu.Locked == locked && (mtu.MTU == 1400) == locked
}

// TestHostOwnersRaceEachLock has owners of routes, of both families, write them between what the agent has read and what it writes in place, again and
// again: the route has its owner's newest version in the end, each time. TSOAGENT_RACES is how many writes are raced, from another seed each time.
func TestHostOwnersRaceEachLock(t *testing.T) {
	races, seed := 4000, uint64(1)
	if text := os.Getenv("TSOAGENT_RACES"); text != "" {
		var err error
		if races, err = strconv.Atoi(text); err != nil {
			t.Fatal("TSOAGENT_RACES: ", err)
		}
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	checkLeaks(t)
	ns := newNS(t)
	ns.ip("link add n2 type veth peer name n3\nlink set n2 addrgenmode none\nlink set n3 addrgenmode none\nlink set n2 up\nlink set n3 up")
	table, err := routes.OpenTable()
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	owners := []*owner{
		ns.owner(table, routes.IPv4, "10.2.0.0/16", "via 192.0.2.10", "via 192.0.2.11", "dev n2", "via 192.0.2.12 src 10.1.0.1"),
		ns.owner(table, routes.IPv6, "2001:db8:2::/48", "via 2001:db8::10", "via 2001:db8::11", "dev n2", "via 2001:db8::12"),
	}
	ns.policy("add", "0.0.0.0/0", "10.2.0.0/16", "")
	ns.policy("add", "::/0", "2001:db8:2::/48", "")
	a := ns.start(hostConfig(t))

	rng := rand.New(rand.NewPCG(seed, 0))
	raced := 0
	var wrong error
	race := func() { // in the loop: the owners are nobody else's meanwhile
		clear(a.st.fights) // the bound on fights is not what is tried here
		for _, o := range owners {
			if rng.IntN(2) == 0 && wrong == nil && !o.gone {
				raced++
				wrong = o.write(t, rng)
			}
		}
	}
	if err := a.call(t.Context(), func() { a.rt = &racingTable{a.rt, race} }); err != nil {
		t.Fatal(err)
	}
	for round := 0; raced < races && wrong == nil; round++ {
		if err := a.call(t.Context(), func() {
			for _, o := range owners {
				if wrong == nil {
					wrong = o.write(t, rng)
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		within(t, 30*time.Second, fmt.Sprintf("the owners' newest versions are there, with the lock (round %d)", round), func() (ok bool) {
			// The owners, their socket and what was raced are the loop's.
			err := a.call(t.Context(), func() {
				ok = wrong != nil || len(a.st.writing)+len(a.st.inflight) == 0 && owners[0].is(t, true) && owners[1].is(t, true)
			})
			return err == nil && ok
		})
	}
	if wrong != nil {
		t.Fatal(wrong)
	}
	t.Logf("%d writes were raced, %d times the owner's version was written again", raced, a.Report().Counters.Repairs)
	if a.Report().Counters.Repairs == 0 {
		t.Error("nothing was ever overwritten: the test tests nothing")
	}
	a.stop()
	if wrong != nil {
		t.Fatal(wrong)
	}
	for _, o := range owners {
		if !o.is(t, false) {
			r := o.read(t)
			t.Errorf("given back, it is another route: %v, mtu %+v; its owner wrote it last with %+v", r.Body.Nexthops, routes.MTUMetricOf(r.Body), o.hops[o.last])
		}
	}
}
