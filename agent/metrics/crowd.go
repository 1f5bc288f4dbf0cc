package metrics

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"sync"
)

// maxConns is how many connections are served at a time. Each costs a file and some memory, and everybody on the machine may
// connect.
const maxConns = 64

// maxStreams is how many requests one connection may have under way, under HTTP/2.
const maxStreams = 4

// A crowd is those who are connected. TCP doesn't tell who is at the other end, so nobody can be kept out to let others in.
// Instead the one that has been idle the longest gives way to the next one, of the origin that has the most: who holds many
// connections takes the places of his own, and a scrape, which asks at once, is through before it is the oldest. It is safe
// for concurrent use.
type crowd struct {
	net.Listener
	mu  sync.Mutex
	now uint64 // counts what makes one the youngest
	in  map[*guest]bool
}

// A guest is one connection. The crowd's lock guards since and busy.
type guest struct {
	net.Conn
	crowd  *crowd
	origin netip.Prefix
	since  uint64 // when it was accepted, or its last request had its answer
	busy   int    // requests that are answered
}

func newCrowd(l net.Listener) *crowd { return &crowd{Listener: l, in: map[*guest]bool{}} }

// Accept takes the next connection, and ends another one if there are too many.
func (c *crowd) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	g := &guest{Conn: conn, crowd: c, origin: originOf(conn.RemoteAddr())}
	c.mu.Lock()
	c.now++
	g.since = c.now
	c.in[g] = true
	var out *guest
	if len(c.in) > maxConns {
		out = c.yields(g)
	}
	c.mu.Unlock()
	if out != nil {
		_ = out.Close()
	}
	return g, nil
}

// yields is who gives way to one that is new.
func (c *crowd) yields(to *guest) *guest {
	by := map[netip.Prefix]int{}
	for g := range c.in {
		by[g.origin]++
	}
	var out *guest
	for g := range c.in {
		if g != to && (out == nil || g.ahead(out, by)) {
			out = g
		}
	}
	return out
}

// ahead reports whether g gives way rather than o does.
func (g *guest) ahead(o *guest, by map[netip.Prefix]int) bool {
	switch {
	case by[g.origin] != by[o.origin]:
		return by[g.origin] > by[o.origin]
	case (g.busy > 0) != (o.busy > 0):
		return o.busy > 0
	}
	return g.since < o.since
}

// Close ends a connection. That it is closed twice, by us and by who serves it, is no harm.
func (g *guest) Close() error {
	g.crowd.mu.Lock()
	delete(g.crowd.in, g)
	g.crowd.mu.Unlock()
	return g.Conn.Close()
}

// asks counts the guest's requests.
func (g *guest) asks(n int) {
	g.crowd.mu.Lock()
	defer g.crowd.mu.Unlock()
	g.busy += n
	g.crowd.now++
	g.since = g.crowd.now
}

// guestKey is of the context's value that says whose a request is.
type guestKey struct{}

// withGuest notes whose the requests of a connection are.
func withGuest(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if g, ok := c.(*guest); ok {
		return context.WithValue(ctx, guestKey{}, g)
	}
	return ctx
}

// attended has a handler's guests counted as busy while they are answered.
func attended(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g, ok := r.Context().Value(guestKey{}).(*guest); ok {
			g.asks(1)
			defer g.asks(-1)
		}
		h.ServeHTTP(w, r)
	})
}

// originOf is where a connection comes from: an address, an IPv6 network, as its hosts have as many addresses as they like, or this
// machine, which has all of 127.0.0.0/8.
func originOf(a net.Addr) netip.Prefix {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := t.AddrPort().Addr().Unmap()
	switch {
	case ip.IsLoopback():
		return netip.Prefix{}
	case ip.Is4():
		return netip.PrefixFrom(ip, 32)
	}
	return netip.PrefixFrom(ip.WithZone(""), 64).Masked()
}
