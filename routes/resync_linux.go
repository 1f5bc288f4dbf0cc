package routes

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// maxTries is how often a dump is repeated that may lack something.
const maxTries = 4

// resync dumps the scopes, one after the other. Events that come meanwhile are handed on after
// them: what they tell is newer than, or as new as, the dump. An error is for the connection or
// the context.
func (w *Watcher) resync(ctx context.Context, scopes []Scope, sink func([]Event)) error {
	if err := w.dumps.barrier(); err != nil {
		return fmt.Errorf("routes: wait for the kernel: %w", err)
	}
	// What came before is told before.
	if err := w.poll(); err != nil {
		return err
	}
	w.release(sink)
	if w.losses.objects && (len(scopes) == 0 || scopes[0] != Scope{}) {
		more, err := w.resyncObjects(ctx, sink)
		if err != nil {
			return err
		}
		var all scopeSet
		for _, s := range append(more, scopes...) {
			all.add(s)
		}
		scopes = all.list()
	}
	w.losses.objects = false
	for _, s := range scopes {
		if w.lost != nil {
			break // a full dump is coming anyway
		}
		d := &dumper{w: w, ctx: ctx, sink: sink, to: []Event{ResyncBegin{Scope: s}}}
		err := d.scope(s)
		switch {
		case errors.Is(err, errStop):
			return ctx.Err()
		case isFatal(err):
			return err
		case err != nil:
			w.lose(err)
		}
		if s == (Scope{}) && w.lost == nil {
			calm, err := w.calm()
			if err != nil {
				return err
			}
			d.to = append(d.to, w.left()...)
			if calm {
				d.to = append(d.to, Calm{})
			}
		}
		if w.lost == nil {
			d.to = append(d.to, ResyncEnd{Scope: s})
			w.known = w.known || s == (Scope{})
			w.resyncs.Add(1)
		}
		if err := d.flush(); err != nil {
			return ctx.Err()
		}
	}
	w.losses.again()
	w.doubt()
	w.release(sink)
	return nil
}

// calm reports whether no event has come since a full dump began. What a dump shows already is told soon after that.
func (w *Watcher) calm() (bool, error) {
	if err := w.dumps.barrier(); err != nil {
		return false, fmt.Errorf("routes: wait for the kernel: %w", err)
	}
	if err := w.poll(); err != nil {
		return false, err
	}
	return w.lost == nil && !slices.ContainsFunc(w.held, func(batch []Event) bool { return len(batch) > 0 }), nil
}

// left are the events that have come of links which left the namespace, ahead of their turn: a dump that does not show them any more is
// not to end before it is known where they went, as whoever hears of that later has forgotten what they were. Of an index that two links have
// had meanwhile, only the first one counts.
func (w *Watcher) left() (events []Event) {
	told := map[Ifindex]bool{}
	for _, batch := range w.held {
		for _, ev := range batch {
			gone, ok := ev.(LinkGone)
			if !ok || told[gone.Index] {
				continue
			}
			told[gone.Index] = true
			if gone.To != (Place{}) {
				events = append(events, gone)
			}
		}
	}
	return events
}

// doubt has the families dumped again for which the events that were held leave it open what is
// there: the first few times at once, then less and less often, as a table that never rests gives
// no answer.
func (w *Watcher) doubt() {
	families := inDoubt(w.held)
	if len(families) == 0 {
		w.doubts = 0
		return
	}
	w.doubts++
	again := &w.losses.due
	if late := w.doubts - maxTries; late > 0 {
		again = &w.later
		w.laterAt = time.Now().Add(min(doubtMax, doubtMin<<min(late-1, 16)))
	}
	for f := range families {
		again.add(Scope{RoutesOnly: true, Family: f})
	}
}

const (
	doubtMin = 100 * time.Millisecond
	doubtMax = time.Minute
)

// release hands on the events that were held.
func (w *Watcher) release(sink func([]Event)) {
	for len(w.held) > 0 {
		batch := w.held[0]
		w.held[0], w.held = nil, w.held[1:]
		for i, ev := range batch {
			if set, ok := ev.(LinkSet); ok { // its database may have been dumped since
				set.Link = w.fdbs.stamp(set.Link)
				batch[i] = set
			}
		}
		if len(batch) > 0 {
			sink(batch)
		}
	}
	w.held = nil
}

// isFatal reports whether the dump connection can't be used any more. What the kernel answers,
// what was interrupted and what could not be decoded leaves it intact.
func isFatal(err error) bool {
	var k *kernelError
	return err != nil && !errors.As(err, &k) && !errors.Is(err, errInterrupted) && !errors.Is(err, errDecode)
}

// errDecode is for items of a dump that made no sense.
var errDecode = errors.New("an item of the dump makes no sense")

// dumper hands on one resync in chunks.
type dumper struct {
	w    *Watcher
	ctx  context.Context
	sink func([]Event)
	to   []Event
	bad  error
	// found are routes of the first dump, of which there can be very many. They come before to.
	found  []Route
	beside *beside // the dump of IPv6 routes, nil for none
}

// scope dumps what the scope covers, each kind after those that it stands on.
func (d *dumper) scope(s Scope) error {
	if s.RoutesOnly {
		return d.routes(s)
	}
	l := &d.w.losses
	clear(l.links)
	clear(l.nexthops)
	clear(d.w.fdbs.devices)
	if err := d.repeat(rtmGetLink, linkRequest()); err != nil {
		return err
	}
	if err := d.w.readFDBs(func(l *Link) { d.to = append(d.to, LinkSet{Link: l}) }); err != nil {
		return err
	}
	// A link that the dump shows as down may still have its routes; then its event is one that
	// says nothing new.
	if err := d.w.dumps.barrier(); err != nil {
		return err
	}
	for _, r := range []struct {
		typ     uint16
		payload []byte
	}{
		{rtmGetAddr, addrRequest(IPv4)},
		{rtmGetAddr, addrRequest(IPv6)},
		{rtmGetRule, genHeader(IPv4, fibRuleHdrLen)},
		{rtmGetRule, genHeader(IPv6, fibRuleHdrLen)},
		{rtmGetNexthop, make([]byte, nhmsgLen)},
	} {
		if err := d.repeat(r.typ, r.payload); err != nil {
			return err
		}
	}
	return d.routes(s)
}

func (d *dumper) routes(s Scope) error {
	if s == (Scope{}) {
		return d.bothFamilies()
	}
	for _, f := range []Family{IPv4, IPv6} {
		if s.Family != 0 && s.Family != f {
			continue
		}
		if err := d.routesOf(f, s.Oif); err != nil {
			return err
		}
	}
	return nil
}

// routesOf dumps the routes of a family. The kernel's dump of IPv6 routes is not exact while
// the table changes: after an addition it starts again at the root and skips as many routes as
// it has shown, so that every removal in between hides one (fib6_dump_table). Whatever several
// dumps together show was there, so the dump is repeated and the results are joined.
//
// A dump by device is exact only while no route moves to or from the device: a mirror would
// keep an old version of a route that it knows from another device. If one may have moved
// meanwhile, the family is dumped next.
func (d *dumper) routesOf(f Family, oif Ifindex) error {
	if told := d.w.told[f]; oif != 0 {
		defer func() {
			if d.w.told[f] != told {
				d.w.losses.due.add(Scope{RoutesOnly: true, Family: f})
			}
		}()
	}
	for try := 1; ; try++ {
		adds, removals := d.w.adds, d.w.removals
		var err error
		if b := d.beside; b != nil && f == IPv6 {
			d.beside = nil
			adds, removals = b.adds, b.removals
			err = d.join(b)
		} else {
			err = dumpRoutes(d.w.dumps, Filter{Family: f, Oif: oif}, d.item)
		}
		if err := d.check(err); err != nil && !errors.Is(err, errInterrupted) {
			return err
		}
		if err := d.w.poll(); err != nil {
			return err
		}
		doubt := errors.Is(err, errInterrupted) || f == IPv6 && d.w.adds != adds && d.w.removals != removals
		if !doubt {
			return nil
		}
		d.w.interrupted.Add(1)
		switch {
		case try < maxTries:
		case err != nil:
			return errInterrupted
		default:
			// The table never rests. What is joined can only have too much, and the events tell what
			// of it is gone; once more when it is quieter.
			d.w.losses.due.add(Scope{RoutesOnly: true, Family: f})
			return nil
		}
	}
}

func (d *dumper) repeat(typ uint16, payload []byte) error {
	for try := 1; ; try++ {
		err := d.check(dump(d.w.dumps, typ, payload, d.item))
		if !errors.Is(err, errInterrupted) {
			return err
		}
		d.w.interrupted.Add(1)
		if try == maxTries {
			return err
		}
	}
}

// check forgives what a kernel without the feature answers (IPv6 or a table that isn't there),
// and reports items that could not be decoded.
func (d *dumper) check(err error) error {
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		err = nil
	}
	if err == nil {
		err, d.bad = d.bad, nil
	}
	return err
}

// item takes one message of a dump.
func (d *dumper) item(h Header, data []byte) error {
	d.w.messages.Add(1)
	if !d.w.known && h.Type == rtmNewRoute {
		return d.first(data)
	}
	ev, err := d.w.decode(h, data)
	if err != nil {
		d.undecodable(err)
		return nil
	}
	if ev == nil {
		return nil
	}
	d.w.losses.found(ev)
	d.to = append(d.to, ev)
	if len(d.to) < d.w.opts.Chunk {
		return nil
	}
	return d.pass()
}

// first takes a route of the first dump.
func (d *dumper) first(data []byte) error {
	r, ok, err := d.w.dec.route(data)
	switch {
	case err != nil:
		d.undecodable(err)
	case ok && len(d.to) > 0:
		if err := d.flush(); err != nil {
			return err
		}
		fallthrough
	case ok:
		d.found = append(d.found, r)
	}
	if len(d.found) < d.w.opts.Chunk {
		return nil
	}
	return d.pass()
}

func (d *dumper) undecodable(err error) {
	d.w.undecodable.Add(1)
	d.bad = errors.Join(errDecode, err)
}

// pass hands on what was found, and looks what else has come.
func (d *dumper) pass() error {
	if err := d.flush(); err != nil {
		return err
	}
	if d.beside != nil {
		d.takeSome(d.beside)
	}
	return d.w.poll()
}

func (d *dumper) flush() error {
	if d.ctx.Err() != nil {
		return errStop
	}
	if len(d.found) > 0 {
		d.sink([]Event{RoutesFound{Routes: d.found}})
		d.found = roomFor(d.w.opts.Chunk)
	}
	if len(d.to) > 0 {
		d.sink(d.to)
		d.to = make([]Event, 0, d.w.opts.Chunk)
	}
	return nil
}

// poll reads the events that have come meanwhile, so that their queue does not overflow.
func (w *Watcher) poll() error {
	// The deadline of the event connection may have passed; then reading would only say so.
	w.mu.Lock()
	if !w.done {
		_ = w.events.SetReadDeadline(time.Time{})
	}
	w.mu.Unlock()
	for {
		last := len(w.held) - 1
		if last < 0 || len(w.held[last]) >= batchMax {
			w.held = append(w.held, nil)
			last++
		}
		var got bool
		var err error
		w.held[last], got, err = w.readOne(false, w.held[last])
		if err != nil || !got {
			return err
		}
	}
}

// resyncObjects dumps the nexthop objects and tells of those that have gone or changed without
// an event. It returns the routes that are to be dumped because of it.
func (w *Watcher) resyncObjects(ctx context.Context, sink func([]Event)) ([]Scope, error) {
	seen := make(map[uint32]bool)
	var out []Event
	err := dump(w.dumps, rtmGetNexthop, make([]byte, nhmsgLen), func(h Header, data []byte) error {
		w.messages.Add(1)
		ev, err := w.dec.Decode(h, data)
		set, ok := ev.(NexthopSet)
		if err != nil || !ok {
			return err
		}
		seen[set.Nexthop.ID] = true
		if old := w.losses.nexthops[set.Nexthop.ID]; old == nil || !sameObject(old, set.Nexthop) {
			w.losses.told(ev)
			out = append(out, ev)
		}
		return nil
	})
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil: // also interrupted: what is missing may only have been skipped
		return nil, w.loseOr(err)
	}
	for _, id := range slices.Sorted(maps.Keys(w.losses.nexthops)) {
		if !seen[id] {
			w.losses.told(NexthopGone{ID: id})
			out = append(out, NexthopGone{ID: id})
		}
	}
	if len(out) > 0 {
		sink(out)
	}
	due := w.losses.due.list()
	w.losses.due = scopeSet{}
	return due, nil
}

func (w *Watcher) loseOr(err error) error {
	if isFatal(err) {
		return fmt.Errorf("routes: dump nexthop objects: %w", err)
	}
	w.lose(err)
	return nil
}

// readFDBs dumps the forwarding databases that are due, and tells of the devices that this
// changes. The error is for the connection; what else goes wrong is a loss.
func (w *Watcher) readFDBs(tell func(*Link)) error {
	for _, i := range w.fdbs.take() {
		var entries []fdbEntry
		err := dump(w.dumps, rtmGetNeigh, fdbRequest(i), func(h Header, data []byte) error {
			w.messages.Add(1)
			e, ok, err := decodeFDB(h, data)
			if ok {
				entries = append(entries, e)
			}
			return err
		})
		switch {
		case isFatal(err):
			return fmt.Errorf("routes: dump the forwarding database of device %d: %w", i, err)
		case errors.Is(err, unix.ENODEV): // its event is on the way
		case err != nil:
			w.lose(err)
		}
		if l := w.fdbs.fill(i, entries); l != nil {
			tell(l)
		}
	}
	return nil
}
