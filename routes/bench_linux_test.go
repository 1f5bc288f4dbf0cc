package routes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// BenchmarkBatch writes 20,000 routes and deletes them, in batches and one by one, and lets `ip -batch` do the same.
func BenchmarkBatch(b *testing.B) {
	newNS(b)
	ip(b, "link add a0 type veth peer name a1\nlink set a0 up\nlink set a1 up\naddr add 10.0.0.1/24 dev a0")
	const n = 20_000
	tb := openTable(b)
	writes := func(op Op) (list []Write) {
		for i := range n {
			list = append(list, Write{op, plain(i, 2)})
		}
		return list
	}
	var text strings.Builder
	for i := range n {
		r, err := tb.dec.Interner.ParseRoute(plain(i, 2))
		if err != nil {
			b.Fatal(err)
		}
		fmt.Fprintf(&text, "route VERB %s via %s table %d\n", r.Dst, r.Body.Nexthops[0].Gateway, r.Body.Table)
	}
	both := func(name string, do func(op Op) error) {
		for _, step := range []struct {
			op   Op
			name string
		}{{OpAdd, "add"}, {OpDelete, "delete"}} {
			start := time.Now()
			if err := do(step.op); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(time.Since(start).Microseconds())/n, name+"-"+step.name+"-µs/route")
		}
	}
	for b.Loop() {
		both("batch", func(op Op) error {
			res, err := tb.Batch(writes(op))
			return errors.Join(err, res[0].Err)
		})
		both("one-by-one", func(op Op) error {
			for _, w := range writes(op) {
				if _, err := tb.write("write", w); err != nil {
					return err
				}
			}
			return nil
		})
		both("ip", func(op Op) error {
			verb := map[Op]string{OpAdd: "add", OpDelete: "del"}[op]
			cmd := exec.Command("ip", "-batch", "-")
			cmd.Stdin = strings.NewReader(strings.ReplaceAll(text.String(), "VERB", verb))
			return cmd.Run()
		})
	}
}

// BenchmarkReceive reads and decodes notifications that wait already: what each costs the reader, beside what its bare system call does.
func BenchmarkReceive(b *testing.B) {
	newNS(b)
	ip(b, "link add a0 type veth peer name a1\nlink set a0 up\nlink set a1 up\naddr add 10.0.0.1/24 dev a0")
	const n = 20_000
	tb := openTable(b)
	storm := func(via byte) {
		writes := make([]Write, n)
		for i := range writes {
			writes[i] = Write{OpPut, plain(i, via)}
		}
		if res, err := tb.Batch(writes); err != nil || res[n-1].Err != nil {
			b.Fatal(err, res[n-1].Err)
		}
	}
	storm(2)
	w, err := Dial(WatchOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	via := byte(2)
	cpu := func() time.Duration { // this process's, as the machine may be busy
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	for name, read := range map[string]func(){
		"bare": func() {
			for {
				if _, got, err := w.events.receive(false); err != nil || !got {
					break
				}
			}
		},
		"events": func() {
			got := 0
			for drained := false; !drained; {
				var batch []Event
				if batch, drained, err = w.read(true); err != nil {
					b.Fatal(err)
				}
				got += len(batch)
			}
			if got != n {
				b.Fatalf("%d of %d", got, n)
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			var took time.Duration
			for range b.N {
				via ^= 1
				storm(via)
				began := cpu()
				read()
				took += cpu() - began
			}
			b.ReportMetric(float64(took.Nanoseconds())/float64(b.N*n), "ns/event")
		})
	}
}
