package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
	"tsoagent/agent/verify"
)

// TestVerifyOnAWire looks at real packets of this kernel, in namespaces of its own. ESP is in the scenario 71-verify.
func TestVerifyOnAWire(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	if _, err := exec.LookPath("ethtool"); err != nil {
		t.Skip("ethtool is missing")
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	tsoctl := filepath.Join(t.TempDir(), "tsoctl") // the binary's name says what it is to be (TestMain)
	if err := os.Symlink(self, tsoctl); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"netns add right",
		"link add nic1 type veth peer name nic1 netns right",
		"addr add 10.1.1.1/24 dev nic1", "addr add fd01::1/64 dev nic1 nodad", "link set nic1 up",
		"-n right addr add 10.1.1.2/24 dev nic1", "-n right addr add fd01::2/64 dev nic1 nodad", "-n right link set nic1 up", "-n right link set lo up",
	} {
		netnstest.IP(t, line)
	}
	tso := func(family, to string) {
		t.Helper()
		if out, err := exec.Command("ethtool", "-K", "nic1", "tx-tcp"+family+"-segmentation", to).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	run := t.TempDir()
	ctl := func(cmd ...string) (stdout []byte, stderr string, code int) {
		t.Helper()
		c := exec.CommandContext(t.Context(), cmd[0], cmd[1:]...)
		c.Env = []string{"TSOAGENT_RUN_DIR=" + run}
		var out, errOut bytes.Buffer
		c.Stdout, c.Stderr = &out, &errOut
		if err := c.Run(); c.ProcessState == nil {
			t.Fatal(err)
		}
		return out.Bytes(), errOut.String(), c.ProcessState.ExitCode()
	}
	look := func(want int, args ...string) *verify.Result {
		t.Helper()
		out, errOut, code := ctl(append([]string{tsoctl, "verify", "--for", "500ms", "-o", "json"}, args...)...)
		var r verify.Result
		if err := json.Unmarshal(out, &r); err != nil || code != want || errOut != "" {
			t.Fatalf("exit code %d, want %d: %v\n%s%s", code, want, err, out, errOut)
		}
		if r.OK != (code == 0) {
			t.Errorf("exit code %d: %s", code, out)
		}
		return &r
	}
	class := func(r *verify.Result, name, family string) *verify.ClassResult {
		t.Helper()
		for i, c := range r.Devices[0].Classes {
			if c.Class == name && c.Family == family {
				return &r.Devices[0].Classes[i]
			}
		}
		t.Fatalf("no class %s of %q: %+v", name, family, r)
		return nil
	}

	r := look(0, "nic1")
	if c := class(r, verify.Uncovered, ""); c.State != verify.StateNothing {
		t.Errorf("without traffic: %+v", c)
	}

	stop4, stop6 := flood(t, "10.1.1.2", false), flood(t, "fd01::2", false)
	r = look(0, "nic1", "nic1")
	for _, family := range []string{"ipv4", "ipv6"} {
		if c := class(r, verify.Uncovered, family); c.State != verify.StateWhole || c.SuperPackets == 0 || c.Largest <= 1500 || c.Wrong {
			t.Errorf("%s with TSO: %+v", family, c)
		}
	}
	if r.Says != "of covered flows nothing was seen that tells, others are not cut" || len(r.Devices) != 1 {
		t.Errorf("with TSO: %d devices, %s", len(r.Devices), r.Says)
	}
	tso("6", "off")
	r = look(1, "nic1")
	if c := class(r, verify.Uncovered, "ipv6"); c.State != verify.StateCut || !c.Wrong || c.Largest != 1500 || c.SuperPackets != 0 {
		t.Errorf("IPv6 without TSO: %+v", c)
	}
	if c := class(r, verify.Uncovered, "ipv4"); c.State != verify.StateWhole || c.Wrong {
		t.Errorf("IPv4 beside it: %+v", c)
	}
	tso("6", "on")
	stop4()
	stop6()

	// What is signed is cut, and that is right.
	stop := flood(t, "10.1.1.2", true)
	r = look(0, "nic1")
	if c := class(r, verify.Signed, "ipv4"); c.State != verify.StateCut || c.Wrong || c.Largest != 1500 {
		t.Errorf("signed: %+v", c)
	}
	stop()

	// A packet socket goes past IPsec.
	netnstest.IP(t, "xfrm policy add src 10.9.0.0/24 dst 10.3.0.0/16 dir out tmpl src 10.1.1.1 dst 10.1.1.2 proto esp reqid 1 mode tunnel")
	stop = spray(t)
	r = look(1, "nic1")
	if c := class(r, verify.Clear, "ipv4"); !c.Wrong || c.Policy == 0 || c.Packets == 0 {
		t.Errorf("past IPsec: %+v", c)
	}

	// At the other end they come in, which does not count.
	r = look(0, "nic1", "--netns", "right")
	if c := class(r, verify.Uncovered, ""); r.Netns != "right" || c.State != verify.StateNothing {
		t.Errorf("at the other end: %+v", r)
	}
	stop()

	out, errOut, code := ctl(tsoctl, "verify", "nic9")
	if code != exitUsage || len(out) > 0 || errOut != "tsoctl: there is no device \"nic9\"\n" {
		t.Errorf("exit code %d, %s%s", code, out, errOut)
	}
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip("setpriv is missing (package util-linux): CAP_NET_RAW can't be taken away")
	}
	out, errOut, code = ctl(setpriv, "--bounding-set=-net_raw", "--inh-caps=-net_raw", tsoctl, "verify", "nic1")
	if code != exitFailed || len(out) > 0 || !strings.HasPrefix(errOut, "tsoctl: CAP_NET_RAW is missing: run it as root") || strings.Count(errOut, "\n") != 1 {
		t.Errorf("without CAP_NET_RAW: exit code %d, %s%s", code, out, errOut)
	}
}

// What covered flows left by a moment ago can be gone: that is said, and the rest is looked at.
func TestVerifyOfDevicesThatHaveGone(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, "link set lo up")
	for _, carriers := range [][]string{{"gone9", "lo"}, {"gone9"}} {
		r, err := verified(t.Context(), &verify.World{Live: true, Carriers: carriers}, "", nil, leastLook)
		if err != nil {
			t.Errorf("%v: %v", carriers, err)
			continue
		}
		if !slices.Contains(r.Notes, "gone9 went away before it could be looked at") || len(r.Devices) != len(carriers)-1 || !r.OK || r.Says == "" {
			t.Errorf("%v: %+v", carriers, r)
		}
	}
	if _, err := verified(t.Context(), &verify.World{}, "", []string{"gone9"}, leastLook); err == nil {
		t.Error("one that was named, and isn't there, is no mistake")
	}
}

// disable_xfrm holds for a device, and under all for each (IN_DEV_ORCONF, include/linux/inetdevice.h).
func TestVerifySeesThatIPsecIsDisabled(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, "link set lo up")
	for _, tt := range []struct {
		all, lo string
		want    bool
	}{{"0", "0", false}, {"1", "0", true}, {"0", "1", true}} {
		for which, value := range map[string]string{"all": tt.all, "lo": tt.lo} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+which+"/disable_xfrm", []byte(value), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		port, tap, err := openPort("lo", 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := tap.Close(); err != nil {
			t.Error(err)
		}
		if port.NoXFRM != tt.want {
			t.Errorf("all %s, lo %s: disabled %v", tt.all, tt.lo, port.NoXFRM)
		}
	}
}

// flood sends TCP to an address of the namespace named right until it is told to stop, signed or not.
func flood(t *testing.T, to string, sign bool) (stop func()) {
	t.Helper()
	right, err := netns.Open(netns.Path("right"))
	if err != nil {
		t.Fatal(err)
	}
	defer right.Close()
	cfg := net.ListenConfig{}
	cfg.SetMultipathTCP(false) // it refuses keys
	var l net.Listener
	err = right.Do(func() (err error) {
		l, err = cfg.Listen(t.Context(), "tcp", net.JoinHostPort(to, "0"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	d := net.Dialer{}
	d.SetMultipathTCP(false)
	if sign {
		raw, err := l.(*net.TCPListener).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		sigFor(t, raw, "10.1.1.1")
		d.Control = func(_, _ string, c syscall.RawConn) error {
			sigFor(t, c, to)
			return nil
		}
	}
	c, err := d.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(io.Discard, s) })
	wg.Go(func() {
		for b := make([]byte, 256<<10); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	var done sync.Once
	stop = func() {
		done.Do(func() {
			_ = errors.Join(c.Close(), s.Close(), l.Close())
			wg.Wait()
		})
	}
	t.Cleanup(stop)
	return stop
}

// sigFor gives a socket a TCP-MD5 key for an IPv4 peer.
func sigFor(t *testing.T, c syscall.RawConn, peer string) {
	t.Helper()
	const key = "nobody's secret"
	sig := &unix.TCPMD5Sig{Keylen: uint16(len(key))}
	copy(sig.Key[:], key)
	sig.Addr.Family = unix.AF_INET
	a := netip.MustParseAddr(peer).As4()
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&sig.Addr)), unsafe.Sizeof(sig.Addr))[4:], a[:]) // after family and port (struct sockaddr_in)
	var err error
	if ctl := c.Control(func(fd uintptr) { err = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, sig) }); ctl != nil || err != nil {
		t.Fatal(ctl, err)
	}
}

// spray sends a frame from 10.9.0.1 to 10.3.0.1 past the IP layer, now and then.
func spray(t *testing.T) (stop func()) {
	t.Helper()
	link, err := net.InterfaceByName("nic1")
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	frame := append(make([]byte, 12), 0x08, 0x00, 0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 10, 9, 0, 1, 10, 3, 0, 1, 0, 9, 0, 9, 0, 8, 0, 0)
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for tick := time.NewTicker(10 * time.Millisecond); ; {
			if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Index, Halen: 6}); err != nil {
				t.Error(err)
				return
			}
			select {
			case <-tick.C:
			case <-end:
				tick.Stop()
				return
			}
		}
	})
	return sync.OnceFunc(func() {
		close(end)
		wg.Wait()
		unix.Close(fd)
	})
}
