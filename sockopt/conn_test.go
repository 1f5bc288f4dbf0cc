package sockopt

import "testing"

// TestSegmentation holds what sk_setup_caps, tcp_send_mss, gso_features_check and validate_xmit_xfrm do with a socket's super-packets.
func TestSegmentation(t *testing.T) {
	plain := Conn{
		State: Established, GSO: true, GSOMaxSegs: 65535, GSOMaxSize: 65215, MSS: 1448,
		Route: ConnRoute{Dev: 2, TSO: true, GSOMaxSegs: 65535},
	}
	for _, tt := range []struct {
		name   string
		change func(*Conn)
		want   Segmentation
	}{
		{"plain", func(*Conn) {}, SegOffload},
		{"TSO off at the device", func(c *Conn) { c.Route.TSO = false }, SegSoftware},
		{"gso_max_segs 1 at the device since", func(c *Conn) { c.Route.GSOMaxSegs = 1 }, SegSoftware},
		{"gso_max_segs 1 when the route was looked up", func(c *Conn) { c.GSOMaxSegs, c.Route.GSOMaxSegs = 1, 1 }, SegNone},
		{"no room for two segments", func(c *Conn) { c.GSOMaxSize = 2*c.MSS - 1 }, SegNone},
		{"room for two segments", func(c *Conn) { c.GSOMaxSize = 2 * c.MSS }, SegOffload},
		{"as much room as the loopback's MSS leaves", func(c *Conn) { c.GSOMaxSize, c.MSS = 65343, 32741 }, SegOffload},
		{"signed", func(c *Conn) { c.MD5Keys, c.GSO, c.GSODisabled, c.GSOMaxSegs = 1, false, true, 1 }, SegNone},
		{"inherited", func(c *Conn) { c.GSO, c.GSODisabled, c.GSOMaxSegs = false, true, 1 }, SegNone},
		{"inherited, without a route", func(c *Conn) { c.GSO, c.GSODisabled, c.Route = false, true, ConnRoute{} }, SegNone},
		{"without a route", func(c *Conn) { c.Route = ConnRoute{} }, SegUnknown},
		{"IPsec without offload", func(c *Conn) { c.GSO, c.GSOMaxSegs, c.Route.XFRM, c.Route.HeaderLen = false, 1, true, 36 }, SegNone},
		{"IPsec cut in software", func(c *Conn) { c.Route.XFRM, c.Route.Offload = true, true }, SegSoftware},
		{"IPsec cut by the device", func(c *Conn) { c.Route.XFRM, c.Route.Offload, c.Route.DeviceESP = true, true, true }, SegOffload},
		{"IPsec bound to a device without TSO", func(c *Conn) {
			c.Route.TSO, c.Route.XFRM, c.Route.Offload, c.Route.DeviceESP = false, true, true, true
		}, SegSoftware},
		{"listener", func(c *Conn) { c.State, c.GSODisabled = Listen, true }, SegUnknown},
		{"TIME_WAIT", func(c *Conn) { c.State = TimeWait }, SegUnknown},
		{"request", func(c *Conn) { c.State = NewSynRecv }, SegUnknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := plain
			tt.change(&c)
			if got := c.Segmentation(); got != tt.want {
				t.Errorf("%s, want %s, of %+v", got, tt.want, c)
			}
		})
	}
}
