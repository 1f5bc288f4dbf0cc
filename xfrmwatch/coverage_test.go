package xfrmwatch

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func gcm(src, dst string, mode Mode, spi SPI, change ...func(*SA)) *SA {
	s := &SA{Src: addr(src), Dst: addr(dst), SPI: spi, Proto: ESP, Family: familyOf(addr(dst)), Mode: mode,
		Reqid: 1, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}, AddTime: 100}
	for _, f := range change {
		f(s)
	}
	return s.keyed()
}

func tmpl(src, dst string, mode Mode) Template {
	return Template{Src: addr(src), Dst: addr(dst), Family: familyOf(addr(dst)), Proto: ESP, Mode: mode, Reqid: 1}
}

func outPolicy(src, dst string, templates ...Template) *Policy {
	return &Policy{Index: 9, Dir: Out, Selector: selector(src, dst), Templates: templates}
}

func loaded(policies []*Policy, sas []*SA) *DB {
	db := NewDB()
	db.Apply(ResyncBegin{})
	for _, p := range policies {
		db.Apply(PolicySet{Policy: p})
	}
	for _, s := range sas {
		db.Apply(SASet{SA: s})
	}
	db.Apply(ResyncEnd{})
	return db
}

func spis(c Coverage) (got []SPI) {
	for _, step := range c.Steps {
		for _, sa := range step.SAs {
			got = append(got, sa.SPI)
		}
	}
	return got
}

// Each row is one thing by which xfrm_state_find tells SAs apart.
func TestSAChoice(t *testing.T) {
	const a, b, c = "192.0.2.1", "192.0.2.2", "192.0.2.3"
	with := func(f func(*SA)) *SA { return gcm(a, b, Tunnel, 2, f) }
	good := gcm(a, b, Tunnel, 1)
	policy := func(f func(*Policy)) *Policy {
		p := outPolicy("10.1.0.0/16", "10.2.0.0/16", tmpl(a, b, Tunnel))
		f(p)
		return p
	}
	same := func(*Policy) {}
	for _, tt := range []struct {
		name   string
		policy func(*Policy)
		sas    []*SA
		want   []SPI
	}{
		{"the one", same, []*SA{good}, []SPI{1}},
		{"none", same, nil, nil},
		{"other destination", same, []*SA{good, gcm(a, c, Tunnel, 2)}, []SPI{1}},
		{"other source", same, []*SA{good, gcm(c, b, Tunnel, 2)}, []SPI{1}},
		{"any source serves last", same, []*SA{gcm("0.0.0.0", b, Tunnel, 2)}, []SPI{2}},
		{"a source beats any source", same, []*SA{good, gcm("0.0.0.0", b, Tunnel, 2)}, []SPI{1}},
		{"other protocol", same, []*SA{good, with(func(s *SA) { s.Proto = AH })}, []SPI{1}},
		{"other mode", same, []*SA{good, gcm(a, b, Transport, 2)}, []SPI{1}},
		{"other reqid", same, []*SA{good, with(func(s *SA) { s.Reqid = 2 })}, []SPI{1}},
		{"other if_id", same, []*SA{good, with(func(s *SA) { s.IfID = 2 })}, []SPI{1}},
		{"the policy's if_id", func(p *Policy) { p.IfID = 2 }, []*SA{good, with(func(s *SA) { s.IfID = 2 })}, []SPI{2}},
		{"a mark that the policy lacks", same, []*SA{good, with(func(s *SA) { s.Mark = Mark{1, 1} })}, []SPI{1}},
		{"the policy's mark", func(p *Policy) { p.Mark = Mark{1, 3} },
			[]*SA{with(func(s *SA) { s.Mark = Mark{1, 1} }), with(func(s *SA) { s.SPI, s.Mark = 3, Mark{2, 2} })}, []SPI{2}},
		{"the template's spi", func(p *Policy) { p.Templates[0].SPI = 2 },
			[]*SA{good, with(func(s *SA) { s.AddTime = 1 })}, []SPI{2}},
		{"for receiving only", same, []*SA{good, with(func(s *SA) { s.Flags = 8 })}, []SPI{1}},
		{"of one CPU each", same, []*SA{with(func(s *SA) { s.CPU = 1 }), with(func(s *SA) { s.SPI, s.Key.SPI, s.CPU = 7, 7, 2 })}, []SPI{7, 2}},
		{"direction in", same, []*SA{good, with(func(s *SA) { s.SADir = 1 })}, []SPI{1}},
		{"direction out", same, []*SA{with(func(s *SA) { s.SADir = 2 })}, []SPI{2}},
		{"a selector that misses", same, []*SA{good, with(func(s *SA) {
			s.HasSelector, s.Selector = true, selector("0.0.0.0/0", "10.3.0.0/16")
		})}, []SPI{1}},
		{"a selector of the other family", same, []*SA{good, with(func(s *SA) {
			s.HasSelector, s.Selector = true, anySelector(IPv6)
		})}, []SPI{1}},
		{"larval", same, []*SA{good, with(func(s *SA) { s.Larval, s.AEAD = true, Algorithm{} })}, []SPI{1}},
		{"packet offload elsewhere", same, []*SA{good, with(func(s *SA) { s.OffloadDev, s.OffloadFlags = 3, 4 })}, []SPI{1}},
		{"packet offload", func(p *Policy) { p.OffloadDev, p.OffloadFlag = 3, 4 },
			[]*SA{good, with(func(s *SA) { s.OffloadDev, s.OffloadFlags = 3, 4 })}, []SPI{2}},
		{"crypto offload", same, []*SA{with(func(s *SA) { s.OffloadDev = 3 })}, []SPI{2}},
		{"the youngest first", same, []*SA{good, with(func(s *SA) { s.AddTime = 101 })}, []SPI{2, 1}},
		{"a dying one last", same, []*SA{good, with(func(s *SA) { s.AddTime, s.Dying = 101, true })}, []SPI{1, 2}},
		{"of one second the later", same, []*SA{good, with(func(*SA) {})}, []SPI{2, 1}},
		{"any source of the template", func(p *Policy) { p.Templates[0].Src = addr("0.0.0.0") },
			[]*SA{good, gcm(c, b, Tunnel, 2)}, []SPI{2, 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policy(tt.policy)
			cover := loaded([]*Policy{p}, tt.sas).Coverage(p)
			if len(cover) != 1 {
				t.Fatalf("%d coverages, want 1", len(cover))
			}
			if got := spis(cover[0]); !slices.Equal(got, tt.want) || cover[0].Larval != (tt.want == nil) {
				t.Errorf("SPIs %v, larval %v, want %v", got, cover[0].Larval, tt.want)
			}
		})
	}
}

func TestWhatCovers(t *testing.T) {
	esp, optional := tmpl("192.0.2.1", "192.0.2.2", Tunnel), tmpl("0.0.0.0", "0.0.0.0", Transport)
	optional.Optional = true
	comp := optional
	comp.Proto = Comp
	for _, tt := range []struct {
		name          string
		change        func(*Policy)
		covers, maybe bool
	}{
		{"output", func(*Policy) {}, true, false},
		{"input", func(p *Policy) { p.Dir = In }, false, false},
		{"forward", func(p *Policy) { p.Dir = Forward }, false, false},
		{"socket", func(p *Policy) { p.Dir = 3 + Out }, false, false},
		{"sub", func(p *Policy) { p.Sub = true }, false, false},
		{"block", func(p *Policy) { p.Action = Block }, false, false},
		{"bypass", func(p *Policy) { p.Templates = nil }, false, false},
		{"ipcomp alone", func(p *Policy) { p.Templates = []Template{comp} }, false, false},
		{"ipcomp and esp", func(p *Policy) { p.Templates = []Template{comp, esp} }, true, false},
		{"optional", func(p *Policy) { p.Templates = []Template{optional} }, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := outPolicy("10.1.0.0/16", "10.2.0.0/16", esp)
			tt.change(p)
			if covers, maybe := p.Covers(); covers != tt.covers || maybe != tt.maybe {
				t.Errorf("covers %v, maybe %v, want %v, %v", covers, maybe, tt.covers, tt.maybe)
			}
			if got := len(loaded([]*Policy{p}, nil).Coverage(p)) > 0; got != tt.covers {
				t.Errorf("a coverage: %v, want %v", got, tt.covers)
			}
		})
	}
}

func TestTransportIsSplitByPeer(t *testing.T) {
	p := outPolicy("0.0.0.0/0", "10.2.0.0/16", tmpl("0.0.0.0", "0.0.0.0", Transport))
	db := loaded([]*Policy{p}, []*SA{
		gcm("10.1.0.1", "10.2.0.9", Transport, 1), gcm("10.1.0.1", "10.2.0.3", Transport, 2),
		gcm("10.1.0.2", "10.2.0.9", Transport, 3), gcm("10.1.0.1", "10.3.0.1", Transport, 4),
		gcm("10.1.0.1", "10.2.0.7", Tunnel, 5),
	})
	var got []string
	for c := range db.Coverages() {
		got = append(got, fmt.Sprint(c.ID.Peer, c.Selector.Src, c.Selector.Dst, spis(c), c.Larval))
	}
	want := []string{
		"10.2.0.3 10.1.0.1/32 10.2.0.3/32 [2] false",
		"10.2.0.9 0.0.0.0/0 10.2.0.9/32 [3 1] false",
		"invalid IP 0.0.0.0/0 10.2.0.0/16 [] true",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	host := outPolicy("0.0.0.0/0", "10.2.0.3/32", tmpl("0.0.0.0", "0.0.0.0", Transport))
	if c := db.Coverage(host); len(c) != 1 || c[0].ID.Peer.IsValid() || c[0].Larval {
		t.Errorf("a policy for one host is not split: %+v", c)
	}
}

func TestCoverageMTU(t *testing.T) {
	const a, b, c, d = "192.0.2.1", "192.0.2.2", "198.51.100.1", "198.51.100.2"
	tunnel, outer := tmpl(a, b, Tunnel), tmpl(c, d, Tunnel)
	transport := tmpl("0.0.0.0", "0.0.0.0", Transport)
	transport.Reqid = 2
	reqid2 := func(s *SA) { s.Reqid = 2 }
	old := func(s *SA) {
		s.AEAD, s.Enc, s.Auth = Algorithm{}, Algorithm{Name: "cbc(aes)"}, Algorithm{"hmac(sha256)", 128}
		s.AddTime = 1
	}
	paths := map[string]int{b: 1500, d: 1400}
	optional := transport
	optional.Optional = true
	for _, tt := range []struct {
		name      string
		templates []Template
		sas       []*SA
		route     int
		want      int
		why       MTUStatus
	}{
		{"tunnel", []Template{tunnel}, []*SA{gcm(a, b, Tunnel, 1)}, 1500, 1446, MTUKnown},
		{"the flow's route is the cap", []Template{tunnel}, []*SA{gcm(a, b, Tunnel, 1)}, 1300, 1300, MTUKnown},
		{"rekey: the smaller", []Template{tunnel}, []*SA{gcm(a, b, Tunnel, 1), gcm(a, b, Tunnel, 2, old)}, 1500, 1438, MTUKnown},
		{"no sa", []Template{tunnel}, nil, 1500, 0, MTULarval},
		{"no path", []Template{tmpl(a, "203.0.113.1", Tunnel)}, []*SA{gcm(a, "203.0.113.1", Tunnel, 1)}, 1500, 0, MTUUnknownPath},
		{"unknown algorithm", []Template{tunnel}, []*SA{gcm(a, b, Tunnel, 1, func(s *SA) { s.AEAD.Name = "x" })}, 1500, 0, MTUAlgorithm},
		{"esp transport in esp tunnel", []Template{transport, tunnel}, []*SA{gcm("10.1.0.1", "10.2.0.1", Transport, 1, reqid2),
			gcm(a, b, Tunnel, 2)}, 1500, (1446-16-16-20)/4*4 + 20 - 2, MTUKnown},
		{"esp tunnel in esp transport", []Template{tunnel, transport}, []*SA{gcm(a, b, Tunnel, 1),
			gcm(a, b, Transport, 2, reqid2)}, 1500, (1466-16-16-20)/4*4 - 2, MTUKnown},
		{"tunnel in tunnel", []Template{tunnel, outer}, []*SA{gcm(a, b, Tunnel, 1), gcm(c, d, Tunnel, 2)}, 1500,
			((1400-52)/4*4-2-52)/4*4 - 2, MTUKnown},
		{"the optional one has an sa", []Template{optional}, []*SA{gcm("10.1.0.1", "10.2.0.1", Transport, 1, reqid2)}, 1500, 1466, MTUKnown},
		{"the optional one has none", []Template{optional}, nil, 1500, 0, MTUClear},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := outPolicy("10.1.0.0/16", "10.2.0.1/32", tt.templates...)
			cover := loaded([]*Policy{p}, tt.sas).Coverage(p)
			mtu, why := cover[0].MTU(func(sa *SA) (int, bool) {
				mtu, ok := paths[sa.Dst.String()]
				return mtu, ok
			}, tt.route)
			if mtu != tt.want || why != tt.why {
				t.Errorf("got %d, %v, want %d, %v", mtu, why, tt.want, tt.why)
			}
		})
	}
}

// Events that end in the same state end in the same coverages.
func TestCoverageDoesNotDependOnTheWay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		db, o := NewDB(), &slowDB{sas: map[SAKey]*SA{}}
		for _, ev := range rapid.SliceOfN(genEvent(), 0, 30).Draw(t, "events") {
			db.Apply(ev)
			o.apply(ev)
		}
		fresh := NewDB()
		for _, ev := range append(o.dump(), ResyncEnd{}) {
			fresh.Apply(ev)
		}
		for k, sa := range o.sas {
			if sa.Dying {
				fresh.Apply(SADying{k})
			}
		}
		text := func(db *DB) (lines []string) {
			for c := range db.Coverages() {
				line := fmt.Sprint(c.ID, c.Selector, c.Maybe, c.Larval)
				for _, step := range c.Steps {
					var keys []string
					for _, sa := range step.SAs {
						keys = append(keys, fmt.Sprint(sa.Key))
					}
					slices.Sort(keys) // the order of births is not drawn alike
					line += fmt.Sprint(keys)
				}
				lines = append(lines, line)
			}
			return lines
		}
		if got, want := text(db), text(fresh); !slices.Equal(got, want) {
			t.Errorf("got\n%v, want\n%v", got, want)
		}
	})
}
