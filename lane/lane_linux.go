package lane

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A GoneError says that there is no such NIC, or not with this index and name. It is
// os.ErrNotExist.
type GoneError struct{ Index int32 }

func (e *GoneError) Error() string {
	return fmt.Sprintf("there is no such device with index %d", e.Index)
}

// Is makes errors.Is(err, os.ErrNotExist) true.
func (e *GoneError) Is(target error) bool { return target == os.ErrNotExist }

// Ensure makes a lane, or makes one that is in place what it should be. It writes nothing where
// all is right. New filters are there before old ones go.
//
// The error is os.ErrNotExist if the NIC is gone or has another name. Where the kernel or what
// others have set up on the NIC lets no lane be made, the error says what stands in the way and
// nothing of the lane stays.
func (c *Client) Ensure(l Lane) error {
	if err := l.check(); err != nil {
		return fmt.Errorf("lane: %s: %w", l.Name, err)
	}
	if err := c.ensure(l); err != nil {
		if errors.Is(err, unix.ENOENT) {
			// So the kernel says that it has no such qdisc, classifier or action, and errors.Is
			// takes it for os.ErrNotExist.
			err = errors.New(err.Error())
		}
		err = fmt.Errorf("lane: %s: %w", l.Name, err)
		if rerr := c.Remove(l.Index, l.Name); rerr != nil {
			err = errors.Join(err, rerr)
		}
		return err
	}
	return nil
}

func (c *Client) ensure(l Lane) error {
	v, err := c.view()
	if err != nil {
		return err
	}
	nic, ok := v.links[l.Index]
	if !ok || nic.name != l.Name {
		return &GoneError{l.Index}
	}
	e, err := c.filters(l.Index)
	if err != nil {
		return fmt.Errorf("read the filters: %w", err)
	}
	if err := v.obstacle(nic, e); err != nil {
		return err
	}
	ifb, err := c.ensureIFB(v, nic)
	if err != nil {
		return err
	}
	if err := c.ensureClsact(v, nic, ifb); err != nil {
		return err
	}
	return c.ensureFilters(l, ifb, e)
}

// obstacle says what others have on the NIC that lets no lane be there. Theirs is left alone.
func (v *view) obstacle(nic link, e egress) error {
	q := v.clsacts[nic.index]
	switch {
	case q.kind != "" && q.kind != "clsact":
		return fmt.Errorf("it has a qdisc %q of somebody else where clsact would be", q.kind)
	case q.shared:
		return errors.New("its clsact egress filters are a block that it shares with other devices")
	case e.taken:
		return fmt.Errorf("somebody else's filters have the preference %d or %d", prefIPv4, prefIPv6)
	}
	return nil
}

// ensureIFB makes the ifb, or what isn't right about it.
func (c *Client) ensureIFB(v *view, nic link) (link, error) {
	ifb, ok := v.ifb(nic.index)
	if !ok {
		if l, taken := v.named(IFBName(nic.index)); taken {
			return link{}, fmt.Errorf("somebody else has a device %s (index %d)", l.name, l.index)
		}
		err := c.addIFB(nic)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return link{}, fmt.Errorf("the kernel has no ifb devices (CONFIG_IFB): %w", err)
		}
		if err != nil {
			return link{}, fmt.Errorf("make %s: %w", IFBName(nic.index), err)
		}
		fresh, err := c.links()
		if err != nil {
			return link{}, err
		}
		if ifb, ok = (&view{links: fresh}).ifb(nic.index); !ok {
			return link{}, fmt.Errorf("%s is gone as soon as it is made", IFBName(nic.index))
		}
	}
	if err := c.setAlias(&ifb, nic.name, ifb.clsactOurs()); err != nil {
		return link{}, err
	}
	return ifb, c.setIFB(ifb, nic)
}

// ensureClsact makes the qdisc where there is none. That it is ours is noted first, so that it
// is found should we die in between.
func (c *Client) ensureClsact(v *view, nic, ifb link) error {
	if v.clsacts[nic.index].kind != "" {
		return nil
	}
	if err := c.setAlias(&ifb, nic.name, true); err != nil {
		return err
	}
	err := c.addClsact(nic.index)
	if errors.Is(err, unix.EEXIST) {
		// Somebody was quicker. What they made is looked at in the next call.
		return errors.Join(errors.New("somebody else just made a qdisc of their own"), c.setAlias(&ifb, nic.name, false))
	}
	if err != nil {
		return fmt.Errorf("make clsact: %w", err)
	}
	return nil
}

// ensureFilters brings the filters to what the lane wants: new and wrong ones first, then the
// ones that are not wanted any more.
func (c *Client) ensureFilters(l Lane, ifb link, e egress) error {
	have := map[Match]filter{}
	var extra []filter
	for _, f := range e.ours {
		if _, twice := have[f.match]; twice || !slices.Contains(l.Matches, f.match) {
			extra = append(extra, f)
			continue
		}
		have[f.match] = f
	}
	next := uint32(0)
	for _, m := range l.Matches {
		f, ok := have[m]
		if ok && f.to == ifb.index && !f.odd {
			continue
		}
		var flags netlink.HeaderFlags
		if !ok {
			for next++; e.handles[next]; next++ {
			}
			f, flags = filter{handle: next, match: m}, netlink.Excl
		}
		f.to = ifb.index
		if err := c.put(l.Index, f, flags); err != nil {
			return putError(m, err)
		}
	}
	for _, f := range extra {
		if err := c.take(l.Index, f); err != nil {
			return fmt.Errorf("delete the filter for %s: %w", f.match, err)
		}
	}
	return nil
}

func putError(m Match, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("it is gone: %w", os.ErrNotExist)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("the kernel has no flower classifier or no mirred action (CONFIG_NET_CLS_FLOWER, CONFIG_NET_ACT_MIRRED): %w", err)
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("somebody else has a filter for %s at our preference: %w", m, err)
	}
	return fmt.Errorf("add the filter for %s: %w", m, err)
}

// Remove takes a lane away: its filters, then its ifb (the other way round the kernel would drop
// what matches), then clsact if we made it and there is no filter in it now. It is no error if
// nothing is there. name only serves the error's text; a NIC that has another name now, or that
// is gone, is no hindrance.
func (c *Client) Remove(index int32, name string) error {
	if err := c.remove(index); err != nil {
		return fmt.Errorf("lane: remove from %s: %w", name, err)
	}
	return nil
}

func (c *Client) remove(index int32) error {
	v, err := c.view()
	if err != nil {
		return err
	}
	var errs []error
	if v.clsacts[index].kind == "clsact" {
		e, err := c.filters(index)
		if err != nil {
			return fmt.Errorf("read the filters: %w", err)
		}
		for _, f := range e.ours {
			if err := c.take(index, f); err != nil {
				errs = append(errs, fmt.Errorf("delete the filter for %s: %w", f.match, err))
			}
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...) // the ifb must outlive them
	}
	ifb, ok := v.ifb(index)
	if !ok {
		return nil
	}
	// The ifb goes last: its alias knows whose clsact is.
	if ifb.clsactOurs() && v.clsacts[index].kind == "clsact" {
		if err := c.dropClsact(index); err != nil {
			return err
		}
	}
	if err := c.delLink(ifb.index); err != nil {
		return fmt.Errorf("delete %s: %w", ifb.name, err)
	}
	return nil
}

// dropClsact deletes the qdisc if there is no filter in it. The kernel can't be told to delete
// it only then: a filter that somebody adds between the look and the deletion is lost.
func (c *Client) dropClsact(nic int32) error {
	e, err := c.filters(nic)
	if err != nil {
		return fmt.Errorf("read the filters: %w", err)
	}
	in, err := c.anyIngress(nic)
	if err != nil {
		return fmt.Errorf("read the filters: %w", err)
	}
	if e.foreign > 0 || len(e.ours) > 0 || in {
		return nil
	}
	if err := c.delClsact(nic); err != nil {
		return fmt.Errorf("delete clsact: %w", err)
	}
	return nil
}

// List returns what is in place, by index: every ifb that is ours and every filter with our
// mark, also where the NIC or the ifb is gone.
func (c *Client) List() ([]State, error) {
	v, err := c.view()
	if err != nil {
		return nil, fmt.Errorf("lane: %w", err)
	}
	states := map[int32]*State{}
	for _, l := range v.links {
		if l.ours() {
			states[nicOf(l.name)] = &State{Index: nicOf(l.name)}
		}
	}
	found := map[int32]egress{}
	for index, q := range v.clsacts {
		if q.kind != "clsact" || q.shared {
			continue
		}
		e, err := c.filters(index)
		if err != nil {
			return nil, fmt.Errorf("lane: read the filters of %s: %w", v.links[index].name, err)
		}
		if found[index] = e; len(e.ours) > 0 {
			states[index] = &State{Index: index}
		}
	}
	out := make([]State, 0, len(states))
	for _, index := range slices.Sorted(maps.Keys(states)) {
		s := states[index]
		if err := c.describe(v, found[index], s); err != nil {
			return nil, fmt.Errorf("lane: %w", err)
		}
		out = append(out, *s)
	}
	return out, nil
}

// describe fills in what is in place of one lane, and what is wrong about it.
func (c *Client) describe(v *view, e egress, s *State) error {
	wrong := func(format string, args ...any) { s.Problems = append(s.Problems, fmt.Sprintf(format, args...)) }
	nic, nicThere := v.links[s.Index]
	ifb, ifbThere := v.ifb(s.Index)
	s.Name, s.IFB, s.IFBIndex, s.Clsact = nic.name, ifb.name, ifb.index, ifb.clsactOurs()
	s.Packets, s.Bytes, s.Dropped = ifb.packets, ifb.bytes, ifb.dropped
	for _, f := range e.ours {
		switch {
		case !ifbThere || f.to != ifb.index || f.odd:
			wrong("the filter for %s does not lead to the ifb", f.match)
		case slices.Contains(s.Matches, f.match):
			wrong("there are two filters for %s", f.match)
		}
		s.Matches = append(s.Matches, f.match)
	}
	slices.SortFunc(s.Matches, Match.Compare)
	switch {
	case !nicThere:
		wrong("the NIC is gone")
		return nil
	case !ifbThere:
		wrong("there is no ifb")
		return nil
	}
	if ifb.alias != aliasOf(nic.name, s.Clsact) {
		wrong("the ifb's alias is %q", ifb.alias)
	}
	if !ifb.up {
		wrong("the ifb is down")
	}
	if ifb.mtu != nic.mtu {
		wrong("the ifb's mtu is %d and not %d", ifb.mtu, nic.mtu)
	}
	if ifb.queueLen < queueLenFor(nic) {
		wrong("the ifb's queue has room for %d packets and not %d", ifb.queueLen, queueLenFor(nic))
	}
	if !ifb.noLinkLocal {
		wrong("the ifb makes IPv6 addresses")
	}
	on, err := c.segmenting(ifb.index)
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("read the features of %s: %w", ifb.name, err)
	}
	if len(on) > 0 {
		wrong("the ifb has %s on", strings.Join(on, ", "))
	}
	return nil
}

// view is what the namespace has of devices and ingress hooks.
type view struct {
	links   map[int32]link
	clsacts map[int32]clsact
}

func (c *Client) view() (*view, error) {
	links, err := c.links()
	if err != nil {
		return nil, err
	}
	clsacts, err := c.clsacts()
	if err != nil {
		return nil, err
	}
	return &view{links, clsacts}, nil
}

// ifb is our ifb of a NIC.
func (v *view) ifb(nic int32) (link, bool) {
	l, ok := v.named(IFBName(nic))
	if !ok || !l.ours() {
		return link{}, false
	}
	return l, true
}

func (v *view) named(name string) (link, bool) {
	for _, l := range v.links {
		if l.name == name {
			return l, true
		}
	}
	return link{}, false
}
