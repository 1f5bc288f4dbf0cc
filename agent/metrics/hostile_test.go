package metrics

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A port is one on which metrics are served.
type port struct {
	t    *testing.T
	addr string
}

// servePort serves a page until the test ends.
func servePort(t *testing.T) port {
	t.Helper()
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, l, "", NewCollector("v1", fixture{}), Health{}, slog.New(slog.DiscardHandler))
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return port{t, l.Addr().String()}
}

// raw is a connection that does as the test likes.
func (p port) raw() net.Conn {
	p.t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = c.Close() })
	return c
}

// scrape is one of a client that has no connection yet.
func (p port) scrape() error {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 30 * time.Second}
	res, err := client.Get("http://" + p.addr + "/metrics")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	page, err := io.ReadAll(res.Body)
	if err == nil && (res.StatusCode != http.StatusOK || !strings.Contains(string(page), "\n"+BuildInfo+"{")) {
		err = fmt.Errorf("%s: %.200s", res.Status, page)
	}
	return err
}

// Who holds a thousand connections, some silent, some in the middle of a request, some that read no answer, keeps
// nobody out, and has no more than the bound.
func TestManyConnectionsKeepNobodyOut(t *testing.T) {
	const many = 1000
	p := servePort(t)
	for i := range many {
		c := p.raw()
		switch i % 3 {
		case 1:
			_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ")
		case 2: // some are hung up on by then
			_, _ = io.WriteString(c, strings.Repeat("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 3))
		}
	}
	if err := p.scrape(); err != nil {
		t.Fatal(err)
	}
	// The scrape came last, so all others were accepted. Both ends of the connections are this process's.
	if n := openFiles(t); n > many+maxConns+50 {
		t.Errorf("%d files are open after %d connections; the bound is %d", n, many, maxConns)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// While others open connections as fast as they can a scrape goes through.
func TestScrapesGoThroughAFlood(t *testing.T) {
	p := servePort(t)
	ctx, cancel := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	for range 2 {
		flood.Go(func() {
			var held []net.Conn
			for ctx.Err() == nil {
				c, err := net.Dial("tcp", p.addr)
				if err != nil {
					continue
				}
				_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
				if held = append(held, c); len(held) > 2*maxConns {
					_ = held[0].Close()
					held = held[1:]
				}
			}
			for _, c := range held {
				_ = c.Close()
			}
		})
	}
	defer flood.Wait()
	defer cancel()
	deadline := time.Now().Add(time.Minute)
	for err := p.scrape(); err != nil; err = p.scrape() {
		if time.Now().After(deadline) {
			t.Fatalf("no scrape went through in a minute; the last one: %v", err)
		}
	}
}

// Whose place is taken, if all are: that of who has the most, and there the one that is idle the longest.
func TestWhoGivesWay(t *testing.T) {
	const busy = true
	type conn struct {
		from string
		busy bool
	}
	for name, x := range map[string]struct {
		conns []conn // the oldest first, the last is new
		want  int
	}{
		"the oldest":              {[]conn{{from: "192.0.2.1"}, {from: "192.0.2.1"}, {from: "192.0.2.1"}}, 0},
		"who has the most":        {[]conn{{from: "192.0.2.1"}, {from: "192.0.2.2"}, {from: "192.0.2.2"}, {from: "192.0.2.3"}}, 1},
		"also where the new is":   {[]conn{{from: "192.0.2.1"}, {from: "192.0.2.2"}, {from: "192.0.2.2"}}, 1},
		"never the new one":       {[]conn{{from: "192.0.2.1", busy: busy}, {from: "192.0.2.1", busy: busy}, {from: "192.0.2.1"}}, 0},
		"the idle ahead of busy":  {[]conn{{from: "192.0.2.1", busy: busy}, {from: "192.0.2.1"}, {from: "192.0.2.1"}}, 1},
		"busy of who has most":    {[]conn{{from: "192.0.2.2"}, {from: "192.0.2.1", busy: busy}, {from: "192.0.2.1", busy: busy}, {from: "192.0.2.3"}}, 1},
		"an IPv6 network is one":  {[]conn{{from: "192.0.2.1"}, {from: "2001:db8::1"}, {from: "2001:db8::ffff:2"}, {from: "192.0.2.2"}}, 1},
		"networks are not one":    {[]conn{{from: "192.0.2.1"}, {from: "2001:db8::1"}, {from: "2001:db8:0:1::1"}}, 0},
		"this machine is one":     {[]conn{{from: "192.0.2.1"}, {from: "127.0.0.1"}, {from: "127.9.9.9"}, {from: "::1"}, {from: "192.0.2.2"}}, 1},
		"IPv4 as IPv6 is IPv4":    {[]conn{{from: "2001:db8::1"}, {from: "::ffff:192.0.2.1"}, {from: "192.0.2.1"}, {from: "192.0.2.2"}}, 1},
		"each address is its own": {[]conn{{from: "192.0.2.1"}, {from: "::ffff:192.0.2.2"}, {from: "192.0.2.3"}}, 0},
	} {
		c := crowd{in: map[*guest]bool{}}
		var all []*guest
		for i, x := range x.conns {
			g := &guest{origin: originOf(net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(x.from), uint16(i)))), since: uint64(i)}
			if x.busy {
				g.busy = 1
			}
			c.in[g] = true
			all = append(all, g)
		}
		if got := c.yields(all[len(all)-1]); got != all[x.want] {
			t.Errorf("%s: %v gives way, want %d", name, got, x.want)
		}
	}
}

// A head that doesn't come, or is too large, costs the connection.
func TestSlowAndHugeHeadsAreCutOff(t *testing.T) {
	p := servePort(t)
	slow := p.raw()
	_, _ = io.WriteString(slow, "GET /metrics HTTP/1.1\r\nHost: ")
	for name, text := range map[string]string{
		"no HTTP":        "\x16\x03\x01\x00\xff\r\n\r\n",
		"a huge header":  "GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n",
		"many headers":   "GET /metrics HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: y\r\n", 16<<10) + "\r\n",
		"a huge request": "GET /" + strings.Repeat("x", 64<<10) + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"no host":        "GET /metrics HTTP/1.1\r\n\r\n",
		"two lengths":    "GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
	} {
		c := p.raw()
		go func() { _, _ = io.WriteString(c, text) }()
		_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil {
			_ = res.Body.Close()
			if res.StatusCode < 400 {
				t.Errorf("%s: %s", name, res.Status)
			}
		} else if errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_ = slow.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.ReadAll(slow); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the slow one: %v", err)
	}
	if err := p.scrape(); err != nil {
		t.Error(err)
	}
}

// There is nothing but the page and the metrics, by whatever way one comes, and no way to change anything.
func TestPathsAndMethodsLeadNowhere(t *testing.T) {
	p := servePort(t)
	ask := func(line string) (status int, location, allow string) {
		t.Helper()
		c := p.raw()
		if _, err := fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", line); err != nil {
			t.Fatal(err)
		}
		method, _, _ := strings.Cut(line, " ")
		res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		defer res.Body.Close()
		return res.StatusCode, res.Header.Get("Location"), res.Header.Get("Allow")
	}
	for line, want := range map[string]int{
		"GET /metrics": 200, "HEAD /metrics": 200, "GET /": 200, "GET /status.js?x=1": 200, "GET http://elsewhere/metrics": 200,
		"POST /metrics": 405, "PUT /metrics": 405, "DELETE /": 405, "PATCH /status.js": 405, "OPTIONS /metrics": 405, "TRACE /metrics": 405,
		"FOO /metrics": 405, "POST /v1/pause": 404, "GET /page/": 404, "GET /index.html": 404, "GET /status.css/": 404, "GET /metrics/": 404,
		"GET /%2e%2e/etc/passwd": 404, "GET /%2e%2e%2fetc/passwd": 404, "GET /..%5cserve.go": 404, "GET /status.js%00": 404, "GET /page%2findex.html": 404,
		"GET /%1b[31m": 404, "CONNECT elsewhere:22": 405, "OPTIONS *": 200, "GET /../../etc/passwd": 307, "GET //elsewhere/": 307, "GET /status.js/../page": 307,
	} {
		status, location, allow := ask(line)
		if status != want {
			t.Errorf("%s: %d, want %d", line, status, want)
		}
		// A way that is put right stays here, and leads to nothing else.
		if location != "" && (!strings.HasPrefix(location, "/") || strings.HasPrefix(location, "//")) {
			t.Errorf("%s leads to %q", line, location)
		}
		if status == 405 {
			if d := cmp.Diff("GET, HEAD", allow); d != "" {
				t.Errorf("%s allows (-want +got):\n%s", line, d)
			}
		}
	}
}
