package routes

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// elsewhere is a process in another network namespace.
func elsewhere(t *testing.T) (pid int) {
	t.Helper()
	other := exec.Command("sleep", "60")
	other.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := other.Start(); err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	t.Cleanup(func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	})
	return other.Process.Pid
}

// TestLinkThatIsMovedWithinADumpTellsWhereItWent: a dump that does not show it any more does not take it out of the mirror before that was told.
func TestLinkThatIsMovedWithinADumpTellsWhereItWent(t *testing.T) {
	vethNS(t)
	var lines strings.Builder
	for i := range 100 { // more than the kernel shows at once
		fmt.Fprintf(&lines, "link add d%d type veth peer name e%d\n", i, i)
	}
	ip(t, lines.String()+"link add m0 type veth peer name m1")
	m0 := Ifindex(mustInterface(t, "m0"))
	pid := elsewhere(t)
	f := follow(t, WatchOptions{Chunk: 1})
	f.w.Resync(Scope{})
	moved, shown, known := false, false, false
	f.until(func(ev Event) bool {
		switch ev := ev.(type) {
		case LinkSet:
			if !moved {
				ip(t, fmt.Sprintf("link set m0 netns %d", pid))
				moved = true
			}
			shown = shown || ev.Link.Index == m0
		case LinkGone:
			known = known || ev.Index == m0 && ev.To != (Place{}) && f.fib.Link(m0) != nil
		}
		return ev == ResyncEnd{}
	})
	if !moved || shown {
		t.Fatalf("moved %t, shown by the dump %t: the test tests nothing", moved, shown)
	}
	if !known {
		t.Error("the dump has ended before it was told where the link went")
	}
	if f.fib.Link(m0) != nil {
		t.Error("it is still there")
	}
}

// TestMovedLinkTellsWhereItWent pins KERNEL.md 76 to 78.
func TestMovedLinkTellsWhereItWent(t *testing.T) {
	vethNS(t)
	ip(t, "link add m0 type veth peer name m1\nlink set m0 mtu 1300")
	f := follow(t, WatchOptions{})
	moved, deleted := Ifindex(mustInterface(t, "m0")), Ifindex(mustInterface(t, "m1"))
	other := elsewhere(t)
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
	ip(t, fmt.Sprintf("link set m0 netns %d", other))
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
