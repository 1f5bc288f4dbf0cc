package kill

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A world is a network namespace with some devices, addresses and routes. It has no name, and goes with its file.
type world struct {
	ns *os.File
	// owner is a long-lived `ip -batch`, which is told lines.
	owner *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	said  bytes.Buffer
	// listener has a TCP-MD5 key.
	listener int
}

// base is what each world has. Nothing of it is random: two worlds are alike but for the time at which they were made.
const base = `link set lo up
link add nic0 address 02:00:00:00:00:10 type veth peer name far0 address 02:00:00:00:00:20
link add nic1 address 02:00:00:00:00:11 type veth peer name far1 address 02:00:00:00:00:21
link add nic2 address 02:00:00:00:00:12 type veth peer name far2 address 02:00:00:00:00:22
link set nic2 addrgenmode none
link set far0 up
link set far1 up
link set far2 up
link set nic0 up
link set nic1 up
link set nic2 up
addr add 192.0.2.1/24 dev nic0
addr add 198.51.100.1/24 dev nic1
addr add 10.9.0.1/32 dev nic2
addr add fd00:2::1/64 dev nic0 nodad
addr add fd00:3::1/64 dev nic1 nodad
route add default via 192.0.2.9
route add default via fd00:2::9 dev nic0
route add 10.8.0.0/16 dev nic2 scope link
`

// newWorld makes a world, and waits until the kernel has done with it what it does by itself.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			w.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		// Link-local addresses are there at once, and nothing is sent for them.
		for _, set := range []string{"ipv6/conf/default/accept_dad 0", "ipv6/conf/default/router_solicitations 0", "ipv4/ip_forward 1", "ipv6/conf/all/forwarding 1"} {
			if key, value, _ := strings.Cut(set, " "); err == nil {
				err = os.WriteFile("/proc/sys/net/"+key, []byte(value), 0)
			}
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	if _, err := w.run(base, "ip", "-batch", "-"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		out, err := w.run("", "ip", "-o", "link", "show", "type", "veth")
		if err != nil || time.Now().After(end) {
			t.Fatalf("the devices don't come up: %v\n%s", err, out)
		}
		if strings.Count(out, "state UP") == 6 {
			return w
		}
	}
}

// start starts a command in the world.
func (w *world) start(cmd *exec.Cmd) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(w.ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = cmd.Start()
		}
		done <- err
	}()
	return <-done
}

// run runs a command in the world, and returns what it prints.
func (w *world) run(stdin string, args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	err := w.start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out.String())
	}
	return out.String(), err
}

// An event is a line of ip, or one of ethtool. Some fail, as what they delete is not there.
type event string

// do has an event happen. That it can't, as what it is about is not there, is no error.
func (w *world) do(e event) error {
	args := strings.Fields(string(e))
	switch args[0] {
	case "xfrm", "-6": // where the first fails, ip ends; the other is an option, which a line can't have
		args = append([]string{"ip"}, args...)
		fallthrough
	case "ethtool":
		_, err := w.run("", args...)
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
			err = nil
		}
		return err
	}
	if w.owner == nil {
		w.owner = exec.Command("ip", "-force", "-batch", "-")
		in, ierr := w.owner.StdinPipe()
		out, oerr := w.owner.StdoutPipe()
		w.owner.Stderr = &w.said
		if err := errors.Join(ierr, oerr, w.start(w.owner)); err != nil {
			return err
		}
		w.in, w.out = in, bufio.NewReader(out)
	}
	// The answer to the second line tells that the first one is done.
	if _, err := fmt.Fprintf(w.in, "%s\nrule show pref 0\n", e); err != nil {
		return err
	}
	if _, err := w.out.ReadString('\n'); err != nil {
		return fmt.Errorf("ip %s: %w: %s", e, err, w.said.String())
	}
	return nil
}

// close ends what runs in the world for us. The namespace goes with its file.
func (w *world) close() {
	if w.owner != nil {
		_ = w.in.Close()
		_ = w.owner.Wait() // some lines failed
	}
	w.mute()
	w.ns.Close()
}

// mute ends who listens.
func (w *world) mute() {
	if w.listener > 0 {
		_ = unix.Close(w.listener)
		w.listener = 0
	}
}

// listen has somebody listen with a TCP-MD5 key, for as long as the world is there.
func (w *world) listen() error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(w.ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			w.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		}
		if err == nil {
			key := unix.TCPMD5Sig{Keylen: 6}
			key.Addr.Family = unix.AF_INET
			copy(key.Addr.Data[2:], []uint8{192, 0, 2, 8}) // behind the port
			copy(key.Key[:], "secret")
			err = unix.SetsockoptTCPMD5Sig(w.listener, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &key)
		}
		if err == nil {
			err = unix.Bind(w.listener, &unix.SockaddrInet4{Port: 179})
		}
		if err == nil {
			err = unix.Listen(w.listener, 1)
		}
		done <- err
	}()
	return <-done
}

// What a snapshot leaves out comes some time later, and by itself: the kernel tells of a carrier when it has the time.
var byItself = regexp.MustCompile(`NO-CARRIER,|,LOWER_UP| state [A-Z]+`)

// snapshot is all that an agent could change: rules, routes, devices, qdiscs, nftables and features with their wanted bits (of those that are
// not in effect, ethtool says what is requested). What has no order is sorted.
func (w *world) snapshot() (string, error) {
	text, err := w.run("", "sh", "-ec", `
		ip -d -4 rule; echo; ip -d -6 rule; echo
		ip -d -o -4 route show table all; ip -d -o -6 route show table all; echo
		ip -d -o link; tc qdisc; echo
		nft list ruleset; echo
		for dev in nic0 nic1 nic2; do ethtool -k $dev; done`)
	parts := strings.Split(byItself.ReplaceAllString(text, ""), "\n\n")
	for _, i := range []int{2, 3} {
		if i < len(parts) {
			lines := strings.Split(parts[i], "\n")
			slices.Sort(lines)
			parts[i] = strings.Join(lines, "\n")
		}
	}
	return strings.Join(parts, "\n\n"), err
}
