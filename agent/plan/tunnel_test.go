package plan

import (
	"fmt"
	"strings"
	"testing"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

func made(t *testing.T, text string) (*world, *Plan) {
	t.Helper()
	w, err := newWorld(text)
	if err != nil {
		t.Fatal(err)
	}
	return w, Make(w.input())
}

const underlay = "link 1 lo mtu 65536\nlink 2 eth0\nroute 192.0.2.0/24 dev eth0 proto kernel\n"

// TestSmallRouteDoesNotShrinkTheLastMTU holds that what stays when the SAs are gone is what the
// coverage leaves, not what its narrowest route does.
func TestSmallRouteDoesNotShrinkTheLastMTU(t *testing.T) {
	const flows = underlay + `
		link 3 eth1 mtu 1300
		route 10.2.0.0/24 via 192.0.2.9 dev eth0
		route 10.2.1.0/24 dev eth1
		policy 17 src 0.0.0.0/0 dst 10.2.0.0/16 tmpl esp tunnel 192.0.2.1 192.0.2.2
	`
	_, with := made(t, flows+"sa esp 192.0.2.1 192.0.2.2 spi 1 gcm\n")
	last := with.MTU[xfrmwatch.CoverageID{Policy: 17}]
	_, without := made(t, flows+fmt.Sprintf("last 17 %d\n", last))
	if len(with.Locks) != 1 || len(without.Locks) != 1 || with.Locks[0].Want != without.Locks[0].Want {
		t.Errorf("with an SA %v, without %v", with.Locks, without.Locks)
	}
}

// TestStackAboveATunnelIsToldOf holds that the plan says what becomes of what a VLAN above a
// dedicated tunnel sends.
func TestStackAboveATunnelIsToldOf(t *testing.T) {
	_, pl := made(t, underlay+`
		link 4 gretap1 gretap local 192.0.2.1 remote 192.0.2.2 mtu 1462 header 38
		link 5 gretap1.10 kind vlan parent gretap1 mtu 1462
		route 10.2.0.0/16 dev gretap1.10
		policy 17 src 192.0.2.1/32 dst 192.0.2.2/32 proto gre tmpl esp transport
		sa esp 192.0.2.1 192.0.2.2 spi 1 transport gcm
	`)
	if len(pl.Tunnels) != 2 {
		t.Fatalf("%+v", pl.Tunnels)
	}
	vlan := pl.Tunnels[1]
	if vlan.Index != 5 || vlan.MTU != 1424 || vlan.Encap.Header != 42 || vlan.Path != 1500 || len(vlan.Own) != 1 {
		t.Errorf("%+v", vlan)
	}
}

// TestProbeOfL2TPCounts holds that a device of L2TP, which has no kind, is looked up by the name
// that the probe gives it.
func TestProbeOfL2TPCounts(t *testing.T) {
	for _, keep := range []string{"", " keep"} {
		w, err := newWorld(underlay + `
			link 4 l2tpeth0 mtu 1446
			probed l2tp ipv4 transport rfc4106(gcm(aes))` + keep + `
			route 10.2.0.0/16 dev l2tpeth0
			policy 17 src 192.0.2.1/32 dst 192.0.2.2/32 proto udp sport 1701 dport 1701 tmpl esp transport
			sa esp 192.0.2.1 192.0.2.2 spi 1 transport gcm
		`)
		if err != nil {
			t.Fatal(err)
		}
		in := w.input()
		port := routes.PortRange{Lo: 1701, Hi: 1701}
		p := in.XFRM.Coverages
		for c := range p() {
			in.L2TP = map[routes.Ifindex]routes.Encap{4: {
				Family: routes.IPv4, Proto: 17, Local: c.Selector.Src.Addr(), Remote: c.Selector.Dst.Addr(),
				Sport: port, Dport: port, AnyMark: true, Header: 54,
			}}
		}
		in.Outers[4] = Path{MTU: 1500, Oif: 2, Table: routes.TableMain}
		pl := Make(in)
		if held := len(pl.Holds) > 0; held != (keep == "") {
			t.Errorf("probed%q: held %v; %v", keep, held, pl.Verdicts)
		}
		if keep != "" && !strings.Contains(strings.Join(pl.Verdicts[0].Notes, " "), "through l2tp ") {
			t.Errorf("notes %q", pl.Verdicts[0].Notes)
		}
	}
}
