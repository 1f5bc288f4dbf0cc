package bench

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine is where a run took place.
type Machine struct {
	CPUs   int    `json:"cpus"`
	CPU    string `json:"cpu"`
	Memory int64  `json:"memory"` // in bytes
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
}

// ThisMachine describes the one that this runs on.
func ThisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version(), CPU: "processor unknown"}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		m.Memory = int64(s.Totalram) * int64(s.Unit)
	}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := strings.Cut(string(text), "model name\t: "); ok {
			m.CPU, _, _ = strings.Cut(rest, "\n")
		}
	}
	return m
}

// String is the machine in a line.
func (m Machine) String() string {
	return fmt.Sprintf("%d × %s, %s of memory, Linux %s, %s", m.CPUs, m.CPU, mib(m.Memory), m.Kernel, m.Go)
}

func mib(bytes int64) string { return fmt.Sprintf("%d MiB", bytes>>20) }

// seconds is a time in the unit that suits it.
func seconds(s float64) string {
	switch {
	case s == 0:
		return "-"
	case s < 1e-3:
		return fmt.Sprintf("%.0f µs", s*1e6)
	case s < 1:
		return fmt.Sprintf("%.3g ms", s*1e3)
	}
	return fmt.Sprintf("%.3g s", s)
}

// Markdown is the table of a run, with the machine's description.
func (r *Results) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s.\n%d IPv4 routes, %d IPv6 routes, %d output policies", r.Machine, r.Size.Routes4, r.Size.Routes6, r.Size.Policies)
	if r.Scale != 1 {
		fmt.Fprintf(&b, " (%g of the full size)", r.Scale)
	}
	fmt.Fprintf(&b, "; %d rounds, %.0f s in all.\n\n", len(r.Cold[observe].Start.Ours), r.Took)
	b.WriteString("| what | samples | median | p99 | floor, median | floor, p99 | ratio, median | ratio, p99 |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, row := range r.timeRows() {
		if len(row.of.Ours) == 0 {
			continue // of a run that knew nothing of it
		}
		fmt.Fprintf(&b, "| %s | %d | %s | %s | %s | %s | %s | %s |\n", row.what, len(row.of.Ours), seconds(row.of.Ours.Median()), seconds(row.of.Ours.P99()),
			seconds(row.of.Floor.Median()), seconds(row.of.Floor.P99()), ratio(row.of.Median()), ratio(row.of.P99()))
	}
	b.WriteString("\n| memory | resident | peak | proportional |\n| --- | ---: | ---: | ---: |\n")
	for _, row := range r.memoryRows() {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", row.what, mib(row.m.RSS), mib(row.m.Peak), mib(row.m.PSS))
	}
	b.WriteString("\n" + r.sentences())
	return b.String()
}

// Short is the table for who wants to know what to expect: medians alone, with the machine's description.
func (r *Results) Short() string {
	var b strings.Builder
	b.WriteString("| what | time | by that of the floor |\n| --- | ---: | ---: |\n")
	for _, row := range r.timeRows() {
		if len(row.of.Ours) > 0 {
			fmt.Fprintf(&b, "| %s | %s | %s |\n", row.what, seconds(row.of.Ours.Median()), ratio(row.of.Median()))
		}
	}
	fmt.Fprintf(&b, "\nResident when quiet: %s that only observe, %s that enforce. (%s.)\n",
		mib(largest(r.Memory.Quiet[observe]).RSS), mib(largest(r.Memory.Quiet[enforce]).RSS), r.Machine)
	return b.String()
}

func ratio(x float64) string {
	if x == 0 {
		return "-"
	}
	return fmt.Sprintf("%.3g", x)
}

type timeRow struct {
	what string
	of   Ratio
}

func (r *Results) timeRows() []timeRow {
	return []timeRow{
		{"cold start to the first complete plan (`--mode observe`), by `ip route` + `ip xfrm policy`", r.Cold[observe].Start},
		{"cold start with all locks written (`enforce`), by the same", r.Cold[enforce].Start},
		{"cold start on a plain host (`enforce`, empty tables), by the same", r.Plain.Start},
		{"policy event until all is written and read back, by a straight line", r.FullEvent.Done},
		{"the same with empty tables", r.EmptyEvent.Done},
		{"policy event until the clone is seen, by a straight line", r.FullEvent.Written},
		{"the same with empty tables", r.EmptyEvent.Written},
		{"storm: every route replaced once, by a reader that counts", r.Storm.Time},
		{"a covered route of the storm is replaced, until its clone has followed", Ratio{Ours: r.Storm.Moved}},
		{fmt.Sprintf("%d locks installed (`tsoctl resume`), by `ip -batch`", r.Writes.Routes), r.Writes.Install},
		{"the same taken away (`tsoctl pause --restore`), by the same", r.Writes.Remove},
		{"stop (`enforce`): all given back", Ratio{Ours: r.Cold[enforce].Stop}},
	}
}

// sentences are what is no time and no size.
func (r *Results) sentences() string {
	exact := 0
	for _, ok := range r.Storm.Exact {
		if ok {
			exact++
		}
	}
	i := r.Idle
	return fmt.Sprintf("After %d of %d storms the agent's state was exactly the kernel's (%.0f overruns, %d clones that did not follow, %.0f rounds at the median).\n",
		exact, len(r.Storm.Exact), r.Storm.Overruns, r.Storm.Late, r.Storm.Rounds.Median()) +
		fmt.Sprintf("In %.0f idle seconds: %.0f rounds, %.0f looks at TCP keys, %d wake-ups of threads (the Go runtime's among them), %.2f s of CPU.\n",
			i.Seconds, i.Rounds, i.Looks, i.Wakeups, i.CPU) +
		fmt.Sprintf("A storm takes %.1f s of the agent's CPU at the median; %d MiB are resident at the most.\n", r.Storm.CPU.Median(), r.Storm.Peak>>20) +
		fmt.Sprintf("%.0f changes of a route that nothing covered is near led to %.0f rounds, and to %.0f allocations each, which are those of reading them.\n",
			i.Changes, i.EmptyRounds, i.AllocsAChange)
}

type memoryRow struct {
	what string
	m    Memory
}

func (r *Results) memoryRows() (rows []memoryRow) {
	for _, mode := range []string{observe, enforce} {
		rows = append(rows, memoryRow{"`" + mode + "`, when ready", largest(r.Memory.Ready[mode])}, memoryRow{"`" + mode + "`, when quiet", largest(r.Memory.Quiet[mode])})
	}
	return append(rows, memoryRow{"`observe`, when a hundredth of the tables is left", r.Memory.Shrunk}, memoryRow{"`observe`, started on that hundredth", r.Memory.Fresh})
}

// largest is the one with the most resident memory.
func largest(list []Memory) (m Memory) {
	for _, x := range list {
		if x.RSS > m.RSS {
			m = x
		}
	}
	return m
}

// The marks between which the table is, in a page for people.
const (
	tableBegin = "<!-- bench: begin, written by `make bench` -->"
	tableEnd   = "<!-- bench: end -->"
)

// WriteTable replaces what is between the marks in a file.
func (r *Results) WriteTable(file string) error { return Between(file, "bench", r.Markdown()) }

// Between replaces what is between the marks of `make NAME` in a page.
func Between(file, name, text string) error {
	page, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	mark := fmt.Sprintf("<!-- %s: begin, written by `make %[1]s` -->", name)
	begin, end := bytes.Index(page, []byte(mark)), bytes.Index(page, []byte(fmt.Sprintf("<!-- %s: end -->", name)))
	if begin < 0 || end < begin {
		return fmt.Errorf("%s: the marks of `make %s` are missing", file, name)
	}
	var out bytes.Buffer
	out.Write(page[:begin+len(mark)])
	out.WriteString("\n\n" + text + "\n")
	out.Write(page[end:])
	return os.WriteFile(file, out.Bytes(), 0o644)
}
