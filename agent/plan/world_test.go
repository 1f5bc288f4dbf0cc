package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tsoagent/ethtool"
	"tsoagent/routes"
	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

// world is a small host, read from lines in the words of `ip`. The golden files, the
// regressions and the property test all speak this language, so that a case that the property
// test finds can be kept as it was printed.
type world struct {
	cfg        Config
	db         *xfrmwatch.DB
	fib        *routes.FIB
	in         routes.Interner
	features   map[routes.Ifindex]*ethtool.Features
	forwarding map[routes.Family]bool
	probed     map[ProbeKey]Probed
	peers      map[Peer]int // fixed answers, where the lines give some
	last       map[xfrmwatch.CoverageID]int
	gone       []xfrmwatch.Coverage
	withheld   map[ShapeID]string
	held       Held
	links      map[string]*routes.Link
	objects    map[uint32][]byte // the nexthops of a nexthop object, as attributes
	goneIndex  []xfrmwatch.PolicyIndex
	depth      int                           // of tunnels in tunnels
	nested     map[xfrmwatch.CoverageID]bool // what takes packets once more, while it is worked out
	circles    map[xfrmwatch.CoverageID]bool // and what they come to again
	left       map[routes.Ifindex]left       // what is known of devices
	keys       []sockopt.Key
	keysStale  bool
	trusted    []uint32
	replacing  bool // the next route replaces one
}

// newWorld reads the lines. Each family has the kernel's three rules unless a line says
// `norules`.
func newWorld(text string) (*world, error) {
	w := &world{
		db: xfrmwatch.NewDB(), fib: routes.NewFIB(),
		features:   map[routes.Ifindex]*ethtool.Features{},
		forwarding: map[routes.Family]bool{},
		peers:      map[Peer]int{},
		probed:     map[ProbeKey]Probed{},
		last:       map[xfrmwatch.CoverageID]int{},
		withheld:   map[ShapeID]string{},
		held:       Held{Holds: map[HoldKey]HoldClaim{}, Locks: map[routes.Key]LockClaim{}},
		links:      map[string]*routes.Link{},
		objects:    map[uint32][]byte{},
		left:       map[routes.Ifindex]left{},
		nested:     map[xfrmwatch.CoverageID]bool{},
		circles:    map[xfrmwatch.CoverageID]bool{},
	}
	w.db.Apply(xfrmwatch.ResyncBegin{})
	w.db.Apply(xfrmwatch.ResyncEnd{})
	w.fib.Apply(routes.ResyncBegin{})
	w.fib.Apply(routes.ResyncEnd{})
	if !strings.Contains(text, "norules") {
		for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
			for _, d := range []struct {
				prio  uint32
				table routes.TableID
			}{{0, routes.TableLocal}, {32766, routes.TableMain}, {32767, routes.TableDefault}} {
				if f == routes.IPv6 && d.table == routes.TableDefault {
					continue
				}
				w.fib.Apply(routes.RuleSet{Rule: &routes.Rule{
					Family: f, Priority: d.prio, Action: routes.RuleToTable, Table: d.table, Protocol: routes.ProtoKernel,
					SuppressPrefixLen: -1, SuppressIfgroup: -1,
				}})
			}
		}
	}
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		if f := strings.Fields(line); len(f) > 0 {
			if err := w.line(f[0], &words{w: f[1:]}); err != nil {
				return nil, fmt.Errorf("line %d: %s: %w", i+1, line, err)
			}
		}
	}
	for _, index := range w.goneIndex {
		p, ok := w.db.Policy(index)
		if !ok {
			return nil, fmt.Errorf("no policy %d to go away", index)
		}
		w.gone = append(w.gone, w.db.Coverage(p)...)
		w.db.Apply(xfrmwatch.PolicyGone{Index: index})
	}
	return w, nil
}

func (w *world) line(what string, f *words) error {
	switch what {
	case "norules":
		return nil
	case "config":
		return w.config(f)
	case "forwarding":
		w.forwarding[routes.IPv4], w.forwarding[routes.IPv6] = true, true
		return nil
	case "link":
		return w.link(f)
	case "features":
		return w.feature(f)
	case "rule":
		return w.rule(f)
	case "route":
		return w.route(f)
	case "policy":
		return w.policy(f)
	case "sa":
		return w.sa(f)
	case "default":
		if f.next() == "block" {
			w.db.Apply(xfrmwatch.DefaultSet{Default: xfrmwatch.Default{Out: xfrmwatch.Block}})
		}
		return f.end()
	case "held": // held NAME FEATURE: by us
		k := HoldKey{Index: ethtool.Ifindex(w.dev(f)), Feature: ethtool.Feature(f.next())}
		w.held.Holds[k] = HoldClaim{Was: true}
		return f.end()
	case "gone": // the policy goes away, its coverage lingers
		w.goneIndex = append(w.goneIndex, xfrmwatch.PolicyIndex(f.num()))
		return f.end()
	case "last": // last POLICY [peer ADDR] MTU
		id := xfrmwatch.CoverageID{Policy: xfrmwatch.PolicyIndex(f.num())}
		if f.is("peer") {
			id.Peer = f.addr()
		}
		w.last[id] = f.num()
		return f.end()
	case "probed": // probed KIND ipv4|ipv6 transport|tunnel SUITE [keep] [breaks-udp]
		k := ProbeKey{Kind: f.next(), Family: map[string]routes.Family{"ipv4": routes.IPv4, "ipv6": routes.IPv6}[f.next()]}
		k.Mode = map[string]xfrmwatch.Mode{"transport": xfrmwatch.Transport, "tunnel": xfrmwatch.Tunnel}[f.next()]
		k.SA = f.next()
		w.probed[k] = Probed{KeepTSO: f.is("keep"), BreaksUDP: f.is("breaks-udp")}
		return f.end()
	case "key":
		return w.key(f)
	case "peer": // peer ADDR MTU [mark V/M]: as the kernel answers
		p := Peer{Addr: f.addr()}
		mtu := f.num()
		if f.is("mark") {
			p.Mark.Value, p.Mark.Mask = f.mark()
		}
		w.peers[p] = mtu
		return f.end()
	}
	return fmt.Errorf("unknown word %q", what)
}

func (w *world) config(f *words) error {
	for f.more() {
		switch k := f.next(); k {
		case "dedicated":
			w.cfg.Dedicated = Choice(f.next())
		case "device":
			w.cfg.Devices = append(w.cfg.Devices, DeviceConfig{Match: f.next(), Dedicated: Choice(f.next())})
		case "shared_nics":
			w.cfg.SharedNICs = SharedMode(f.next())
		case "trust":
			w.trusted = append(w.trusted, uint32(f.num()))
		case "shared_device":
			w.cfg.Devices = append(w.cfg.Devices, DeviceConfig{Match: f.next(), SharedNICs: SharedMode(f.next())})
		case "carrier_mtu":
			w.cfg.CarrierMTU = CarrierMTU(f.next())
		case "mtu":
			w.cfg.MTU = MTUMode(f.next())
		case "partial":
			w.cfg.Partial = PartialMode(f.next())
		case "source_less_lookups":
			w.cfg.SourceLess = SourceLess(f.next())
		case "presume_mtu":
			w.cfg.PresumeMTU = f.num()
		case "max_clones":
			w.cfg.MaxClones = f.num()
		case "max_clones_per_coverage":
			w.cfg.MaxClonesPerCoverage = f.num()
		default:
			f.fail("unknown setting %q", k)
		}
	}
	return f.end()
}

// link INDEX NAME [mtu N] [kind KIND] [if_id N] [external] [vrf TABLE] [master NAME] [parent NAME]
// [okey N] [KIND local A remote A [proto N] [key N] [dport N] [mark N] [anymark] [header N]] [down]
func (w *world) link(f *words) error {
	l := &routes.Link{Index: routes.Ifindex(f.num()), Name: f.next(), MTU: 1500, Up: true, Running: true, Type: 1}
	for f.more() {
		switch k := f.next(); k {
		case "mtu":
			l.MTU = f.num()
		case "kind":
			l.Kind = f.next()
		case "if_id":
			l.Kind, l.IfID = "xfrm", uint32(f.num())
		case "external":
			l.Kind, l.External = "xfrm", true
		case "vrf":
			l.Kind, l.VRFTable = "vrf", routes.TableID(f.num())
		case "down":
			l.Up, l.Running = false, false
		case "master":
			l.Master = w.dev(f)
		case "backup":
			l.Backup = true
		case "parent":
			l.Parent = w.dev(f)
		case "okey":
			l.Encap.Key = uint32(f.num())
			l.Encap.Mark, l.Encap.HasKey = l.Encap.Key, true
		case "gre", "gretap", "ipip", "sit", "ip6tnl", "vxlan", "geneve":
			l.Kind = k
			l.Encap.Proto = map[string]uint8{"gre": 47, "gretap": 47, "ipip": 4, "sit": 41, "vxlan": 17, "geneve": 17}[k]
			l.Encap.Header = 24
		case "local":
			l.Encap.Local = f.addr()
			l.Encap.Family = routes.FamilyOf(l.Encap.Local)
		case "remote":
			l.Encap.Remote = f.addr()
			l.Encap.Family = routes.FamilyOf(l.Encap.Remote)
		case "proto":
			l.Encap.Proto = f.proto()
		case "key":
			l.Encap.Key, l.Encap.HasKey = uint32(f.num()), true
		case "dport":
			l.Encap.Dport = f.ports()
		case "mark":
			l.Encap.Mark = uint32(f.num())
		case "anymark":
			l.Encap.AnyMark = true
		case "header":
			l.Encap.Header = f.num()
		default:
			f.fail("unknown setting %q", k)
		}
	}
	switch l.Kind {
	case "xfrm", "vti", "vti6", "gre", "ipip", "sit", "ip6tnl":
		l.Type = 0xfffe // ARPHRD_NONE, an xfrm interface's: what counts is that it isn't Ethernet
	}
	if l.Name == "lo" {
		l.Type = arphrdLoopback
	}
	w.links[l.Name] = l
	w.fib.Apply(routes.LinkSet{Link: l})
	w.setFeatures(l, map[ethtool.Feature]string{})
	return f.end()
}

func (w *world) dev(f *words) routes.Ifindex {
	name := f.next()
	l := w.links[name]
	if l == nil {
		f.fail("no device %q", name)
		return 0
	}
	return l.Index
}

// features NAME FEATURE on|off|fixed|on-fixed ...
func (w *world) feature(f *words) error {
	l := w.fib.Link(w.dev(f))
	set := map[ethtool.Feature]string{}
	for f.more() {
		name := ethtool.Feature(f.next())
		set[name] = f.next()
	}
	if f.err == nil {
		w.setFeatures(l, set)
	}
	return f.end()
}

func (w *world) setFeatures(l *routes.Link, set map[ethtool.Feature]string) {
	state := map[ethtool.Feature]ethtool.State{}
	for _, name := range []ethtool.Feature{ethtool.TCPSegmentation, ethtool.TCP6Segmentation, ethtool.TCPECNSegmentation} {
		state[name] = ethtool.State{Active: true, Wanted: true, Changeable: true}
	}
	for name, s := range set {
		on := strings.HasPrefix(s, "on")
		state[name] = ethtool.State{Active: on, Wanted: on, Changeable: s == "on" || s == "off"}
	}
	w.features[l.Index] = ethtool.NewFeatures(ethtool.Ifindex(l.Index), l.Name, state)
}

// rule PRIORITY [not] [from P] [to P] … lookup TABLE | goto N | nop | blackhole | …, in the
// words of `ip rule`. The family is that of the addresses, or the word inet6.
func (w *world) rule(f *words) error {
	r := routes.Rule{Family: routes.IPv4, Priority: uint32(f.num()), SuppressPrefixLen: -1, SuppressIfgroup: -1, Protocol: routes.ProtoBoot}
	actions := map[string]uint8{
		"nop": routes.RuleNop, "blackhole": routes.RuleBlackhole,
		"unreachable": routes.RuleUnreachable, "prohibit": routes.RuleProhibit,
	}
	for f.more() {
		switch k := f.next(); k {
		case "inet6":
			r.Family = routes.IPv6
		case "kernel":
			r.Protocol = routes.ProtoKernel
		case "not":
			r.Invert = true
		case "from", "to":
			if f.is("all") {
				break
			}
			p := f.prefix()
			r.Family = routes.FamilyOf(p.Addr())
			if k == "from" {
				r.Src = p
			} else {
				r.Dst = p
			}
		case "fwmark":
			r.Mark, r.Mask = f.mark()
		case "ipproto":
			r.IPProto = f.proto()
		case "sport":
			r.Sport = f.ports()
		case "dport":
			r.Dport = f.ports()
		case "iif":
			r.Iif = f.next()
		case "oif":
			r.Oif = f.next()
		case "tos":
			r.TOS = uint8(f.num())
		case "uidrange":
			r.HasUID, r.UIDLo, r.UIDHi = true, uint32(f.num()), uint32(f.num())
		case "l3mdev":
			r.L3mdev, r.Action = true, routes.RuleToTable
		case "lookup":
			r.Action, r.Table = routes.RuleToTable, tableOf(f)
		case "suppress_prefixlength":
			r.SuppressPrefixLen = int32(f.num())
		case "goto":
			r.Action, r.Goto = routes.RuleGoto, uint32(f.num())
		case "proto":
			r.Protocol = routes.Protocol(f.num())
		default:
			a, ok := actions[k]
			if !ok {
				f.fail("unknown word %q", k)
			}
			r.Action = a
		}
	}
	if err := f.end(); err != nil {
		return err
	}
	w.fib.Apply(routes.RuleSet{Rule: &r})
	return nil
}

// clone copies the world by its events, so that a plan can be applied to the copy.
func (w *world) clone() *world {
	n := *w
	n.fib, n.left = routes.NewFIB(), map[routes.Ifindex]left{}
	n.fib.Apply(routes.ResyncBegin{})
	for _, l := range w.fib.Links() {
		n.fib.Apply(routes.LinkSet{Link: l})
	}
	for _, o := range w.fib.Nexthops() {
		n.fib.Apply(routes.NexthopSet{Nexthop: o})
	}
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for _, r := range w.fib.Rules(f) {
			n.fib.Apply(routes.RuleSet{Rule: r})
		}
		for _, id := range w.fib.Tables(f) {
			for r := range w.fib.Table(f, id) {
				n.fib.Apply(routes.RouteSet{Route: r, Append: true})
			}
		}
	}
	n.fib.Apply(routes.ResyncEnd{})
	n.features, n.last = map[routes.Ifindex]*ethtool.Features{}, map[xfrmwatch.CoverageID]int{}
	for k, v := range w.features {
		n.features[k] = v
	}
	for k, v := range w.last {
		n.last[k] = v
	}
	n.held = Held{Holds: map[HoldKey]HoldClaim{}, Locks: map[routes.Key]LockClaim{}}
	for k, v := range w.held.Holds {
		n.held.Holds[k] = v
	}
	for k, v := range w.held.Locks {
		n.held.Locks[k] = v
	}
	return &n
}

// state is all routes and rules that are not ours as text.
func (w *world) state() string {
	var lines []string
	for _, f := range []routes.Family{routes.IPv4, routes.IPv6} {
		for i, r := range w.fib.Rules(f) {
			if w.cfg.WithDefaults().OwnRule(r) {
				continue
			}
			lines = append(lines, fmt.Sprintf("rule %s %02d %+v", f, i, *r))
		}
		for _, id := range w.fib.Tables(f) {
			byDst := map[netip.Prefix]int{}
			for r := range w.fib.Table(f, id) {
				if w.cfg.WithDefaults().OwnRoute(r) {
					continue
				}
				byDst[r.Dst]++
				lines = append(lines, fmt.Sprintf("route %s #%d %x", r.Key(), byDst[r.Dst], r.Body.Raw))
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
