package churn

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// watched is an agent whose use of the machine is written down.
type watched struct {
	*testing.T
	bin, socket, log string
	cmd              *exec.Cmd
	series           series
	runtimes         []string // what the runtime says of its memory, with the first sample and the newest one
}

// What is counted, in the order of a sample. Memory is in KiB, and of the agent's own process after a garbage collection: what lives in the heap,
// and what the kernel counts for it without what is in files (RssAnon). Descriptors, threads and processes are those of its guard too.
const (
	heap = iota
	rss
	goroutines
	fds
	threads
	processes
	mounts
	kinds
)

var kindNames = [kinds]string{"heap", "rss", "goroutines", "fds", "threads", "processes", "mounts"}

type (
	sample [kinds]int
	series []sample
)

// sample looks at an agent that rests.
func (a *watched) sample() {
	a.Helper()
	var s sample
	err := errors.Join(a.profiled(&s), a.counted(&s))
	if err != nil {
		a.Fatal(err)
	}
	a.series = append(a.series, s)
}

// profiled is what the runtime knows. Twice: what is only finalized in the first collection is free after the second.
func (a *watched) profiled(s *sample) error {
	var text []byte
	var err error
	for range 2 {
		if text, err = a.get("/debug/pprof/heap?gc=1&debug=1", "unix", a.socket); err != nil {
			return err
		}
	}
	n, err := after(string(text), "\n# HeapAlloc = ")
	if err != nil {
		return err
	}
	s[heap] = n >> 10
	if _, of, ok := strings.Cut(string(text), "\n# runtime.MemStats\n"); ok {
		a.runtimes = append(a.runtimes[:min(1, len(a.runtimes))], memoryOf(of))
	}
	if text, err = a.get("/debug/pprof/goroutine?debug=1", "unix", a.socket); err == nil {
		s[goroutines], err = after(string(text), "goroutine profile: total ")
	}
	return err
}

// counted is what the kernel knows.
func (a *watched) counted(s *sample) error {
	dir := fmt.Sprintf("/proc/%d", a.cmd.Process.Pid)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return err
	}
	if s[rss], err = after(string(status), "\nRssAnon:"); err != nil {
		return err
	}
	mountinfo, err := os.ReadFile(dir + "/mountinfo")
	if err != nil {
		return err
	}
	s[mounts] = strings.Count(string(mountinfo), "\n")
	for _, dir := range append(childrenOf(dir), dir) {
		s[processes]++
		for kind, sub := range map[int]string{fds: "fd", threads: "task"} {
			entries, err := os.ReadDir(filepath.Join(dir, sub))
			if err != nil {
				return err
			}
			s[kind] += len(entries)
		}
	}
	return nil
}

// memoryOf is what the runtime has from the kernel, by what it is for, in bytes: where resident memory goes that the heap doesn't have.
func memoryOf(stats string) string {
	var kept []string
	for line := range strings.Lines(stats) {
		switch word, _, _ := strings.Cut(strings.TrimPrefix(line, "# "), " "); word {
		case "Sys", "HeapSys", "HeapIdle", "HeapInuse", "HeapReleased", "Stack", "MSpan", "MCache", "BuckHashSys", "GCSys", "OtherSys":
			kept = append(kept, strings.TrimSpace(strings.TrimPrefix(line, "# ")))
		}
	}
	return strings.Join(kept, ", ")
}

func childrenOf(dir string) (dirs []string) {
	lists, _ := filepath.Glob(dir + "/task/*/children")
	for _, list := range lists {
		text, _ := os.ReadFile(list) // a thread that ended has none
		for _, pid := range strings.Fields(string(text)) {
			dirs = append(dirs, "/proc/"+pid)
		}
	}
	return dirs
}

// after is the number behind a word.
func after(text, word string) (int, error) {
	_, rest, ok := strings.Cut(text, word)
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return 0, fmt.Errorf("no %q in what was read", word)
	}
	return strconv.Atoi(fields[0])
}

func fetch(c *http.Client, url string) ([]byte, error) {
	resp, err := c.Get(url)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, body)
	}
	return body, err
}

// margin is how much more than in the first third a kind may be in the last third, from the median of the first third and its spread (from its
// least to its most).
func margin(kind, median, spread int) int {
	switch kind {
	case heap:
		// What a collection leaves differs by buffers that are being used, and by maps, which keep the size that they once had.
		return spread + median/20
	case rss:
		// The runtime gives pages back when it comes to it: up to as much as the heap has in use is free and still there (GOGC).
		return spread + median/4
	case goroutines, fds:
		return 2 // of a connection whose end the agent has not yet read
	case threads:
		// The runtime never ends a thread. It has one for each goroutine that was in a system call at the same time, for which the chance to
		// see more of them at once gets smaller and smaller.
		return max(4, median/4)
	}
	return 0
}

// grown says what has grown from the first third to the last one.
func (s series) grown() (said []string) {
	third := len(s) / 3
	for kind := range kinds {
		first, last := s[:third].of(kind), s[len(s)-third:].of(kind)
		was, is := first[third/2], last[third/2]
		if m := margin(kind, was, first[third-1]-first[0]); is > was+m {
			said = append(said, fmt.Sprintf("%s: %d in the first third, %d in the last one, where %d more were to be expected at most", kindNames[kind], was, is, m))
		}
	}
	return said
}

// of is one kind's values, in order.
func (s series) of(kind int) (values []int) {
	for _, one := range s {
		values = append(values, one[kind])
	}
	slices.Sort(values)
	return values
}

// String is a table: thirty rows at most, each the first sample of as many rounds.
func (s series) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%6s", "round")
	for _, name := range kindNames {
		fmt.Fprintf(&b, " %10s", name)
	}
	step := max(1, (len(s)+29)/30)
	for i := 0; i < len(s); i += step {
		fmt.Fprintf(&b, "\n%6d", i)
		for _, v := range s[i] {
			fmt.Fprintf(&b, " %10d", v)
		}
	}
	return b.String()
}
