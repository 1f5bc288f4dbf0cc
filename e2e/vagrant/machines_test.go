package vagrant

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// family is what the lab has twice.
type family struct {
	name      string
	flag      string // of ip and iperf3
	client    string // right-client
	service   string // right's, through ipsec1
	gateway   string // right's outside address, which nothing covers
	lan, far  string // networks that are locked: of right's clients (in a table of the agent's) and of its service (in place)
	mtu       int    // what the tunnel leaves of 1500 with AES-GCM
	headers   int    // of a TCP segment with timestamps
	bgp, plan string // names in BIRD and in swanctl.conf
}

// ESP in tunnel mode with AES-GCM takes 54 bytes over IPv4 and 74 over IPv6.
var families = []family{
	{
		name: "ipv4", flag: "-4", client: "10.2.0.50", service: "10.12.0.10", gateway: "198.51.100.10", lan: "10.2.0.0/24", far: "10.12.0.0/24",
		mtu: 1446, headers: 52, bgp: "4", plan: "4",
	},
	{
		name: "ipv6", flag: "-6", client: "fd00:2::50", service: "fd00:12::10", gateway: "2001:db8:2::10", lan: "fd00:2::/64", far: "fd00:12::/64",
		mtu: 1426, headers: 72, bgp: "6", plan: "6",
	},
}

// TestMachines brings the machines up once, and tells one story with them.
func TestMachines(t *testing.T) {
	l := up(t)
	t.Cleanup(func() { l.logs(t, "left", "right", "router") })
	for _, chapter := range []struct {
		name string
		run  func(*testing.T, *lab)
	}{
		{"TwoCommands", twoCommands},
		{"Locks", locks},
		{"ClientsThroughTheTunnel", clientsThroughTheTunnel},
		{"ServiceThroughInterface", serviceThroughInterface},
		{"PlainTrafficKeepsOffload", plainTrafficKeepsOffload},
		{"SignedSessions", signedSessions},
		{"UnsignedSessionOnSignedListener", unsignedSessionOnSignedListener},
		{"Rekey", rekey},
		{"TunnelOfOneFamilyEnds", tunnelOfOneFamilyEnds},
		{"StopGivesEverythingBack", stopGivesEverythingBack},
	} {
		start := time.Now()
		t.Run(chapter.name, func(t *testing.T) { chapter.run(t, l) })
		t.Logf("%s in %s", chapter.name, time.Since(start).Round(time.Second))
	}
	t.Logf("the machines' processes hold %d MiB", emulators(t)>>20)
}

// twoCommands is what the README promises: the second of the two commands shows a live tunnel.
func twoCommands(t *testing.T, _ *lab) {
	out, err := vagrant(t, patience, "ssh", "left", "-c", "sudo tsoctl status")
	if err != nil {
		t.Fatalf("vagrant ssh left -c 'sudo tsoctl status': %v\n%s", err, out)
	}
	if err := matches(out,
		`^mode enforce`,
		`^ipsec1 +\d+: tx-tcp-segmentation.* in place `,
		`^10\.12\.0\.0/24 +lock 1446 +ipsec1 +in place`,
		`^10\.2\.0\.0/24 +lock 1446 +\S+ +table 5450`,
		`^fd00:12::/64 .*lock 1426 +ipsec1 +in place`,
		`^fd00:2::/64 .*lock 1426 +\S+ +table 5450`,
	); err != nil {
		t.Errorf("%v in\n%s", err, out)
	}
	t.Logf("tsoctl status:\n%s", out)
}

// locks looks at what the agent says it did with other programs' eyes.
func locks(t *testing.T, l *lab) {
	l.run(t, "left", "systemctl is-active tsoagent strongswan bird")
	l.until(t, "left", "swanctl --list-sas", `lan4: .* INSTALLED`, `lan6: .* INSTALLED`, `service4: .* INSTALLED`, `service6: .* INSTALLED`)
	l.run(t, "left", "dpkg -V tsoagent")
	for _, f := range families {
		lock := fmt.Sprintf(`mtu lock %d`, f.mtu)
		l.until(t, "left", "ip "+f.flag+" route show "+f.far, `dev ipsec1 .*`+lock)
		l.until(t, "left", "ip "+f.flag+" route show table 5450", `^`+regexp.QuoteMeta(f.lan)+` .*`+lock)
	}
	l.until(t, "left", "ethtool -k ipsec1", `^\s*tx-tcp-segmentation: off`, `^\s*tx-tcp6-segmentation: off`)
	// The card carries the rest of the world, too.
	l.until(t, "left", "ethtool -k "+l.wan(t, "left"), `^\s*tx-tcp-segmentation: on`, `^\s*tx-tcp6-segmentation: on`)
}

// wan is a gateway's card to the router.
func (l *lab) wan(t *testing.T, machine string) string {
	t.Helper()
	return strings.TrimSpace(l.run(t, machine, "ip -br link | awk '{print $1}' | while read card; do if grep -q ^wan- /sys/class/net/$card/ifalias; then echo $card; fi; done"))
}

// clientsThroughTheTunnel sends from one client to the other: forwarded, covered by policies without an interface of their own.
func clientsThroughTheTunnel(t *testing.T, l *lab) {
	wan := l.wan(t, "left")
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l.until(t, "left-client", "ping -c 1 -W 5 "+f.client, `1 received`)
			packets := l.capture(t, "left", wan, "esp and greater 600", func() {
				l.send(t, "left-client", f, f.client)
			})
			if largest := packets.largest(); largest > 1500 {
				t.Errorf("ESP left in packets of %d bytes", largest)
			}
			// The gateway has told the client what fits.
			l.until(t, "left-client", "ip route get "+f.client, fmt.Sprintf(`mtu %d`, f.mtu))
			t.Log(packets)
		})
	}
}

// serviceThroughInterface sends from left itself, covered, through ipsec1.
func serviceThroughInterface(t *testing.T, l *lab) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l.until(t, "left", "ping -c 1 -W 5 "+f.service, `1 received`)
			packets := l.capture(t, "left", "ipsec1", "tcp and dst host "+f.service+" and greater 600", func() {
				l.send(t, "left", f, f.service)
			})
			if largest := packets.largest(); largest != f.mtu {
				t.Errorf("segments left by ipsec1 in packets of up to %d bytes, want %d", largest, f.mtu)
			}
			t.Log(packets)
		})
	}
}

// plainTrafficKeepsOffload sends from left to right beside the tunnel.
func plainTrafficKeepsOffload(t *testing.T, l *lab) {
	wan := l.wan(t, "left")
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			packets := l.capture(t, "left", wan, "tcp and dst host "+f.gateway+" and greater 600", func() {
				l.send(t, "left", f, f.gateway)
			})
			if largest := packets.largest(); largest <= 2*1500 {
				t.Errorf("no super-packet left by %s: the largest has %d bytes", wan, largest)
			}
			t.Log(packets)
		})
	}
}

// signedSessions looks at left's sessions with the router, which have a key.
func signedSessions(t *testing.T, l *lab) {
	l.until(t, "left", "birdc show protocols", `^router4 .*Established`, `^router6 .*Established`)
	l.until(t, "left", "ip -4 route show 198.51.100.0/24", `proto bird`)
	l.until(t, "left", "ip -6 route show 2001:db8:2::/64", `proto bird`)
	out := l.until(t, "left", "tsoctl flows", `^192\.0\.2\.10:\d+ +192\.0\.2\.20:\d+ +ESTAB +key +none .*TCP-MD5 key on this socket`,
		`^\[2001:db8:1::10\]:\d+ +\[2001:db8:1::20\]:\d+ +ESTAB +key +none .*TCP-MD5 key on this socket`)
	t.Logf("tsoctl flows on left:\n%s", out)
}

// unsignedSessionOnSignedListener looks at right's sessions on the router, whose listener has left's key.
func unsignedSessionOnSignedListener(t *testing.T, l *lab) {
	l.until(t, "router", "birdc show protocols", `^left4 .*Established`, `^left6 .*Established`, `^right4 .*Established`, `^right6 .*Established`)
	l.until(t, "router", "tsoctl flows", `^198\.51\.100\.20:179 +198\.51\.100\.10:\d+ +ESTAB +no +none, lost `,
		`^\[2001:db8:2::20\]:179 +\[2001:db8:2::10\]:\d+ +ESTAB +no +none, lost `)
	out, err := l.try("router", "tsoctl doctor")
	if err == nil {
		t.Errorf("the doctor found nothing")
	}
	if err := matches(out, `key-collateral`, `listener 0\.0\.0\.0:179 .*1 connection that is not signed has lost offload`, `listener \[::\]:179 .*1 connection that is not signed has lost offload`); err != nil {
		t.Errorf("%v in\n%s", err, out)
	}
	t.Logf("tsoctl doctor on the router:\n%s", out)
}

// rekey has each pair of SAs replaced while a connection goes through it.
func rekey(t *testing.T, l *lab) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			spi := func() string {
				out := l.run(t, "left", "swanctl --list-sas --child lan"+f.plan+" --raw | grep -o 'spi-out=[0-9a-f]*' | sort | tr '\\n' ' '")
				return out
			}
			before := spi()
			l.send(t, "left-client", f, f.client)
			l.run(t, "left", "swanctl --rekey --child lan"+f.plan)
			l.until(t, "left", "swanctl --list-sas --child lan"+f.plan, `INSTALLED`)
			after := spi()
			for end := time.Now().Add(patience); after == before && time.Now().Before(end); after = spi() {
				time.Sleep(500 * time.Millisecond)
			}
			if after == before {
				t.Fatalf("the same SAs after a rekey: %s", after)
			}
			l.until(t, "left", "ip "+f.flag+" route show table 5450", `^`+regexp.QuoteMeta(f.lan)+` .*`+fmt.Sprintf(`mtu lock %d`, f.mtu))
			l.send(t, "left-client", f, f.client)
		})
	}
}

// tunnelOfOneFamilyEnds takes the IPv4 tunnel down and opens it again: its locks go and come, and those of IPv6 stay.
func tunnelOfOneFamilyEnds(t *testing.T, l *lab) {
	v4, v6 := families[0], families[1]
	l.run(t, "left", "swanctl --terminate --ike v4")
	l.until(t, "left", "ip -4 route show "+v4.far, `dev ipsec1`, `!lock`)
	l.until(t, "left", "ip -4 route show table 5450; ip -4 rule", `!mtu lock`, `!lookup 5450`)
	l.until(t, "left", "ip -6 route show "+v6.far, `mtu lock 1426`)
	l.until(t, "left", "ip -6 route show table 5450", `mtu lock 1426`)
	l.until(t, "left", "ethtool -k ipsec1", `^\s*tx-tcp-segmentation: off`)
	l.run(t, "left", "swanctl --initiate --child lan4; swanctl --initiate --child service4")
	l.until(t, "left", "ip -4 route show "+v4.far, `mtu lock 1446`)
	l.until(t, "left", "ip -4 route show table 5450", `^10\.2\.0\.0/24 .*mtu lock 1446`)
	l.send(t, "left-client", v4, v4.client)
}

// stopGivesEverythingBack compares what the kernel has without the agent before and after it has run.
func stopGivesEverythingBack(t *testing.T, l *lab) {
	l.run(t, "left", "systemctl stop tsoagent")
	before := l.snapshot(t, "left")
	if err := matches(before, `!mtu lock`, `!5450`, `!proto 84`); err != nil {
		t.Errorf("%v in\n%s", err, before)
	}
	if err := matches(l.run(t, "left", "ethtool -k ipsec1"), `^\s*tx-tcp-segmentation: on`, `^\s*tx-tcp6-segmentation: on`); err != nil {
		t.Error(err)
	}
	l.run(t, "left", "systemctl start tsoagent")
	locks(t, l)
	if l.snapshot(t, "left") == before {
		t.Error("the agent changes nothing that the snapshot shows")
	}
	l.run(t, "left", "systemctl stop tsoagent")
	if diff := cmp.Diff(before, l.snapshot(t, "left")); diff != "" {
		t.Errorf("before and after the agent (-before +after):\n%s", diff)
	}
	// With the package's removal, too, nothing stays.
	l.run(t, "left", "systemctl start tsoagent")
	locks(t, l)
	l.run(t, "left", "dpkg --purge tsoagent")
	if diff := cmp.Diff(before, l.snapshot(t, "left")); diff != "" {
		t.Errorf("without the agent and after its package was removed (-before +after):\n%s", diff)
	}
}

// snapshot is what the agent may change: rules, routes of all tables, and each device's features.
func (l *lab) snapshot(t *testing.T, machine string) string {
	t.Helper()
	return l.run(t, machine, `ip -4 rule; ip -6 rule
ip -4 route show table all; ip -6 route show table all | sed 's/ expires [0-9]*sec//'
for card in /sys/class/net/*; do echo "${card##*/}"; ethtool -k "${card##*/}" | grep -v ^Features; done`)
}

// send sends a megabyte by TCP from a machine to the server at an address, once it answers.
func (l *lab) send(t *testing.T, machine string, f family, to string) {
	t.Helper()
	// The server takes one at a time, and may be busy with one that a lost answer has left behind.
	l.until(t, machine, "iperf3 "+f.flag+" -c "+to+" -n 1M --connect-timeout 30000", `sender$`, `receiver$`)
}

// packets are those that a capture saw, by their length as IP says it.
type packets []int

func (p packets) largest() int {
	largest := 0
	for _, length := range p {
		largest = max(largest, length)
	}
	return largest
}

func (p packets) String() string {
	return fmt.Sprintf("%d packets, the largest with %d bytes", len(p), p.largest())
}

// capture looks at what leaves by a device while do runs, until it has seen twenty packets.
func (l *lab) capture(t *testing.T, machine, device, filter string, do func()) packets {
	t.Helper()
	l.run(t, machine, fmt.Sprintf("rm -f /tmp/capture /tmp/ready; timeout 300 tcpdump -i %s -Q out -n -c 20 -U -Z root -s 128 -w /tmp/capture '%s' </dev/null >/tmp/ready 2>&1 & "+
		"while ! grep -q listening /tmp/ready 2>/dev/null; do sleep 0.2; done", device, filter))
	do()
	// -v has the length of the whole packet: IPv4's total length, or IPv6's payload and 40 bytes.
	out := l.until(t, machine, "tcpdump -n -v -r /tmp/capture 2>/dev/null", `length`)
	var lengths packets
	for _, found := range packetLength.FindAllStringSubmatch(out, -1) {
		length, err := strconv.Atoi(found[2])
		if err != nil {
			t.Fatal(err)
		}
		if found[1] == "payload " {
			length += 40
		}
		lengths = append(lengths, length)
	}
	if len(lengths) < 20 {
		t.Fatalf("only %d packets left by %s: %s", len(lengths), device, out)
	}
	return lengths
}

// packetLength is in the first line of each packet, with what IP's header says.
var packetLength = regexp.MustCompile(`(?m)^\S+ IP6? \(.*?(payload )?length:? (\d+)\)`)

// emulators is how much memory the machines' processes hold.
func emulators(t *testing.T) int64 {
	t.Helper()
	var sum int64
	files, _ := filepath.Glob("/proc/[0-9]*/status")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(text), "Name:\tqemu-system") {
			continue // it has ended, or is none
		}
		for _, line := range strings.Split(string(text), "\n") {
			if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "VmRSS:" {
				kib, err := strconv.ParseInt(fields[1], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				sum += kib << 10
			}
		}
	}
	return sum
}
