package routes

import (
	"errors"
	"sync"
)

// decoders are those of a Watcher. IPv6 routes have one of their own, as they are dumped beside the others. It is safe for one goroutine, and
// for another one that decodes IPv6 routes alone.
type decoders struct {
	Decoder
	mu  sync.Mutex
	six Decoder
}

// isSix reports whether a message is one of an IPv6 route.
func isSix(h Header, data []byte) bool {
	return (h.Type == rtmNewRoute || h.Type == rtmDelRoute) && len(data) > 0 && Family(data[0]) == IPv6
}

// Decode is as Decoder.Decode.
func (d *decoders) Decode(h Header, data []byte) (Event, error) {
	if isSix(h, data) {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.six.Decode(h, data)
	}
	return d.Decoder.Decode(h, data)
}

// route decodes the payload of an RTM_NEWROUTE message as Decode does.
func (d *decoders) route(data []byte) (Route, bool, error) {
	if len(data) > 0 && Family(data[0]) == IPv6 {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.six.Interner.route(data)
	}
	return d.Interner.route(data)
}

// All calls f for each Body that is still in use.
func (d *decoders) All(f func(*Body) bool) {
	on := true
	d.Interner.All(func(b *Body) bool {
		on = f(b)
		return on
	})
	if !on {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.six.Interner.All(f)
}

// beside is a dump of IPv6 routes that is taken while that of the IPv4 routes is: the kernel makes each on the processor of who reads it.
//
//	dumps  ── IPv4 ──> dumper ──┬──> sink
//	dumps6 ── IPv6 ──> beside ──┘
type beside struct {
	found chan []Event // closed at the end
	stop  chan struct{}
	// adds and removals are those of the Watcher when it began.
	adds, removals uint64
	// What is set at the end: the errors of the dump, and of items.
	err, bad error
}

// besideAhead is how many chunks it is ahead of who takes them.
const besideAhead = 8

// bothFamilies dumps all routes.
func (d *dumper) bothFamilies() error {
	b := &beside{
		found: make(chan []Event, besideAhead), stop: make(chan struct{}),
		adds: d.w.adds, removals: d.w.removals,
	}
	d.beside = b
	go b.run(d.w)
	err := d.routesOf(IPv4, 0)
	if err == nil {
		err = d.routesOf(IPv6, 0)
	}
	close(b.stop)
	for range b.found { // until it has ended: the connection is its own until then
	}
	return err
}

// run dumps. It runs in a goroutine of its own, and touches nothing of the Watcher that is not safe for that.
func (b *beside) run(w *Watcher) {
	defer close(b.found)
	c := dumper{w: w}
	hand := func() error {
		if len(c.found) > 0 {
			c.to, c.found = append(c.to, RoutesFound{Routes: c.found}), roomFor(w.opts.Chunk)
		}
		if len(c.to) == 0 {
			return nil
		}
		select {
		case b.found <- c.to:
			c.to = nil
			return nil
		case <-b.stop:
			return errStop
		}
	}
	first := !w.known
	b.err = dumpRoutes(w.dumps6, Filter{Family: IPv6}, func(h Header, data []byte) error {
		w.messages.Add(1)
		if !first {
			ev, err := w.dec.Decode(h, data)
			if err != nil {
				c.undecodable(err)
			} else if ev != nil {
				c.to = append(c.to, ev)
			}
		} else if h.Type == rtmNewRoute {
			r, ok, err := w.dec.route(data)
			if err != nil {
				c.undecodable(err)
			} else if ok {
				c.found = append(c.found, r)
			}
		}
		if max(len(c.to), len(c.found)) < w.opts.Chunk {
			return nil
		}
		return hand()
	})
	b.bad = c.bad
	if err := hand(); err != nil {
		b.err = errors.Join(b.err, err)
	}
}

// takeSome hands on what the dump beside has found until now.
func (d *dumper) takeSome(b *beside) {
	for {
		select {
		case found, more := <-b.found:
			if !more {
				return
			}
			d.sink(found)
		default:
			return
		}
	}
}

// join hands on the rest, and returns the error of the dump.
func (d *dumper) join(b *beside) error {
	if err := d.flush(); err != nil { // what stands before it
		return err
	}
	for found := range b.found {
		if d.ctx.Err() != nil {
			return errStop
		}
		d.sink(found)
		if err := d.w.poll(); err != nil {
			return err
		}
	}
	d.bad = errors.Join(d.bad, b.bad)
	return b.err
}
