package scenario

import (
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParseWatch(t *testing.T) {
	got, err := parseWatch(strings.Fields("left nic1 --for 500ms dst 10.2.0.0/16 --single proto tcp --min-packets 5"))
	if err != nil {
		t.Fatal(err)
	}
	want := &watch{namespace: "left", device: "nic1", time: 500 * time.Millisecond, packets: 5, single: true}
	want.filter, _ = parseFilter(strings.Fields("dst 10.2.0.0/16 proto tcp"))
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(watch{}), comparePacket); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, line := range []string{"left", "left nic1 --for", "left nic1 --for soon", "left nic1 --super --single", "left nic1 dst"} {
		if _, err := parseWatch(strings.Fields(line)); err == nil {
			t.Errorf("no error for %q", line)
		}
	}
}

func TestJudge(t *testing.T) {
	single := &watch{packets: 2, single: true}
	super := &watch{packets: 2, super: true}
	const mtu = 1500
	for _, test := range []struct {
		name string
		w    *watch
		seen sighting
		ok   bool
	}{
		{"single segments", single, sighting{packets: 2, largest: 1500}, true},
		{"too few", single, sighting{packets: 1, largest: 1500}, false},
		{"one super-packet", single, sighting{packets: 2, super: 1, largest: 1400}, false},
		{"larger than the MTU", single, sighting{packets: 2, largest: 1501}, false},
		{"super-packets", super, sighting{packets: 2, super: 1, largest: 65000}, true},
		{"no super-packet", super, sighting{packets: 2, largest: 1500}, false},
		{"anything", &watch{packets: 1}, sighting{packets: 1, super: 1, largest: 65000}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := test.w.judge(test.seen, mtu); (err == nil) != test.ok {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestParseFrame(t *testing.T) {
	const (
		plainHeader = "00000000000000000000"
		superHeader = "01811400a80500000000" // TCPv4 with ECN, gso_size 1448
		ethernet    = "020000000001" + "020000000002"
		gre         = "4500000000000000402f0000c0000201c0000202" + "20000800" + "00000007" // with a key
	)
	for _, test := range []struct {
		name, frame string
		hatype      uint16
		want        vnetHeader
		offset      int
	}{
		{"no link layer", plainHeader + tcp4, unix.ARPHRD_NONE, vnetHeader{}, 10},
		{"Ethernet, super-packet", superHeader + ethernet + "0800" + tcp4, unix.ARPHRD_ETHER, vnetHeader{gsoType: unix.VIRTIO_NET_HDR_GSO_TCPV4, gsoSize: 1448}, 24},
		{"VLAN", plainHeader + ethernet + "8100" + "0064" + "0800" + tcp4, unix.ARPHRD_ETHER, vnetHeader{}, 28},
		{"GRE with a key", plainHeader + gre + tcp4, unix.ARPHRD_IPGRE, vnetHeader{}, 38},
	} {
		t.Run(test.name, func(t *testing.T) {
			frame, err := hex.DecodeString(test.frame)
			if err != nil {
				t.Fatal(err)
			}
			got, offset, err := parseFrame(frame, test.hatype)
			if err != nil || got != test.want || offset != test.offset {
				t.Errorf("got %+v at %d (%v), want %+v at %d", got, offset, err, test.want, test.offset)
			}
		})
	}
}

func FuzzParseFrame(f *testing.F) {
	f.Add([]byte(strings.Repeat("\x00", 40)), uint16(unix.ARPHRD_ETHER))
	f.Add([]byte(strings.Repeat("\x45", 60)), uint16(unix.ARPHRD_IPGRE))
	f.Fuzz(func(t *testing.T, frame []byte, hatype uint16) {
		if _, offset, err := parseFrame(frame, hatype); err == nil && offset > len(frame) {
			t.Errorf("offset %d in a frame of %d", offset, len(frame))
		}
	})
}
