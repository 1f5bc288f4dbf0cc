package lane

import (
	"reflect"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// sample are filters with all that a match can say.
var sample = []filter{
	{handle: 1, to: 9, match: match("0.0.0.0/0", "198.51.100.0/24", 0)},
	{handle: 2, to: 9, match: match("192.0.2.1/32", "192.0.2.2/32", 50)},
	{handle: 3, to: 9, match: match("192.0.2.1/32", "192.0.2.2/32", 17, 4500, 4501)},
	{handle: 4, to: 9, match: match("::/0", "fd00::/65", 51)},
	{handle: 5, to: 9, match: match("fd00::1/128", "fd00::2/128", 6, 0, 179)},
	{handle: 6, to: 0, match: match("fd00::1/128", "::/0", 132, 7, 0)},
}

func (f filter) message(t testing.TB) []byte {
	t.Helper()
	b, err := payload(f.head(3).encode(), f.encode)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFiltersReadAsTheyWereWritten(t *testing.T) {
	var e egress
	for _, f := range sample {
		if err := e.add(f.message(t)); err != nil {
			t.Fatal(err)
		}
	}
	if !reflect.DeepEqual(e.ours, sample) || e.foreign > 0 || e.taken || len(e.handles) != len(sample) {
		t.Errorf("got %+v", e)
	}
}

func TestFiltersOfOthersAreTheirs(t *testing.T) {
	message := func(pref uint32, proto uint16, kind string, options func(*netlink.AttributeEncoder) error) []byte {
		b, err := payload(tcmsg{index: 3, handle: 1, parent: egressClass, info: pref<<16 | uint32(networkOrder(proto))}.encode(), func(ae *netlink.AttributeEncoder) {
			ae.String(unix.TCA_KIND, kind)
			ae.Nested(unix.TCA_OPTIONS, options)
		})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	none := func(*netlink.AttributeEncoder) error { return nil }
	flower := func(ae *netlink.AttributeEncoder) error {
		encodeMatch(ae, sample[1].match)
		return nil
	}
	for _, c := range []struct {
		name  string
		msg   []byte
		taken bool
	}{
		{"another preference", message(10, unix.ETH_P_IP, "flower", flower), false},
		{"our preference, their flower", message(prefIPv4, unix.ETH_P_IP, "flower", flower), false},
		{"our preference, another kind", message(prefIPv4, unix.ETH_P_IP, "u32", none), true},
		{"our preference, another protocol", message(prefIPv6, unix.ETH_P_ALL, "flower", flower), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var e egress
			if err := e.add(c.msg); err != nil || len(e.ours) > 0 || e.foreign != 1 || e.taken != c.taken {
				t.Errorf("got %+v, %v", e, err)
			}
		})
	}
}

func FuzzFilter(f *testing.F) {
	for _, s := range sample {
		f.Add(s.message(f))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var e egress
		if e.add(b) != nil {
			return
		}
		for _, got := range e.ours {
			if err := got.match.check(); err != nil && got.match.Sport == 0 && got.match.Dport == 0 {
				t.Errorf("%v: %v", got.match, err)
			} else if err == nil && !got.odd {
				var again egress
				if err := again.add(got.message(t)); err != nil || !reflect.DeepEqual(again.ours, []filter{got}) {
					t.Errorf("%+v is written and read as %+v, %v", got, again.ours, err)
				}
			}
		}
	})
}

func FuzzLink(f *testing.F) {
	f.Add(make([]byte, unix.SizeofIfInfomsg))
	b, err := payload(ifinfomsg(7, unix.IFF_UP, 0), func(ae *netlink.AttributeEncoder) {
		ae.String(unix.IFLA_IFNAME, "tsolane3")
		ae.String(unix.IFLA_IFALIAS, aliasOf("eth0", true))
		ae.Uint32(unix.IFLA_MTU, 1500)
		ae.Bytes(unix.IFLA_STATS64, make([]byte, 200))
		ae.Nested(unix.IFLA_LINKINFO, func(ae *netlink.AttributeEncoder) error {
			ae.String(unix.IFLA_INFO_KIND, "ifb")
			return nil
		})
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(_ *testing.T, b []byte) {
		if l, err := decodeLink(b); err == nil && l.ours() {
			_ = IFBName(nicOf(l.name))
		}
	})
}
