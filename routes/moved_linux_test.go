package routes

import (
	"errors"
	"fmt"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMovedLinkTellsWhereItWent pins KERNEL.md 76 to 78.
func TestMovedLinkTellsWhereItWent(t *testing.T) {
	vethNS(t)
	ip(t, "link add m0 type veth peer name m1\nlink set m0 mtu 1300")
	f := follow(t, WatchOptions{})
	moved, deleted := Ifindex(mustInterface(t, "m0")), Ifindex(mustInterface(t, "m1"))
	other := exec.Command("sleep", "60")
	other.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := other.Start(); err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	defer func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	gone := func(i Ifindex) (out LinkGone) {
		f.until(func(ev Event) bool {
			g, ok := ev.(LinkGone)
			if ok && g.Index == i {
				out = g
			}
			return ok && g.Index == i
		})
		return out
	}
	ip(t, fmt.Sprintf("link set m0 netns %d", other.Process.Pid))
	to := gone(moved).To
	if to.Index <= 0 {
		t.Fatalf("it went to %+v", to)
	}
	l, err := f.tb.ReadLinkAt(to)
	if err != nil || l.Name != "m0" || l.MTU != 1300 || l.Kind != "veth" || l.Index != to.Index {
		t.Errorf("read where it is: %+v, %v", l, err)
	}
	ip(t, "link del m1")
	if to := gone(deleted).To; to != (Place{}) {
		t.Errorf("a device that is deleted went to %+v", to)
	}
	if _, err := f.tb.ReadLinkAt(to); !errors.Is(err, unix.ENODEV) {
		t.Errorf("its peer is gone with it: %v", err)
	}
	if _, err := f.tb.ReadLinkAt(Place{Index: to.Index, Netnsid: to.Netnsid + 1000}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("no such namespace: %v", err)
	}
}
