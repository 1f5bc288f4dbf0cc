package window

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A scene is what becomes of the agent when the route below its clone moves.
type scene struct {
	name  string
	storm bool
	kill  bool
	bare  bool // without a guard: it was killed ahead of the agent
	// after is what who waits for the agent does when it was killed, nil for nothing.
	after func(*lab) error
	// stays says that nobody moves the packets in the end but us.
	stays bool
}

func scenes() []scene {
	stale := func(l *lab) error { return l.tsoctl("restore", "--stale") }
	return []scene{
		{name: "alive, quiet"},
		{name: "alive, in a storm", storm: true},
		{name: "killed; guard alone", kill: true, after: func(*lab) error { return nil }},
		{name: "killed; guard, ExecStopPost", kill: true, after: stale},
		{name: "killed; guard, started again", kill: true},
		{name: "killed; ExecStopPost", kill: true, bare: true, after: stale},
		{name: "killed; started again", kill: true, bare: true},
		{name: "killed; nobody", kill: true, bare: true, after: func(*lab) error { return nil }, stays: true},
	}
}

// TestStaleWindow measures for how long packets go the old way. Times are told and never held to anything: what fails is a packet that goes the
// wrong way in the end. TSOAGENT_WINDOW is how often each is done, TSOAGENT_WINDOW_ROUTES how many other routes there are.
func TestStaleWindow(t *testing.T) {
	l := newLab(t)
	n := l.number("TSOAGENT_WINDOW", 2)
	for i := range l.number("TSOAGENT_WINDOW_ROUTES", 0) {
		r := l.route("20.0.0.0/28", 0)
		r.Dst.IP = net.IPv4(byte(20+i>>20), byte(i>>12), byte(i>>4), byte(i<<4))
		l.must(l.owner.RouteAdd(r))
	}
	var table strings.Builder
	fmt.Fprintf(&table, "%-29s %-9s %-6s %10s %10s %10s %12s\n", "", "what", "family", "median", "largest", "runs", "packets late")
	for _, s := range scenes() {
		t.Run(s.name, func(t *testing.T) {
			outer := l.TB
			l.TB = t
			defer func() { l.TB = outer }()
			if _, err := os.Stat(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", os.Getpid())); err != nil && s.bare {
				t.Skipf("needs a kernel that lists children (CONFIG_PROC_CHILDREN): %v", err)
			}
			for _, specific := range []bool{false, true} {
				var all [2][]sight
				for range n {
					for f, sights := range l.try(s, specific) {
						all[f] = append(all[f], sights...)
					}
				}
				for f, family := range []string{"IPv4", "IPv6"} {
					row(&table, s.name, map[bool]string{false: "moves", true: "specific"}[specific], family, all[f])
				}
			}
		})
	}
	t.Log("\n" + table.String())
}

// number is that of a variable of the environment.
func (l *lab) number(name string, otherwise int) int {
	l.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	l.must(err)
	return n
}

func row(w *strings.Builder, name, what, family string, all []sight) {
	if len(all) == 0 {
		return
	}
	slices.SortFunc(all, func(a, b sight) int { return int(a.window - b.window) })
	late := 0
	for _, s := range all {
		late += s.stale
	}
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }
	fmt.Fprintf(w, "%-29s %-9s %-6s %10s %10s %10d %12d\n", name, what, family, ms(all[len(all)/2].window), ms(all[len(all)-1].window), len(all), late)
}

// try moves a route below a clone once, and says what became of each family's packets.
func (l *lab) try(s scene, specific bool) (out [2][]sight) {
	l.Helper()
	var a, again *agent
	restarted := make(chan struct{})
	a = l.start(nil)
	defer func() { // a test that fails, too, leaves none
		for _, a := range []*agent{a, again} {
			if a != nil {
				_ = a.cmd.Process.Kill()
			}
		}
	}()
	if s.kill {
		a.then = func() {
			defer close(restarted)
			if s.after == nil {
				again = l.start(nil)
			} else if err := s.after(l); err != nil {
				l.Error(err)
			}
		}
	}
	calm := func() {}
	if s.storm {
		calm = l.storm()
	}
	tr := start(l.far)
	concerned := func(f int) bool { return flows[f].specific || !specific }
	within(l, "packets arrive", func() bool {
		for f := range flows {
			if concerned(f) && tr.last(f, 0) != l.way {
				return false
			}
		}
		return true
	})
	if s.bare {
		l.must(l.killGuard(a))
	}
	if s.kill {
		l.must(a.cmd.Process.Kill())
	}
	began := tr.now()
	way := l.move(specific)
	if s.kill {
		<-restarted
	}
	arrive := func(way int) {
		l.Helper()
		after := tr.now()
		within(l, fmt.Sprintf("all packets go by nic%d", way), func() bool {
			for f := range flows {
				if concerned(f) && tr.last(f, after) != way {
					return false
				}
			}
			return true
		})
	}
	if s.stays { // the limit that the documents name: they go on by the clone
		arrive(1 - way)
		l.must(l.tsoctl("restore", "--stale"))
	}
	if s.storm {
		within(l, "packets go the new way", func() bool { return tr.last(1, began) == way })
	}
	arrive(way)
	calm()
	arrive(way)
	tr.end(l)
	for f, flow := range flows {
		if s.stays {
			break // it is as long as we like
		}
		if s := tr.since(f, began, way); concerned(f) {
			family := 0
			if strings.Contains(flow.dst, ":") {
				family = 1
			}
			out[family] = append(out[family], s)
		}
	}
	l.back()
	for _, a := range []*agent{a, again} {
		if a != nil {
			l.stop(a)
		}
	}
	if !l.bare() {
		l.must(l.tsoctl("restore", "--stale"))
	}
	return out
}
