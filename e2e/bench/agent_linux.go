package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Agent is a tsoagent that runs in this namespace.
type Agent struct {
	cmd  *exec.Cmd
	dir  string
	gone chan struct{} // closed when it has ended

	// Ready is how long it took from the spawn to READY=1, which tells of the first complete plan.
	Ready time.Duration
}

// metricsAt is where it is scraped. The namespace is this program's own, and so is the port.
const metricsAt = "127.0.0.1:15450"

// config has locks without SAs, as a kernel without ESP takes policies only, and room for a clone for each of them; and what has no cause is
// given back soon, as the samples of policy events wait for that.
const config = "restore_after: 100ms\npresume_mtu: 1400\nmax_clones: 400000\nmetrics: " + metricsAt + "\n"

// longest bounds what is waited for. At full size a start takes seconds.
const longest = 5 * time.Minute

// startAgent starts bin/tsoagent and waits until it says that it is ready. If spawned is not nil it is called beside that.
func startAgent(bin, mode string, spawned func(*Agent)) (*Agent, error) {
	dir, err := os.MkdirTemp("/run", "agent-") // which is this namespace's own (Settle)
	if err != nil {
		return nil, err
	}
	a := &Agent{dir: dir, gone: make(chan struct{})}
	if err := a.start(bin, mode, spawned); err != nil {
		text, _ := os.ReadFile(a.log())
		return nil, errors.Join(fmt.Errorf("tsoagent: %w: %s", err, lastLine(text)), a.Stop())
	}
	return a, nil
}

func (a *Agent) log() string    { return filepath.Join(a.dir, "log") }
func (a *Agent) socket() string { return filepath.Join(a.dir, "tsoagent.sock") }

func (a *Agent) start(bin, mode string, beside func(*Agent)) error {
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(a.dir, "notify")})
	if err != nil {
		return err
	}
	defer ready.Close()
	log, err := os.Create(a.log())
	if err != nil {
		return err
	}
	defer log.Close()
	file := filepath.Join(a.dir, "tsoagent.yaml")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return err
	}
	a.cmd = exec.Command(filepath.Join(bin, "tsoagent"), "run", "--config", file, "--mode", mode, "--run-dir", a.dir, "--state-dir", a.dir)
	a.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(a.dir, "notify"))
	a.cmd.Stdout, a.cmd.Stderr = log, log
	spawned := time.Now()
	if err := a.cmd.Start(); err != nil {
		a.cmd = nil
		return err
	}
	go func() {
		_ = a.cmd.Wait() // Stop says how it ended
		close(a.gone)
		_ = ready.Close() // nothing comes any more
	}()
	if beside != nil {
		go beside(a)
	}
	if err := ready.SetReadDeadline(spawned.Add(longest)); err != nil {
		return err
	}
	for b := make([]byte, 4096); ; {
		n, err := ready.Read(b)
		if err != nil {
			return fmt.Errorf("not ready: %w", err)
		}
		if bytes.Contains(b[:n], []byte("READY=1")) {
			a.Ready = time.Since(spawned)
			return nil
		}
	}
}

// Stop ends the agent, which gives back what it has written.
func (a *Agent) Stop() error {
	defer os.RemoveAll(a.dir)
	if a.cmd == nil {
		return nil
	}
	_ = a.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-a.gone:
	case <-time.After(longest):
		_ = a.cmd.Process.Kill()
		<-a.gone
		return fmt.Errorf("tsoagent did not end within %v of SIGTERM", longest)
	}
	if !a.cmd.ProcessState.Success() {
		text, _ := os.ReadFile(a.log())
		return fmt.Errorf("tsoagent: %v: %s", a.cmd.ProcessState, lastLine(text))
	}
	return nil
}

// freeze has the agent not run, and thaw run again: a floor is not measured beside it.
func (a *Agent) freeze() error { return a.cmd.Process.Signal(syscall.SIGSTOP) }
func (a *Agent) thaw() error   { return a.cmd.Process.Signal(syscall.SIGCONT) }

func lastLine(text []byte) []byte {
	text = bytes.TrimSpace(text)
	return text[bytes.LastIndexByte(text, '\n')+1:]
}

// Memory is what a process holds, in bytes.
type Memory struct {
	RSS  int64 `json:"rss"`
	Peak int64 `json:"peak"`
	PSS  int64 `json:"pss"`
}

// Memory is the agent's now.
func (a *Agent) Memory() (m Memory, err error) {
	for file, of := range map[string]map[string]*int64{
		"status": {"VmRSS": &m.RSS, "VmHWM": &m.Peak}, "smaps_rollup": {"Pss": &m.PSS},
	} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", a.cmd.Process.Pid, file))
		if err != nil {
			return m, err
		}
		for line := range strings.Lines(string(text)) {
			name, rest, _ := strings.Cut(line, ":")
			if into := of[name]; into != nil {
				kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
				if err != nil {
					return m, err
				}
				*into = kib << 10
			}
		}
	}
	return m, nil
}

// cpu is the processor time that the agent has used, to the tick of 10 ms.
func (a *Agent) cpu() (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// Behind the name, which may hold anything: utime and stime are fields 14 and 15 of proc_pid_stat(5).
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * tick, errors.Join(err1, err2)
}

// tick is the unit of times in /proc (USER_HZ).
const tick = 10 * time.Millisecond

// runnable reports whether a thread of the agent runs, or would if the machine let it.
func (a *Agent) runnable() bool {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", a.cmd.Process.Pid))
	if err != nil {
		return false
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		// The state is behind the name.
		if at := bytes.LastIndexByte(text, ')'); err == nil && at >= 0 && bytes.HasPrefix(text[at:], []byte(") R")) {
			return true
		}
	}
	return false
}

// quiet waits until the agent has used no processor time worth mentioning, nor waited for any, for as long as that, and returns when it was
// busy last. It is asked nothing meanwhile: what looks would be seen.
func (a *Agent) quiet(long time.Duration) (time.Time, error) {
	const look = 20 * time.Millisecond
	busy, end := time.Now(), time.Now().Add(longest)
	before, err := a.cpu()
	for t := time.NewTicker(look); err == nil; {
		now := <-t.C
		var used time.Duration
		used, err = a.cpu()
		// A tick now and then is the runtime's own, giving memory back.
		if used-before > tick || a.runnable() {
			busy, before = now, used
		}
		switch {
		case now.Sub(busy) >= long:
			t.Stop()
			return busy, err
		case now.After(end):
			return busy, fmt.Errorf("tsoagent was busy for %v", longest)
		}
	}
	return busy, err
}

// wakeups counts how often threads of the agent gave up the processor by themselves.
func (a *Agent) wakeups() (n int64, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", a.cmd.Process.Pid))
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		if _, rest, ok := strings.Cut(string(text), "\nvoluntary_ctxt_switches:"); ok {
			k, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				return 0, err
			}
			n += k
		}
	}
	return n, err
}

// metrics are the agent's, by their names with labels.
func (a *Agent) metrics() (map[string]float64, error) {
	body, err := get(http.DefaultTransport, "http://"+metricsAt+"/metrics")
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for lines := bufio.NewScanner(bytes.NewReader(body)); lines.Scan(); {
		line := lines.Text()
		if at := strings.LastIndexByte(line, ' '); at > 0 && line[0] != '#' {
			if out[line[:at]], err = strconv.ParseFloat(line[at+1:], 64); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// control asks the control socket.
func (a *Agent) control(path string) ([]byte, error) {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", a.socket())
	}}
	defer tr.CloseIdleConnections()
	return get(tr, "http://tsoagent"+path)
}

func get(tr http.RoundTripper, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: tr, Timeout: longest}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, lastLine(body))
	}
	return body, err
}

// mallocs is how many objects the agent has allocated since its start.
func (a *Agent) mallocs() (float64, error) {
	body, err := a.control("/debug/pprof/heap?debug=1")
	if err != nil {
		return 0, err
	}
	if _, rest, ok := strings.Cut(string(body), "\n# Mallocs = "); ok {
		number, _, _ := strings.Cut(rest, "\n")
		return strconv.ParseFloat(number, 64)
	}
	return 0, errors.New("the heap profile does not count allocations")
}
