package sockbpf

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// The roles of the processes that the benchmark starts: its own binary.
const (
	roleVariable = "SOCKBPF_ROLE"
	roleHold     = "hold"
	roleList     = "list"
)

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(roleVariable) {
	case roleHold:
		err = hold(os.Args[1], os.Args[2])
	case roleList:
		err = listAll()
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// connections are in the namespace while the figures are taken; both ends of each are there.
const connections = 100_000

// BenchmarkList compares `ss -tn` with the truth of the same sockets: each is a process of its own, from its start to its end, so ours
// loads its program each time (each-ms is without that). They take turns, and a metric is the median of its turns.
func BenchmarkList(b *testing.B) {
	enterNS(b)
	openIter(b)
	if _, err := exec.LookPath("ss"); err != nil {
		b.Skip("needs iproute2's ss")
	}
	holdConnections(b)
	var ss, ours, each []time.Duration
	var last listing
	rss := 0
	for b.Loop() {
		start := time.Now()
		cmd := exec.Command("ss", "-tn")
		out := &lines{}
		cmd.Stdout = out
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
		ss = append(ss, time.Since(start))

		start = time.Now()
		cmd = exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"="+roleList)
		text, err := cmd.Output()
		if err != nil {
			b.Fatal(err)
		}
		ours = append(ours, time.Since(start))
		if err := json.Unmarshal(text, &last); err != nil {
			b.Fatal(err)
		}
		each = append(each, last.Took)
		rss = max(rss, last.PeakRSS)
		// ss has a line more, and leaves out listeners, of which each holder has one.
		if out.n-1 != last.Established || last.Established != 2*connections {
			b.Fatalf("ss has %d sockets, we have %d, there are %d", out.n-1, last.Established, 2*connections)
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(ss).Seconds()*1000, "ss-ms")
	b.ReportMetric(median(ours).Seconds()*1000, "ours-ms")
	b.ReportMetric(median(each).Seconds()*1000, "each-ms")
	b.ReportMetric(median(ours).Seconds()/median(ss).Seconds(), "ours/ss")
	b.ReportMetric(float64(rss)/1024, "MiB-RSS")
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// lines counts lines.
type lines struct{ n int }

func (l *lines) Write(b []byte) (int, error) {
	l.n += bytes.Count(b, []byte("\n"))
	return len(b), nil
}

// listing is what a process of roleList prints.
type listing struct {
	Established, Offload int
	Took                 time.Duration
	PeakRSS              int // KiB
}

func listAll() error {
	it, err := Open()
	if err != nil {
		return err
	}
	var l listing
	start := time.Now()
	if err := it.Each(func(c sockopt.Conn) bool {
		if c.State == sockopt.Established {
			l.Established++
		}
		if c.Segmentation() == sockopt.SegOffload {
			l.Offload++
		}
		return true
	}); err != nil {
		return err
	}
	l.Took = time.Since(start)
	if err := it.Close(); err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	if l.PeakRSS, err = strconv.Atoi(strings.Fields(after)[0]); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(l)
}

// holdConnections makes the connections, in as many processes as the limit of open files asks for. They end with the benchmark.
func holdConnections(b *testing.B) {
	b.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		b.Fatal(err)
	}
	perProcess := min(25_000, (int(limit.Max)-100)/2)
	for i, left := 0, connections; left > 0; i++ {
		n := min(left, perProcess)
		left -= n
		cmd := exec.Command(os.Args[0], fmt.Sprintf("127.0.1.%d", i+1), strconv.Itoa(n))
		cmd.Env = append(os.Environ(), roleVariable+"="+roleHold)
		cmd.Stderr = os.Stderr
		in, err := cmd.StdinPipe()
		if err != nil {
			b.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			b.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			_ = in.Close()
			_ = cmd.Wait()
		})
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			b.Fatalf("the connections of %s: %q, %v", cmd.Args[1], line, err)
		}
	}
}

// hold makes n connections to addr, says so, and keeps them until its standard input ends.
func hold(addr, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	limit := unix.Rlimit{}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	to := &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4(), Port: 5450}
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(listener, to); err != nil {
		return err
	}
	if err := unix.Listen(listener, 64); err != nil {
		return err
	}
	for range n {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(s, to); err != nil {
			return err
		}
		if _, _, err := unix.Accept(listener); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
