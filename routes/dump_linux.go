package routes

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Filter narrows a dump of routes; zero fields match all.
type Filter struct {
	Family   Family // must be set
	Table    TableID
	Protocol Protocol
	Oif      Ifindex // routes with a nexthop on this device, also as one of several
}

// Routes calls f for each route that the filter matches, in the kernel's order, straight from
// the kernel. A route can come twice while the tables change. Errors of f end the calls and are
// returned.
func (t *Table) Routes(filter Filter, f func(Route) error) error {
	err := dumpRoutes(t.c, filter, func(h Header, data []byte) error {
		ev, err := t.dec.Decode(h, data)
		if set, ok := ev.(RouteSet); ok && set.Route.Body.Family == filter.Family {
			err = f(set.Route)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("routes: dump %s routes: %w", filter.Family, err)
	}
	return nil
}

// Rules returns the rules of a family in the order in which the kernel asks them.
func (t *Table) Rules(family Family) ([]Rule, error) {
	var rules []Rule
	err := dump(t.c, rtmGetRule, genHeader(family, fibRuleHdrLen), func(h Header, data []byte) error {
		ev, err := t.dec.Decode(h, data)
		if set, ok := ev.(RuleSet); ok && set.Rule.Family == family {
			rules = append(rules, *set.Rule)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("routes: dump %s rules: %w", family, err)
	}
	return rules, nil
}

// Links returns all devices of the namespace.
func (t *Table) Links() ([]*Link, error) {
	var links []*Link
	err := dump(t.c, rtmGetLink, linkRequest(), func(h Header, data []byte) error {
		ev, err := t.dec.Decode(h, data)
		if set, ok := ev.(LinkSet); ok {
			links = append(links, set.Link)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("routes: dump links: %w", err)
	}
	return links, nil
}

// asker is a conn or a talk.
type asker interface {
	request(typ, flags uint16, payload []byte, f func(Header, []byte) error) (seq uint32, err error)
}

var (
	_ asker = (*conn)(nil)
	_ asker = (*talk)(nil)
)

func dump(c asker, typ uint16, payload []byte, f func(Header, []byte) error) error {
	_, err := c.request(typ, unix.NLM_F_DUMP, payload, f)
	return err
}

// dumpRoutes dumps routes with the kernel's own filter. A device or a table that does not exist
// has none.
func dumpRoutes(c asker, filter Filter, f func(Header, []byte) error) error {
	b := genHeader(filter.Family, rtmsgLen)
	b[5] = byte(filter.Protocol)
	if filter.Table != 0 {
		b = appendTable(b, filter.Table)
	}
	if filter.Oif != 0 {
		b = appendU32(b, rtaOif, uint32(filter.Oif))
	}
	err := dump(c, rtmGetRoute, b, f)
	if filter.Oif != 0 && errors.Is(err, unix.ENODEV) || filter.Table != 0 && errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func genHeader(f Family, n int) []byte {
	b := make([]byte, n, n+16)
	b[0] = byte(f)
	return b
}

// linkRequest asks for all links without their statistics.
func linkRequest() []byte {
	const rtextFilterSkipStats = 1 << 3 // linux/rtnetlink.h
	return appendU32(make([]byte, ifinfomsgLen), iflaExtMask, rtextFilterSkipStats)
}

// addrRequest asks for the addresses of a family: the header and four bytes that must be there
// and zero (struct ifaddrmsg).
func addrRequest(f Family) []byte { return genHeader(f, ifaddrmsgLen) }
