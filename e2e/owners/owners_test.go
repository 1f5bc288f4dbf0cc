package owners

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"
)

// A script is a world that somebody's daemon or script makes, as testdata/worlds has it:
//
//	owner     what it writes, in lines of ip (and of sysctl), before the agent comes
//	policies  in place of those that are there otherwise
//	then      what it changes while the agent runs, a stage in each paragraph
//	locked    flows that have the lock then: their source, their destination, and more of what they are, as in `ip route get`
//	free      flows that have none, and what the plan says about it, if anything
type script map[string][]string

func readScript(t *testing.T, file string) script {
	t.Helper()
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s := script{}
	for _, f := range a.Files {
		s[f.Name] = paragraphs(string(f.Data))
		if !slices.Contains([]string{"owner", "policies", "then", "locked", "free", "kernel"}, f.Name) {
			t.Fatalf("%s: what is %q?", file, f.Name)
		}
	}
	return s
}

// paragraphs are those of a text without comments.
func paragraphs(text string) (out []string) {
	var lines []string
	for line := range strings.Lines(text) {
		if line, _, _ = strings.Cut(line, "#"); strings.TrimSpace(line) != "" || !strings.Contains(text, "#") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	for p := range strings.SplitSeq(strings.Join(lines, "\n"), "\n\n") {
		if p = strings.TrimSpace(p); p != "" {
			out = append(out, p)
		}
	}
	return out
}

func linesOf(paragraphs []string) (out []string) {
	for _, p := range paragraphs {
		out = append(out, strings.Split(p, "\n")...)
	}
	return out
}

// questions is how many packets are asked about at each stage, each for its route and for its way.
const questions = 1500

// TestNamedOwners builds the worlds of owners that have names.
func TestNamedOwners(t *testing.T) {
	bin := need(t)
	files, err := filepath.Glob("testdata/worlds/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no worlds: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			s := readScript(t, file)
			if why := s["kernel"]; why != nil && !inTestKernel {
				t.Skipf("needs %s, which the test kernel has (TestKernelOwners)", why[0])
			}
			t.Parallel()
			s.run(t, bin)
		})
	}
}

func (s script) run(t *testing.T, bin string) {
	before := slices.Concat(linesOf(s["owner"]), linesOf(s["policies"]))
	if s["policies"] == nil {
		before = append(before, linesOf(paragraphs(policies))...)
	}
	l := newLab(t, bin, rand.New(rand.NewPCG(1, 1)), "", before...)
	for _, line := range linesOf(s["then"]) {
		l.talk.read(line)
	}
	l.draw(questions)
	l.compare("before the agent", nil)
	l.start()
	r := l.settle()
	l.compare("with the agent", &r)
	for i, stage := range s["then"] {
		l.change(strings.Split(stage, "\n")...)
		r = l.settle()
		l.compare(fmt.Sprintf("after change %d", i+1), &r)
	}
	for _, flow := range s["locked"] {
		l.flows(flow, 1400, &r)
	}
	for _, flow := range s["free"] {
		l.flows(flow, 0, &r)
	}
	l.must(l.stop(unix.SIGTERM))
	l.compare("after the agent", nil)
	l.same("after the agent")
	l.Logf("%d questions, %d answers with a lock, %d by a clone", l.asked, l.locked, l.cloned)
}

// flows looks for the lock of flows, a line each.
func (l *lab) flows(text string, mtu uint32, r *report) {
	l.Helper()
	for line := range strings.SplitSeq(text, "\n") {
		flow, why, _ := strings.Cut(line, ":  ")
		p := l.flow(flow)
		got, err := l.asks[0].ask(p, false)
		l.must(err)
		if got.mtu != mtu || got.errno != 0 {
			l.Errorf("%s: %s; the lock is to be %d", flow, got, mtu)
		}
		if why != "" && !slices.ContainsFunc(r.Coverages, func(c struct {
			Priority uint32
			Gone     bool
			Src      string
			Notes    []string
		}) bool {
			return strings.Contains(strings.Join(c.Notes, "\n"), why)
		}) {
			l.Errorf("%s: no coverage says %q: %v", flow, why, r.Coverages)
		}
	}
}

// flow is a packet in the words of `ip route get`, its source ahead.
func (l *lab) flow(text string) (p packet) {
	l.Helper()
	f := strings.Fields(text)
	p.src, p.dst = netip.MustParseAddr(f[0]), netip.MustParseAddr(f[1])
	for i := 2; i+1 < len(f); i += 2 {
		var n uint32
		if f[i] == "iif" {
			p.iif = l.ifindex(f[i+1])
			continue
		}
		if _, err := fmt.Sscanf(f[i+1], "%v", &n); err != nil {
			l.Fatal(err)
		}
		switch f[i] {
		case "mark":
			p.mark = n
		case "uid":
			p.uid = n
		case "ipproto":
			p.proto = uint8(n)
		case "dport":
			p.dport = uint16(n)
		default:
			l.Fatalf("what is %q?", f[i])
		}
	}
	return p
}
