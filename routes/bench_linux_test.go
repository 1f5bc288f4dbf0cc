package routes

import (
	"context"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"testing"
	"time"
)

// BenchmarkDump dumps a table of ROUTES_BENCH routes (by default 100,000), decoded and by a
// Watcher, and lets `ip route show` do the same for comparison.
func BenchmarkDump(b *testing.B) {
	newNS(b)
	ip(b, "link add a0 type veth peer name a1\nlink set a0 up\nlink set a1 up\naddr add 10.0.0.1/24 dev a0")
	n := 100_000
	if s := os.Getenv("ROUTES_BENCH"); s != "" {
		n, _ = strconv.Atoi(s)
	}
	tb := openTable(b)
	for i := 0; i < n; i += 100_000 {
		var writes []Write
		for j := i; j < min(n, i+100_000); j++ {
			writes = append(writes, Write{OpAdd, plain(j, byte(2+j%8))})
		}
		res, err := tb.Batch(writes)
		if err != nil || res[0].Err != nil {
			b.Fatal(err, res[0].Err)
		}
	}
	runtime.GC()
	// A benchmark of its own goroutine would not be in the namespace, so these are metrics.
	measure := func(name string, f func()) {
		best := time.Hour
		for range 3 {
			start := time.Now()
			f()
			best = min(best, time.Since(start))
		}
		b.ReportMetric(float64(best.Milliseconds()), name+"-ms")
	}
	for b.Loop() {
		measure("routes", func() {
			count := 0
			if err := tb.Routes(Filter{Family: IPv4}, func(Route) error { count++; return nil }); err != nil || count < n {
				b.Fatal(count, err)
			}
		})
		measure("bare", func() {
			if err := dumpRoutes(tb.c, Filter{Family: IPv4}, nil); err != nil {
				b.Fatal(err)
			}
		})
		measure("watcher", func() { runToEnd(b, func(Event) {}) })
		measure("watcher-and-mirror", func() {
			fib := NewFIB()
			runToEnd(b, func(ev Event) { fib.Apply(ev) })
		})
		measure("mdlayher-receive", func() {
			payload := genHeader(IPv4, rtmsgLen)
			m := netlinkDump(rtmGetRoute, payload)
			c, err := dialRoute(0)
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Send(m); err != nil {
				b.Fatal(err)
			}
			for _, err := range c.ReceiveIter() {
				if err != nil {
					b.Fatal(err)
				}
			}
		})
		measure("ip-route-show", func() {
			cmd := exec.Command("ip", "route", "show", "table", "all")
			if err := cmd.Run(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

func runToEnd(b *testing.B, f func(Event)) {
	w, err := Dial(WatchOptions{})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	_ = w.Run(ctx, func(evs []Event) {
		for _, ev := range evs {
			f(ev)
			if _, ok := ev.(ResyncEnd); ok {
				cancel()
			}
		}
	})
}
