package lane

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKernelCost measures what a covered flow and its plain neighbour on the same NIC send with
// the NIC left alone, with a lane, and with TSO off for everybody, each alone and both together.
// Times are never judged; what is judged is that both flow in each setting. For figures:
//
//	go test ./e2e -run '^$' -bench Lane
//
// Both ends and the ciphers share the test kernel's one processor, and
// the rounds of the settings alternate, so only the ratios within one run mean something.
func TestKernelCost(t *testing.T) {
	far := inTestKernel(t)
	secure(t, far)
	c := dial(t)
	nic := Lane{Index: indexOf(t, "nic"), Name: "nic"}
	esp := []Match{match("192.0.2.1/32", "192.0.2.2/32", 50)}
	clear := []Match{match("192.0.2.1/32", "192.0.2.2/32", 6)}
	lane := func(m []Match) func() { return func() { nic.Matches = m; ensure(t, c, nic) } }
	settings := []setting{
		{"keep", func() {}, func() {}},
		{"lane", lane(esp), func() { remove(t, c, nic) }},
		{"off", func() { run(t, "ethtool -K nic tso off") }, func() { run(t, "ethtool -K nic tso on") }},
		{"plain in the lane", lane(clear), func() { remove(t, c, nic) }},
	}
	const covered, plain = "10.3.0.2", "192.0.2.2"
	rates := map[string][]float64{}
	for range *costRounds {
		for _, s := range settings {
			s.set()
			note := func(what string, r []float64) {
				for i, v := range r {
					k := fmt.Sprintf("%s/%s/%d", s.name, what, i)
					rates[k] = append(rates[k], v)
				}
			}
			note("covered", send(t, far, *costTime, covered))
			note("plain", send(t, far, *costTime, plain))
			note("both", send(t, far, *costTime, covered, plain))
			s.end()
		}
	}
	t.Log("\n" + costTable(settings, rates))
}

var (
	costRounds = flag.Int("lane.rounds", 1, "rounds of TestKernelCost")
	costTime   = flag.Duration("lane.time", 100*time.Millisecond, "how long TestKernelCost sends each time")
)

// costTable has the best rates of flows that were alone, since whatever else the host does only
// makes them smaller, and the medians of those that shared the NIC.
func costTable(settings []setting, rates map[string][]float64) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d rounds of %v: Mbit/s (of keep in the same run); the best alone, the median together\n", *costRounds, *costTime)
	fmt.Fprintf(&b, "%-18s %18s %18s %18s %18s\n", "", "covered alone", "plain alone", "covered together", "plain together")
	for _, s := range settings {
		fmt.Fprintf(&b, "%-18s", s.name)
		for i, what := range []string{"covered/0", "plain/0", "both/0", "both/1"} {
			pick := slices.Max[[]float64]
			if i > 1 {
				pick = median
			}
			v, keep := pick(rates[s.name+"/"+what]), pick(rates["keep/"+what])
			fmt.Fprintf(&b, " %10.0f (%4.0f%%)", v, 100*v/keep)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// setting is one way to treat the NIC.
type setting struct {
	name     string
	set, end func()
}

func median(l []float64) float64 {
	l = slices.Sorted(slices.Values(l))
	return l[len(l)/2]
}

// secure gives both namespaces an ESP tunnel (AES-GCM) between 10.9.0.1 and 10.3.0.2.
func secure(t *testing.T, far *os.File) {
	t.Helper()
	host := func(mine, theirs, via, other string) {
		const state = "xfrm state add src %s dst %s proto esp spi 0x10%d reqid 1 mode tunnel aead rfc4106(gcm(aes)) 0x0102030405060708090a0b0c0d0e0f1011121314 128"
		const policy = "xfrm policy add src %s dst %s dir %s tmpl src %s dst %s proto esp reqid 1 mode tunnel"
		batch(t, "addr add "+mine+"/32 dev lo", "route add "+theirs+" via "+via+" src "+mine,
			fmt.Sprintf(state, "192.0.2.1", "192.0.2.2", 1), fmt.Sprintf(state, "192.0.2.2", "192.0.2.1", 2),
			fmt.Sprintf(policy, mine, theirs, "out", other, via), fmt.Sprintf(policy, theirs, mine, "in", via, other))
	}
	host("10.9.0.1", "10.3.0.2", "192.0.2.2", "192.0.2.1")
	run(t, "ip link set nic mtu 1500")
	within(t, far, func() {
		host("10.3.0.2", "10.9.0.1", "192.0.2.1", "192.0.2.2")
		run(t, "ip link set peer mtu 1500")
	})
}

// leastBytes is what must have arrived before a time is taken.
const leastBytes = 1 << 20

// send sends to these addresses at once for a while, as fast as it goes, and returns how much of
// it arrived, in Mbit/s.
func send(t *testing.T, far *os.File, d time.Duration, addrs ...string) []float64 {
	t.Helper()
	var wg sync.WaitGroup
	var over atomic.Bool
	got := make([]*atomic.Int64, len(addrs))
	for i := range got {
		got[i] = new(atomic.Int64)
	}
	var senders []int
	for i, addr := range addrs {
		in, out := connect(t, far, addr)
		senders = append(senders, out)
		wg.Go(func() {
			defer unix.Close(in)
			buf := make([]byte, 1<<20)
			for {
				n, err := unix.Read(in, buf)
				if n <= 0 || err != nil {
					return
				}
				if !over.Load() {
					got[i].Add(int64(n))
				}
			}
		})
	}
	began := time.Now()
	for _, fd := range senders {
		wg.Go(func() {
			defer unix.Close(fd)
			buf := make([]byte, 256<<10)
			for !over.Load() {
				if _, err := unix.Write(fd, buf); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	// However slow the host is, there is something to compare.
	var took time.Duration
	for took < d || slices.ContainsFunc(got, func(n *atomic.Int64) bool { return n.Load() < leastBytes }) {
		time.Sleep(time.Millisecond)
		took = time.Since(began)
	}
	over.Store(true)
	wg.Wait()
	out := make([]float64, len(addrs))
	for i := range addrs {
		out[i] = float64(got[i].Load()) * 8 / 1e6 / took.Seconds()
	}
	return out
}

// connect opens a connection to an address of the other namespace, and returns its two ends.
func connect(t *testing.T, far *os.File, addr string) (in, out int) {
	t.Helper()
	l := -1
	within(t, far, func() {
		var err error
		l, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Bind(l, &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4()})
		}
		if err == nil {
			err = unix.Listen(l, 1)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	defer unix.Close(l)
	sa, err := unix.Getsockname(l)
	if err != nil {
		t.Fatal(err)
	}
	if out, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
		err = unix.Connect(out, sa)
	}
	if err == nil {
		in, _, err = unix.Accept4(l, unix.SOCK_CLOEXEC)
	}
	if err != nil {
		t.Fatal(err)
	}
	return in, out
}
