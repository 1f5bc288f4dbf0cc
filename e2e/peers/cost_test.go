package peers

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestKeyOfAnotherCosts is what an unsigned neighbour pays for a key of somebody else on the listener: the agent finds the connection and names
// listener and program, and where the neighbour has a listener of its own there is nothing to find. How fast each is, is said and not judged;
// with TSOAGENT_FIGURES=FILE that goes there as well, for `make cures`.
func TestKeyOfAnotherCosts(t *testing.T) {
	needTruth(t)
	need(t, map[string]string{"ip": "iproute2"})
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprintf("v%d", family), func(t *testing.T) {
			l := newLab(t, "signed", "plain")
			shared := l.listen(family, 179, l.remote("signed", family))
			own := l.listen(family, 1179, netip.Addr{})
			a := l.startAgent("hub")
			// In turn: what else the machine does hits both.
			before, after := new(speed), new(speed)
			rounds, long := 2, 200*time.Millisecond
			if os.Getenv("TSOAGENT_FIGURES") != "" {
				rounds, long = 5, time.Second
			}
			for range rounds {
				l.pour("plain", shared, long, before)
				l.pour("plain", own, long, after)
			}
			t.Logf("listener with a key %.0f Mbit/s, listener of its own %.0f: %.2f times", before.best, after.best, after.best/before.best)
			note(t, before, after, family)

			a.checkConnection(family, shared, isLost(shared.Addr().String()))
			a.checkConnection(family, own, isPlain)
		})
	}
}

// checkConnection opens a connection from the plain neighbour to a listener of the hub, when there is no other one, and compares what the agent
// says of it. If it is lost, doctor is to name the listener and what helps.
func (a *agent) checkConnection(family int, at *net.TCPListener, want truth) {
	t := a.lab.t
	t.Helper()
	a.lab.eventually("no connection", func() error {
		got, err := a.truths()
		if err == nil && len(got) > 0 {
			err = fmt.Errorf("still %+v", got)
		}
		return err
	})
	there, here := a.lab.connection("plain", at)
	defer there.Close()
	defer here.Close()
	a.lab.eventually("the truth of a connection to "+at.Addr().String(), func() error {
		got, err := a.truths()
		if err == nil && got[a.lab.remote("plain", family).String()] != want {
			err = fmt.Errorf("got %+v, want %+v", got, want)
		}
		return err
	})
	if !want.Lost {
		return
	}
	var c checkup
	if err := a.ask(&c, "doctor"); err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprint(c.Findings); !strings.Contains(text, at.Addr().String()) || !strings.Contains(text, "listener of their own") {
		t.Errorf("doctor does not name %s: %s", at.Addr(), text)
	}
}

// speed is the best of several measurements: what else the machine does only makes one slower.
type speed struct{ best float64 }

// listen opens a listener in the hub, with a key for a peer if that is an address.
func (l *lab) listen(family, port int, signed netip.Addr) *net.TCPListener {
	l.t.Helper()
	var config net.ListenConfig
	if signed.IsValid() {
		secret := l.password()
		config.Control = func(_, _ string, c syscall.RawConn) error {
			var sig unix.TCPMD5Sig
			if signed.Is4() {
				sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&sig.Addr))
				sa.Family, sa.Addr = unix.AF_INET, signed.As4()
			} else {
				sa := (*unix.RawSockaddrInet6)(unsafe.Pointer(&sig.Addr))
				sa.Family, sa.Addr = unix.AF_INET6, signed.As16()
			}
			sig.Keylen = uint16(copy(sig.Key[:], secret))
			var err error
			if e := c.Control(func(fd uintptr) { err = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, &sig) }); e != nil {
				return e
			}
			return err
		}
	}
	var listener net.Listener
	if err := l.do("hub", func() (err error) {
		listener, err = config.Listen(context.Background(), "tcp", netip.AddrPortFrom(l.local("plain", family), uint16(port)).String())
		return err
	}); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { listener.Close() })
	return listener.(*net.TCPListener)
}

// connection opens one from a peer to a listener, and returns the peer's end and the hub's.
func (l *lab) connection(peer string, to *net.TCPListener) (there, here *net.TCPConn) {
	l.t.Helper()
	var c net.Conn
	err := l.do(peer, func() (err error) {
		c, err = net.DialTimeout("tcp", to.Addr().String(), patience)
		return err
	})
	if err == nil {
		here, err = to.AcceptTCP()
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return c.(*net.TCPConn), here
}

// pour has the hub send to a peer by a new connection for a while, as fast as it goes.
func (l *lab) pour(peer string, from *net.TCPListener, long time.Duration, into *speed) {
	l.t.Helper()
	there, here := l.connection(peer, from)
	defer here.Close()
	defer there.Close()
	begin := time.Now()
	for _, c := range []*net.TCPConn{there, here} {
		if err := c.SetDeadline(begin.Add(long)); err != nil {
			l.t.Fatal(err)
		}
	}
	go func() {
		buffer := make([]byte, 256<<10)
		for {
			if _, err := here.Write(buffer); err != nil {
				return // the time is over
			}
		}
	}()
	got := 0
	buffer := make([]byte, 1<<20)
	for {
		n, err := there.Read(buffer)
		got += n
		if err != nil {
			break
		}
	}
	took := time.Since(begin)
	if got == 0 {
		l.t.Fatalf("nothing arrived of what %s sent", from.Addr())
	}
	into.best = max(into.best, float64(got)*8/1e6/took.Seconds())
}

// note adds the figures to the file that is asked for, as scenarios do (e2e/guest/scenario, Figure).
func note(t *testing.T, before, after *speed, family int) {
	t.Helper()
	name := os.Getenv("TSOAGENT_FIGURES")
	if name == "" {
		return
	}
	file, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for when, s := range map[string]*speed{"before": before, "after": after} {
		if err := json.NewEncoder(file).Encode(map[string]any{"case": "md5", "when": when, "value": s.best, "unit": "Mbit/s", "variant": fmt.Sprintf("v%d", family)}); err != nil {
			t.Fatal(err)
		}
	}
}
