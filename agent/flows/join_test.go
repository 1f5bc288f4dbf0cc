package flows

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"tsoagent/sockopt"
	"tsoagent/xfrmwatch"
)

var update = flag.Bool("update", false, "write what is joined to testdata/join.txtar")

const golden = "testdata/join.txtar"

const (
	eth0   = 2
	tsoOff = 3
	fixed  = 4
	ipsec0 = 5
	gre1   = 6
	held0  = 7
	vrf1   = 8
)

func policy(index xfrmwatch.PolicyIndex, priority uint32, src, dst string, change ...func(*xfrmwatch.Policy)) *xfrmwatch.Policy {
	p := &xfrmwatch.Policy{
		Index: index, Dir: xfrmwatch.Out, Priority: priority,
		Selector:  xfrmwatch.Selector{Family: xfrmwatch.IPv4, Src: netip.MustParsePrefix(src), Dst: netip.MustParsePrefix(dst)},
		Templates: []xfrmwatch.Template{{Proto: xfrmwatch.ESP, Mode: xfrmwatch.Tunnel}},
	}
	if strings.Contains(dst, ":") {
		p.Selector.Family = xfrmwatch.IPv6
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func bypass(p *xfrmwatch.Policy)   { p.Templates = nil }
func optional(p *xfrmwatch.Policy) { p.Templates[0].Optional = true }

func world() *World {
	on := Offload{Active: true}
	return &World{
		Policies: NewPolicies([]*xfrmwatch.Policy{
			policy(33, 10, "0.0.0.0/0", "10.2.7.0/24", bypass),
			policy(17, 100, "10.9.0.0/24", "10.2.0.0/16"),
			policy(25, 100, "fd09::/64", "fd02::/32"),
			policy(41, 100, "0.0.0.0/0", "0.0.0.0/0", func(p *xfrmwatch.Policy) { p.IfID = 7 }),
			policy(49, 100, "0.0.0.0/0", "10.5.0.0/16", optional),
			policy(57, 100, "0.0.0.0/0", "10.6.0.0/16", func(p *xfrmwatch.Policy) { p.Mark = xfrmwatch.Mark{Value: 1, Mask: 0xff} }),
		}),
		Devices: map[int32]Device{
			1:      {Name: "lo", TSO4: Offload{Active: true, Fixed: true}, TSO6: Offload{Active: true, Fixed: true}},
			eth0:   {Name: "eth0", TSO4: on, TSO6: on},
			tsoOff: {Name: "eth1", TSO6: on},
			fixed:  {Name: "slow0", TSO4: Offload{Fixed: true}, TSO6: Offload{Fixed: true}},
			ipsec0: {Name: "ipsec0", IfID: 7, TSO4: on, TSO6: on},
			gre1:   {Name: "gre1", Wrapped: 65},
			held0:  {Name: "eth2", TSO4: Offload{Held: true}, TSO6: Offload{Held: true}},
			vrf1:   {Name: "red", TSO4: on, TSO6: on},
		},
	}
}

func conn(local, remote string, change ...func(*sockopt.Conn)) sockopt.Conn {
	c := sockopt.Conn{
		Local: netip.MustParseAddrPort(local), State: sockopt.Established, GSO: true, GSOMaxSegs: 65535, GSOMaxSize: 65215, MSS: 1448,
		Route: sockopt.ConnRoute{Dev: eth0, TSO: true, GSOMaxSegs: 65535},
	}
	if remote == "" {
		c.State, c.Route, c.GSO = sockopt.Listen, sockopt.ConnRoute{}, false
	} else {
		c.Remote = netip.MustParseAddrPort(remote)
	}
	for _, f := range change {
		f(&c)
	}
	return c
}

func md5(n uint16) func(*sockopt.Conn) {
	return func(c *sockopt.Conn) { c.MD5Keys, c.GSODisabled, c.GSO = n, true, false }
}

func disabled(c *sockopt.Conn) { c.GSODisabled, c.GSO = true, false }
func bundle(c *sockopt.Conn)   { c.Route.XFRM, c.Route.HeaderLen, c.GSO = true, 54, false }
func offloaded(c *sockopt.Conn) {
	c.Route.XFRM, c.Route.HeaderLen, c.Route.Offload = true, 54, true
}

func by(dev int32, tso bool) func(*sockopt.Conn) {
	return func(c *sockopt.Conn) { c.Route.Dev, c.Route.TSO = dev, tso }
}

func inState(s sockopt.State) func(*sockopt.Conn) { return func(c *sockopt.Conn) { c.State = s } }

func v6only(c *sockopt.Conn) { c.V6Only = true }

func inode(n uint64) func(*sockopt.Conn) { return func(c *sockopt.Conn) { c.Inode = n } }

func boundTo(dev int32) func(*sockopt.Conn) { return func(c *sockopt.Conn) { c.BoundDev = dev } }

// scenes are what the golden file shows.
var scenes = []struct {
	name  string
	world func(*World)
	conns []sockopt.Conn
}{
	{"a listener with one key taxes its unsigned neighbours", nil, []sockopt.Conn{
		conn("0.0.0.0:179", "", md5(1), inode(901)),
		conn("0.0.0.0:80", "", inode(902)),
		conn("10.1.0.1:179", "10.1.0.2:40000", md5(1)),
		conn("10.1.0.1:179", "10.1.0.3:40001", disabled),
		conn("10.1.0.1:179", "10.1.0.4:40002", disabled, inState(8)),
		conn("10.1.0.1:179", "10.1.0.4:40003", disabled, inState(sockopt.TimeWait)),
		conn("10.1.0.1:80", "10.1.0.3:40004"),
		conn("10.1.0.1:40005", "10.1.0.3:179"),
	}},
	{"the most specific listener that taints, in its family and its VRF", nil, []sockopt.Conn{
		conn("0.0.0.0:179", "", md5(2), inode(901)),
		conn("[::]:179", "", md5(1), inode(902)),
		conn("10.1.0.1:179", "", inode(903)),
		conn("10.1.0.2:179", "", md5(3), inode(904)),
		conn("10.1.0.2:179", "", md5(3), inode(905)), // SO_REUSEPORT
		conn("0.0.0.0:179", "", md5(4), inode(906), boundTo(vrf1)),
		conn("[::]:646", "", disabled, inode(907)),
		conn("10.1.0.1:179", "10.1.0.9:40000", disabled),
		conn("10.1.0.2:179", "10.1.0.9:40000", disabled),
		conn("[fd01::1]:179", "[fd01::9]:40000", disabled),
		conn("10.3.0.1:179", "10.3.0.9:40000", disabled, boundTo(vrf1), by(vrf1, true)),
		conn("10.1.0.2:646", "10.1.0.9:40000", disabled),
	}},
	{"a key that is gone, with no listener left", nil, []sockopt.Conn{
		conn("10.1.0.1:40000", "10.1.0.9:179", disabled),
		conn("10.1.0.1:179", "10.1.0.9:40000", disabled, by(0, false)),
	}},
	{"a listener for IPv6 alone has accepted no IPv4", nil, []sockopt.Conn{
		conn("[::]:179", "", md5(1), v6only, inode(901)),
		conn("[::]:646", "", md5(1), v6only, inode(902)),
		conn("[::]:646", "", md5(2), inode(903)), // SO_REUSEPORT
		conn("10.1.0.1:179", "10.1.0.9:40000", disabled),
		conn("[fd01::1]:179", "[fd01::9]:40000", disabled),
		conn("10.1.0.1:646", "10.1.0.9:40000", disabled),
	}},
	{"keys of both kinds", nil, []sockopt.Conn{
		conn("[::]:179", "", func(c *sockopt.Conn) { c.MD5Keys, c.AOKeys, c.GSODisabled, c.GSO = 2, 1, true, false }),
		conn("[fd01::1]:179", "[fd01::2]:40000", func(c *sockopt.Conn) { c.AOKeys, c.GSODisabled, c.GSO = 1, true, false }),
		conn("10.1.0.1:40000", "10.1.0.2:179", func(c *sockopt.Conn) { c.MD5Keys = 1 }),
	}},
	{"policies", nil, []sockopt.Conn{
		conn("10.9.0.1:40000", "10.2.0.1:443", bundle),
		conn("[fd09::1]:40000", "[fd02::1]:443", bundle),
		conn("10.9.0.1:40001", "10.2.0.1:443", offloaded),
		conn("10.9.0.1:40001", "10.2.0.1:444", offloaded, func(c *sockopt.Conn) { c.Route.DeviceESP = true }),
		conn("10.9.0.1:40002", "10.2.7.1:443"),
		conn("10.8.0.1:40003", "10.2.0.1:443"),
		conn("10.9.0.1:40004", "10.5.0.1:443"),
		conn("10.9.0.1:40005", "10.6.0.1:443", bundle, func(c *sockopt.Conn) { c.Mark = 1 }),
		conn("10.9.0.1:40006", "10.6.0.1:443"),
		conn("10.9.0.1:40007", "10.2.0.1:179", bundle, md5(1)),
		conn("10.9.0.1:40008", "10.3.0.1:443", by(ipsec0, true)),
		conn("10.9.0.1:40009", "10.3.0.1:443", by(ipsec0, false)),
		conn("10.9.0.1:40010", "10.4.0.1:443", by(gre1, false)),
	}},
	{"what else takes offload from a covered connection is not hidden by ESP's", nil, []sockopt.Conn{
		conn("0.0.0.0:179", "", md5(1), inode(901)),
		conn("10.9.0.1:179", "10.2.0.1:40000", offloaded, disabled),
		conn("10.9.0.1:179", "10.2.0.2:40000", offloaded, disabled, func(c *sockopt.Conn) { c.Route.DeviceESP = true }),
		conn("10.9.0.1:179", "10.2.0.3:40000", offloaded, md5(1)),
		conn("10.9.0.1:40001", "10.2.0.1:443", offloaded, by(eth0, false), func(c *sockopt.Conn) { c.Route.DeviceESP = true }),
		conn("10.9.0.1:40002", "10.2.0.1:443", bundle, disabled),
	}},
	{"contradictions", nil, []sockopt.Conn{
		conn("10.9.0.1:40000", "10.2.0.1:443"),
		conn("10.9.0.1:40001", "10.2.0.1:443", bundle, func(c *sockopt.Conn) { c.GSO = true }),
		conn("10.1.0.1:40002", "10.7.0.1:443", bundle),
		conn("10.1.0.1:40003", "10.7.0.1:443", func(c *sockopt.Conn) { c.GSO = false }),
		conn("10.9.0.1:40004", "10.2.0.1:443", by(0, false)), // no route yet: nothing is contradicted
	}},
	{"while the policies are read again nothing is a contradiction", func(w *World) { w.Stale = true }, []sockopt.Conn{
		conn("10.9.0.1:40000", "10.2.0.1:443"),
		conn("10.1.0.1:40002", "10.7.0.1:443", bundle),
	}},
	{"devices", nil, []sockopt.Conn{
		conn("10.1.0.1:40000", "10.7.0.1:443", by(tsoOff, false)),
		conn("[fd01::1]:40000", "[fd07::1]:443", by(tsoOff, true)),
		conn("10.1.0.1:40001", "10.7.0.1:443", by(fixed, false)),
		conn("10.1.0.1:40002", "10.7.0.1:443", by(held0, false)),
		conn("10.1.0.1:40003", "10.7.0.1:443", func(c *sockopt.Conn) { c.GSOMaxSegs = 1 }),
		conn("10.1.0.1:40003", "10.7.0.1:444", func(c *sockopt.Conn) { c.Route.GSOMaxSegs = 1 }),
		conn("10.1.0.1:40003", "10.7.0.1:445", func(c *sockopt.Conn) { c.GSOMaxSize = 2000 }),
		conn("127.0.0.1:40004", "127.0.0.1:443", by(1, true)),
		conn("127.0.0.1:40004", "127.0.0.1:444", by(1, true), func(c *sockopt.Conn) { c.MSS = 65483 }),
		conn("127.0.0.1:40004", "127.0.0.1:445", by(1, true), disabled, func(c *sockopt.Conn) { c.MSS = 65483 }),
		conn("10.1.0.1:40005", "10.7.0.1:443", by(99, true)),
		conn("10.1.0.1:40006", "10.7.0.1:443", by(0, false)),
	}},
	{"nothing known", func(w *World) { *w = World{} }, []sockopt.Conn{
		conn("10.1.0.1:40000", "10.7.0.1:443"),
		conn("10.1.0.1:40001", "10.7.0.1:443", by(eth0, false)),
	}},
}

func describe(f *Flow) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s: %s", f.State, f.Local, f.Remote, f.Coverage)
	if f.Policy != 0 {
		fmt.Fprintf(&b, " %d", f.Policy)
	}
	fmt.Fprintf(&b, ", %s", f.Segmentation)
	if f.Device != "" {
		fmt.Fprintf(&b, " by %s", f.Device)
	}
	if f.Lost {
		b.WriteString(", LOST")
	}
	b.WriteString("\n")
	if f.Why != "" {
		fmt.Fprintf(&b, "  why: %s\n", f.Why)
	}
	if f.Contradiction != "" {
		fmt.Fprintf(&b, "  contradiction: %s\n", f.Contradiction)
	}
	return b.String()
}

func TestJoinGolden(t *testing.T) {
	var got txtar.Archive
	for _, s := range scenes {
		w := world()
		if s.world != nil {
			s.world(w)
		}
		j := NewJoin(w, Filter{States: StateNames{allStates}})
		var b strings.Builder
		for i := range s.conns {
			b.WriteString(describe(j.Add(&s.conns[i])))
		}
		r := j.Result()
		fmt.Fprintf(&b, "%+v\n", r.Summary)
		for _, c := range r.Collateral {
			fmt.Fprintf(&b, "collateral: listener %q dev %q: %d MD5 and %d AO keys, %d lost, %d signed, inodes %v\n",
				c.Listener, c.Device, c.MD5Keys, c.AOKeys, c.Lost, c.Signed, c.Inodes)
		}
		got.Files = append(got.Files, txtar.File{Name: s.name, Data: []byte(b.String())})
	}
	if *update {
		if err := os.WriteFile(golden, txtar.Format(&got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := txtar.ParseFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(txtar.Format(want)), string(txtar.Format(&got))); d != "" {
		t.Errorf("the join (-want +got):\n%s", d)
	}
}

// TestFilter counts what each filter lets through of one scene.
func TestFilter(t *testing.T) {
	conns := append([]sockopt.Conn{conn("10.1.0.2:179", "", inode(7))}, scenes[0].conns...)
	conns = append(conns, conn("10.1.0.2:179", "10.1.0.9:40006", by(tsoOff, false)))
	for query, want := range map[string]string{
		"":                            "10.1.0.2:40000 10.1.0.3:40001 10.1.0.4:40002 10.1.0.3:40004 10.1.0.3:179 10.1.0.9:40006",
		"lost=true":                   "10.1.0.3:40001 10.1.0.4:40002 10.1.0.9:40006",
		"dev=eth1":                    "10.1.0.9:40006",
		"listener=80":                 "10.1.0.3:40004",
		"listener=0.0.0.0:179":        "10.1.0.2:40000 10.1.0.3:40001 10.1.0.4:40002",
		"listener=10.1.0.2:179":       "10.1.0.9:40006",
		"listener=22":                 "",
		"state=close-wait":            "10.1.0.4:40002",
		"state=estab&dev=eth1":        "10.1.0.9:40006",
		"state=LISTEN":                "listener listener listener",
		"state=listening":             "listener listener listener",
		"state=TIME-WAIT,listening":   "listener listener listener 10.1.0.4:40003",
		"state=all&listener=80":       "listener 10.1.0.3:40004",
		"lost=1&dev=eth0&state=all":   "10.1.0.3:40001 10.1.0.4:40002",
		"lost=true&state=established": "10.1.0.3:40001 10.1.0.9:40006",
	} {
		t.Run(query, func(t *testing.T) {
			f := parse(t, query)
			if again, err := FilterFrom(f.Values()); err != nil || !cmp.Equal(f, again, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })) {
				t.Errorf("%+v came over the wire as %+v, %v", f, again, err)
			}
			j := NewJoin(world(), f)
			var got []string
			for i := range conns {
				if fl := j.Add(&conns[i]); fl != nil && fl.Remote == "" {
					got = append(got, "listener")
				} else if fl != nil {
					got = append(got, fl.Remote)
				}
			}
			if text := strings.Join(got, " "); text != want {
				t.Errorf("got  %s\nwant %s", text, want)
			}
			// What is collateral does not depend on what is shown.
			r := j.Result()
			if r.Summary.Shown != len(got) || r.Summary.Connections != 6 || len(r.Collateral) != 1 || r.Collateral[0].Lost != 2 || r.Collateral[0].Signed != 1 {
				t.Errorf("result %+v", r)
			}
		})
	}
}

func TestCollateralIsBounded(t *testing.T) {
	j := NewJoin(world(), Filter{})
	for port := range uint16(maxCollateral + 10) {
		for n := range 1 + port%2 {
			l := conn(fmt.Sprintf("0.0.0.0:%d", port+1), "", md5(1))
			j.Add(&l)
			c := conn(fmt.Sprintf("10.1.0.1:%d", port+1), fmt.Sprintf("10.1.0.2:%d", n+1), disabled)
			j.Add(&c)
		}
	}
	r := j.Result()
	if len(r.Collateral) != maxCollateral || r.Collateral[0].Lost != 2 || r.MoreCollateral != 10 {
		t.Errorf("%d listeners, the first lost %d, %d more connections", len(r.Collateral), r.Collateral[0].Lost, r.MoreCollateral)
	}
}
