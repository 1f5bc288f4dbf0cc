package harness

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

// A Netns is a network namespace. It has no name, and goes with its file when nothing runs in it any more.
type Netns struct {
	File *os.File
	// owner is a long-lived `ip -batch`, which is told lines.
	owner *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	said  bytes.Buffer
}

// patience is how long the kernel may take to bring devices up on a machine that is busy.
const patience = 60 * time.Second

// NewNetns makes a namespace with what lines of ip say, and waits until the kernel has done with it what it does by itself: its veths are up.
// Sysctls are settings below /proc/sys/net, such as "ipv4/ip_forward 1".
func NewNetns(t testing.TB, lines string, sysctls ...string) *Netns {
	t.Helper()
	n := &Netns{}
	// Link-local addresses are there at once, and nothing is sent for them.
	sysctls = append([]string{"ipv6/conf/default/accept_dad 0", "ipv6/conf/default/router_solicitations 0"}, sysctls...)
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.File, err = os.Open("/proc/thread-self/ns/net")
		}
		for _, set := range sysctls {
			if key, value, _ := strings.Cut(set, " "); err == nil {
				err = os.WriteFile("/proc/sys/net/"+key, []byte(value), 0)
			}
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	if _, err := n.Run(lines, "ip", "-batch", "-"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		out, err := n.Run("", "ip", "-o", "link", "show", "up", "type", "veth")
		if err != nil || time.Now().After(end) {
			t.Fatalf("the devices don't come up: %v\n%s", err, out)
		}
		if strings.Count(out, "state UP") == strings.Count(out, "\n") {
			return n
		}
	}
}

// In calls f on a thread in the namespace: sockets that it opens stay there.
func (n *Netns) In(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Setns(int(n.File.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// Start starts a command in the namespace. It has no SysProcAttr.Pdeathsig: the thread that starts it ends.
func (n *Netns) Start(cmd *exec.Cmd) error { return n.In(cmd.Start) }

// Run runs a command in the namespace, and returns what it prints.
func (n *Netns) Run(stdin string, args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	err := n.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out.String())
	}
	return out.String(), err
}

// Do runs a line of ip, or one that begins with another program: ethtool or sysctl. That it can't be done, as what it is about is not there, is no
// error.
func (n *Netns) Do(line string) error {
	args := strings.Fields(line)
	switch args[0] {
	case "xfrm", "-6": // where the first fails, ip ends; the other is an option, which a line can't have
		args = append([]string{"ip"}, args...)
		fallthrough
	case "ethtool", "sysctl":
		_, err := n.Run("", args...)
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
			err = nil
		}
		return err
	}
	if n.owner == nil {
		n.owner = exec.Command("ip", "-force", "-batch", "-")
		in, ierr := n.owner.StdinPipe()
		out, oerr := n.owner.StdoutPipe()
		n.owner.Stderr = &n.said
		if err := errors.Join(ierr, oerr, n.Start(n.owner)); err != nil {
			return err
		}
		n.in, n.out = in, bufio.NewReader(out)
	}
	// The answer to the second line, which has two, tells that the first one is done.
	if _, err := fmt.Fprintf(n.in, "%s\nlink show lo\n", line); err != nil {
		return err
	}
	for range 2 {
		if _, err := n.out.ReadString('\n'); err != nil {
			return fmt.Errorf("ip %s: %w: %s", line, err, n.said.String())
		}
	}
	return nil
}

// Owner is the process that writes what Do is told, 0 if it has not been told anything yet.
func (n *Netns) Owner() int {
	if n.owner == nil {
		return 0
	}
	return n.owner.Process.Pid
}

// Close ends what runs in the namespace for us. The namespace goes with its file.
func (n *Netns) Close() {
	if n.owner != nil {
		_ = n.in.Close()
		_ = n.owner.Wait() // some lines failed
	}
	n.File.Close()
}

// What a snapshot leaves out comes some time later, and by itself: the kernel tells of a carrier when it has the time.
var byItself = regexp.MustCompile(`NO-CARRIER,|,LOWER_UP| state [A-Z]+`)

// Snapshot is all that an agent could change: rules, routes, devices, qdiscs, nftables and the features of the named devices with their wanted bits
// (of those that are not in effect, ethtool says what is requested). What has no order is sorted.
func (n *Netns) Snapshot(devices ...string) (string, error) {
	text, err := n.Run("", "sh", "-ec", `
		ip -d -4 rule; echo; ip -d -6 rule; echo
		ip -d -o -4 route show table all; ip -d -o -6 route show table all; echo
		ip -d -o link; tc qdisc; echo
		nft list ruleset; echo
		for dev in `+strings.Join(devices, " ")+`; do ethtool -k $dev; done`)
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
