package lane

import (
	"net/netip"
	"strings"
	"testing"
)

func match(src, dst string, proto uint8, ports ...uint16) Match {
	m := Match{Src: netip.MustParsePrefix(src), Dst: netip.MustParsePrefix(dst), Proto: proto}
	if len(ports) == 2 {
		m.Sport, m.Dport = ports[0], ports[1]
	}
	return m
}

func TestNamesOfOursAndOfOthers(t *testing.T) {
	for name, want := range map[string]int32{
		"tsolane7": 7, "tsolane99999999": 99999999, "tsolane": 0, "tsolane0": 0, "tsolane-1": 0, "tsolane07": 0,
		"tsolane+7": 0, "tsolane7x": 0, "ifb7": 0, "": 0,
	} {
		if got := nicOf(name); got != want {
			t.Errorf("%q serves the NIC %d, want %d", name, got, want)
		}
	}
	if n := IFBName(99999999); len(n) > 15 {
		t.Errorf("%s has no room in IFNAMSIZ", n)
	}
}

func TestCheckRefusesWhatFlowerCannotSay(t *testing.T) {
	good := match("10.0.0.1/32", "10.0.0.2/32", 50)
	for _, c := range []struct {
		name string
		l    Lane
		want string // empty: accepted
	}{
		{"ESP", Lane{1, "e", []Match{good}}, ""},
		{"ports", Lane{1, "e", []Match{match("0.0.0.0/0", "10.0.0.2/32", 17, 4500, 4500)}}, ""},
		{"no index", Lane{0, "e", []Match{good}}, "index and the name"},
		{"empty", Lane{1, "e", nil}, "no matches"},
		{"repeated", Lane{1, "e", []Match{good, good}}, "sorted"},
		{"unsorted", Lane{1, "e", []Match{match("10.0.0.9/32", "10.0.0.2/32", 50), good}}, "sorted"},
		{"two families", Lane{1, "e", []Match{match("10.0.0.1/32", "fd00::/64", 50)}}, "one family"},
		{"ports of ESP", Lane{1, "e", []Match{match("10.0.0.1/32", "10.0.0.2/32", 50, 1, 1)}}, "no ports"},
		{"not masked", Lane{1, "e", []Match{match("10.0.0.1/24", "10.0.0.2/32", 50)}}, "masked"},
		{"no source", Lane{1, "e", []Match{{Dst: netip.MustParsePrefix("10.0.0.2/32")}}}, "must be prefixes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			switch err := c.l.check(); {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestStateIsOnlyWhatIsExact(t *testing.T) {
	l := Lane{3, "eth0", []Match{match("10.0.0.1/32", "10.0.0.2/32", 50)}}
	s := State{Index: 3, Name: "eth0", IFB: "tsolane3", Matches: l.Matches}
	if !s.Is(l) {
		t.Error("not what it is")
	}
	for name, change := range map[string]func(*State){
		"problem":  func(s *State) { s.Problems = []string{"the ifb is down"} },
		"no ifb":   func(s *State) { s.IFB = "" },
		"renamed":  func(s *State) { s.Name = "eth1" },
		"more":     func(s *State) { s.Matches = append(s.Matches, s.Matches...) },
		"less":     func(s *State) { s.Matches = nil },
		"of other": func(s *State) { s.Index = 4 },
	} {
		o := s
		if change(&o); o.Is(l) {
			t.Errorf("%s: is still the lane", name)
		}
	}
}
