package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tsoagent/agent/netns"
	"tsoagent/agent/verify"
)

// BenchmarkVerifyCost has one stream of TCP over a veth, with `tsoctl verify` looking at it and without, in turns of the same length: how
// much of the throughput is left, how many packets verify could not look at, and what CPU time it takes itself. Once the device takes
// super-packets, and once each segment is one for itself.
//
//	go test ./cmd/tsoctl -run xxx -bench VerifyCost -benchtime 15x
func BenchmarkVerifyCost(b *testing.B) {
	needNamespaces(b)
	if _, err := exec.LookPath("ethtool"); err != nil {
		b.Skip("ethtool is missing")
	}
	tsoctl := filepath.Join(buildCommands(b), "tsoctl")
	left, right := wired(b)
	moved := stream(b, left, right)
	for _, tso := range []string{"on", "off"} {
		b.Run("tso="+tso, func(b *testing.B) {
			if out, err := left.cmd("ethtool", "-K", "nic1", "tx-tcp-segmentation", tso).CombinedOutput(); err != nil {
				b.Fatalf("%v\n%s", err, out)
			}
			var kept, cpu, missed []float64
			var best float64
			for b.Loop() {
				cmd := left.cmd(tsoctl, "verify", "nic1", "--for", "2s", "-o", "json", "--run-dir", filepath.Join(b.TempDir(), "none"))
				start, before := time.Now(), moved.Load()
				out, err := cmd.Output()
				with, took := moved.Load()-before, time.Since(start)
				var r verify.Result
				if bad := json.Unmarshal(out, &r); bad != nil || len(r.Devices) != 1 {
					b.Fatalf("%v, %v: %s", err, bad, out)
				}
				before = moved.Load()
				<-time.After(took)
				without := moved.Load() - before
				kept = append(kept, float64(with)/float64(without))
				best = max(best, float64(without)/took.Seconds())
				cpu = append(cpu, (cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()).Seconds()/took.Seconds())
				seen := uint64(0)
				for _, c := range r.Devices[0].Classes {
					seen += c.Packets
				}
				missed = append(missed, float64(r.Devices[0].Dropped)/float64(r.Devices[0].Dropped+seen))
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(best*8/1e9, "Gbit/s-best-without")
			for name, list := range map[string][]float64{"of-throughput": kept, "CPUs": cpu, "not-looked-at": missed} {
				slices.Sort(list)
				b.ReportMetric(list[len(list)/2], name)
			}
		})
	}
}

// end is one of two network namespaces with a wire between them.
type end struct {
	*netns.Namespace
	path string
}

func (e end) cmd(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + e.path}, args...)...)
}

// wired makes two namespaces that last as long as the benchmark.
func wired(b *testing.B) (left, right end) {
	b.Helper()
	var ends [2]end
	for i := range ends {
		file, err := newNamespace()
		if err != nil {
			b.Skipf("no network namespace: %v", err)
		}
		b.Cleanup(func() { _ = file.Close() })
		ends[i].path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd())
		if ends[i].Namespace, err = netns.Open(ends[i].path); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = ends[i].Close() })
	}
	left, right = ends[0], ends[1]
	there := right.cmd("cat") // a process there, which `ip link` can name
	in, err := there.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := there.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := there.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = errors.Join(in.Close(), there.Wait()) })
	if _, err := fmt.Fprintln(in); err != nil {
		b.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil { // nsenter has become cat
		b.Fatal(err)
	}
	ip(b, left, fmt.Sprintf("link add nic1 type veth peer name nic1 netns %d", there.Process.Pid))
	for i, e := range ends {
		ip(b, e, fmt.Sprintf("addr add 10.1.1.%d/24 dev nic1", i+1))
		ip(b, e, "link set nic1 up")
	}
	return left, right
}

func ip(b *testing.B, e end, line string) {
	b.Helper()
	if out, err := e.cmd(append([]string{"ip"}, strings.Fields(line)...)...).CombinedOutput(); err != nil {
		b.Fatalf("ip %s: %v\n%s", line, err, out)
	}
}

// stream sends as much as goes from left to right, and counts the bytes that have come.
func stream(b *testing.B, left, right end) *atomic.Int64 {
	b.Helper()
	var l net.Listener
	err := right.Do(func() (err error) {
		l, err = new(net.ListenConfig).Listen(b.Context(), "tcp", "10.1.1.2:0")
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	var c net.Conn
	err = left.Do(func() error {
		to, err := net.ResolveTCPAddr("tcp", l.Addr().String())
		if err == nil {
			c, err = net.DialTCP("tcp", nil, to)
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = errors.Join(c.Close(), s.Close(), l.Close()) })
	go func() {
		for buf := make([]byte, 256<<10); ; {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}()
	moved := new(atomic.Int64)
	go func() {
		for buf := make([]byte, 256<<10); ; {
			n, err := s.Read(buf)
			moved.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	return moved
}
