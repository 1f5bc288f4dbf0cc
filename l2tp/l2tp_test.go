package l2tp

import (
	"encoding/hex"
	"net/netip"
	"testing"
)

// What Linux 6.12.117 sent for
//
//	ip l2tp add tunnel tunnel_id 1 peer_tunnel_id 2 encap udp local 10.0.0.1 remote 10.0.0.2 udp_sport 5000 udp_dport 6000
//	ip l2tp add session name s1 tunnel_id 1 session_id 3 peer_session_id 4 cookie 01020304
//
// without the statistics of the session.
const (
	capturedTunnel  = "0500070003000000080009000100000008000a000200000008001100000000000600020000000000a4001e00040009000c0001000000000000000000040009000c0002000000000000000000040009000c0003000000000000000000040009000c0004000000000000000000040009000c0005000000000000000000040009000c0006000000000000000000040009000c000a000000000000000000040009000c0007000000000000000000040009000c0008000000000000000000040009000c000b00000000000000000005000d000000000006001a008813000006001b0070170000080018000a000001080019000a000002"
	capturedSession = "080009000100000008000b000300000008000a000200000008000c000400000008001100000000000600010005000000070008007331000008000f000102030405001200000000000500130000000000050014000000000004001e00"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCapturedSessionDecodes(t *testing.T) {
	tun, err := decodeTunnel(unhex(t, capturedTunnel))
	if err != nil {
		t.Fatal(err)
	}
	ses, err := decodeSession(unhex(t, capturedSession))
	if err != nil {
		t.Fatal(err)
	}
	want := Session{
		Ifname: "s1", Tunnel: 1, ID: 3, UDP: true, Local: netip.MustParseAddr("10.0.0.1"), Remote: netip.MustParseAddr("10.0.0.2"),
		Sport: 5000, Dport: 6000, Header: 20 + 8 + 16 + 14,
	}
	if got, ok := join(tun, ses); !ok || got != want {
		t.Errorf("%+v, %t; want\n%+v", got, ok, want)
	}
	for n := range len(capturedTunnel) / 2 {
		_, _ = decodeTunnel(unhex(t, capturedTunnel)[:n:n]) // must not panic
	}
	for n := range len(capturedSession) / 2 {
		_, _ = decodeSession(unhex(t, capturedSession)[:n:n])
	}
	if _, err := decodeTunnel(nil); err == nil {
		t.Error("a tunnel without an id was decoded")
	}
	if _, err := decodeSession(unhex(t, capturedSession)[:8]); err == nil {
		t.Error("a session without an id was decoded")
	}
}

func TestSessionsThatAreNoDevicesAreLeftOut(t *testing.T) {
	tun := tunnel{id: 1, version: 3, remote: netip.MustParseAddr("10.0.0.2"), local: netip.IPv4Unspecified()}
	ses := session{tunnel: 1, id: 2, pwType: pwEther, ifname: "s1"}
	for name, tc := range map[string]struct {
		change func(*tunnel, *session)
		want   bool
	}{
		"as it is":            {func(*tunnel, *session) {}, true},
		"PPP":                 {func(_ *tunnel, s *session) { s.pwType = 7 }, false},
		"no name":             {func(_ *tunnel, s *session) { s.ifname = "" }, false},
		"a tunnel no socket":  {func(t *tunnel, _ *session) { t.remote = netip.Addr{} }, false},
		"an open destination": {func(t *tunnel, _ *session) { t.remote = netip.IPv6Unspecified() }, false},
	} {
		tn, s := tun, ses
		tc.change(&tn, &s)
		got, ok := join(tn, s)
		if ok != tc.want {
			t.Errorf("%s: %+v, %t", name, got, ok)
		}
		if ok && got.Local.IsValid() {
			t.Errorf("%s: an unspecified source is one: %s", name, got.Local)
		}
	}
}

func TestHeaderOfVersion2(t *testing.T) {
	tun := tunnel{version: 2, udp: true, remote: netip.MustParseAddr("10.0.0.2")}
	for _, tc := range []struct {
		s    session
		want int
	}{
		{session{pwType: pwEther, ifname: "a"}, 20 + 8 + 6 + 14},
		{session{pwType: pwEther, ifname: "a", sendSeq: true}, 20 + 8 + 10 + 14},
	} {
		if got, _ := join(tun, tc.s); got.Header != tc.want {
			t.Errorf("%+v: %d, want %d", tc.s, got.Header, tc.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(unhex(f, capturedTunnel), unhex(f, capturedSession))
	f.Fuzz(func(t *testing.T, tun, ses []byte) {
		a, err := decodeTunnel(tun)
		if err != nil {
			return
		}
		b, err := decodeSession(ses)
		if err != nil {
			return
		}
		if s, ok := join(a, b); ok && (!s.Remote.IsValid() || s.Header <= 0) {
			t.Errorf("%+v", s)
		}
	})
}
