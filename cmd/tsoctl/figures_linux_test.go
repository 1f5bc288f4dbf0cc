package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/client"
)

// holdVariable makes of this binary a process that holds connections: "ADDRESS COUNT".
const holdVariable = "TSOCTL_TEST_HOLD"

// sockets are in the namespace while the figures are taken: both ends of each connection.
const sockets = 100_000

// BenchmarkFlows compares `ss -tn` with `tsoctl flows` on the same sockets, with an agent and without. They
// take turns; each figure is the median of its turns, and the resident memory the most that there was.
//
//	go test ./cmd/tsoctl -run xxx -bench Flows -benchtime 15x
func BenchmarkFlows(b *testing.B) {
	needNamespaces(b)
	if _, err := exec.LookPath("ss"); err != nil {
		b.Skip("ss is missing (package iproute2)")
	}
	bin := buildCommands(b)
	ns, err := newNamespace()
	if err != nil {
		b.Skipf("no network namespace: %v", err)
	}
	b.Cleanup(func() { _ = ns.Close() })
	in := func(args ...string) *exec.Cmd {
		cmd := exec.Command("nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), ns.Fd())}, args...)...)
		cmd.Stderr = os.Stderr
		return cmd
	}
	// An MTU of its own: over lo, no two segments would fit a super-packet.
	if err := errors.Join(in("ip", "link", "set", "lo", "up").Run(), in("ip", "link", "set", "lo", "mtu", "1500").Run()); err != nil {
		b.Fatal(err)
	}
	holdSockets(b, in)
	dir := b.TempDir()
	quiet := filepath.Join(dir, "agent.yaml")
	if err := os.WriteFile(quiet, []byte("metrics: off\n"), 0o600); err != nil {
		b.Fatal(err)
	}
	daemon := startAgent(b, in(filepath.Join(bin, "tsoagent"), "run", "--config", quiet, "--run-dir", filepath.Join(dir, "run")), filepath.Join(dir, "run"))
	tsoctl := filepath.Join(bin, "tsoctl")
	took, peak := map[string][]time.Duration{}, map[string]int64{}
	for b.Loop() {
		for name, args := range map[string][]string{
			"ss": {"ss", "-tn"}, "agent": {tsoctl, "flows", "--run-dir", filepath.Join(dir, "run")}, "alone": {tsoctl, "flows", "--run-dir", filepath.Join(dir, "none")},
		} {
			cmd := in(args...)
			var out lineCounter
			cmd.Stdout = &out
			start := time.Now()
			if err := cmd.Run(); err != nil {
				b.Fatalf("%v: %v", args, err)
			}
			took[name] = append(took[name], time.Since(start))
			peak[name] = max(peak[name], cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
			if out.n < sockets {
				b.Fatalf("%v: %d lines for %d sockets", args, out.n, sockets)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
	for name, d := range took {
		b.ReportMetric(middle(d).Seconds()*1000, name+"-ms")
	}
	b.ReportMetric(middle(took["agent"]).Seconds()/middle(took["ss"]).Seconds(), "agent/ss")
	b.ReportMetric(middle(took["alone"]).Seconds()/middle(took["ss"]).Seconds(), "alone/ss")
	b.ReportMetric(float64(peak["alone"])/1024, "alone-MiB")
	b.ReportMetric(float64(peak["agent"])/1024, "tsoctl-MiB")
	b.ReportMetric(float64(peakOf(b, daemon))/1024, "agent-MiB")
}

func middle(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// lineCounter counts lines.
type lineCounter struct{ n int }

// Write counts those of b.
func (l *lineCounter) Write(b []byte) (int, error) {
	l.n += bytes.Count(b, []byte("\n"))
	return len(b), nil
}

// startAgent starts one that ends with the benchmark, and waits until it answers.
func startAgent(b *testing.B, cmd *exec.Cmd, dir string) (pid int) {
	b.Helper()
	cmd.Stderr = nil
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()) })
	c := client.New(dir)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := c.Report(b.Context()); err == nil {
			return cmd.Process.Pid // nsenter has become the agent
		} else if time.Now().After(deadline) {
			b.Fatal(err)
		}
	}
}

// peakOf is the most memory that a process had, in KiB (VmHWM, proc(5)).
func peakOf(b *testing.B, pid int) int {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	n, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// holdSockets opens the connections, in as many processes as the limit of open files asks for. They end
// with the benchmark.
func holdSockets(b *testing.B, in func(...string) *exec.Cmd) {
	b.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		b.Fatal(err)
	}
	most := min(10_000, (int(limit.Max)-100)/2)
	for i, left := 1, sockets/2; left > 0; i++ {
		n := min(left, most)
		left -= n
		cmd := in(os.Args[0])
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=127.0.1.%d %d", holdVariable, i, n))
		stdin, err := cmd.StdinPipe()
		if err != nil {
			b.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			b.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = errors.Join(stdin.Close(), cmd.Wait()) })
		if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
			b.Fatalf("connections to 127.0.1.%d: %q, %v", i, line, err)
		}
	}
}

// hold opens connections, says so, and keeps them until its standard input ends.
func hold(role string) error {
	addr, count, _ := strings.Cut(role, " ")
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	cfg, d := net.ListenConfig{}, net.Dialer{}
	cfg.SetMultipathTCP(false) // which would make two sockets of each
	d.SetMultipathTCP(false)
	l, err := cfg.Listen(context.Background(), "tcp", addr+":5450")
	if err != nil {
		return err
	}
	keep := make([]net.Conn, 0, 2*n)
	for range n {
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			return err
		}
		s, err := l.Accept()
		if err != nil {
			return err
		}
		keep = append(keep, c, s)
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	for _, c := range keep {
		_ = c.Close()
	}
	return err
}
