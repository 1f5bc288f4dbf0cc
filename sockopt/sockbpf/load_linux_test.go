package sockbpf

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// TestCapabilities opens the iterator on threads with some capabilities and no others.
func TestCapabilities(t *testing.T) {
	openIter(t)
	for _, tt := range []struct {
		caps []uint
		want string // in the error
	}{
		{[]uint{unix.CAP_BPF, unix.CAP_PERFMON}, ""},
		{[]uint{unix.CAP_PERFMON}, "CAP_BPF is missing"},
		{[]uint{unix.CAP_BPF}, "CAP_PERFMON is missing"},
		{nil, "CAP_BPF and CAP_PERFMON are missing"},
		{[]uint{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}, "CAP_BPF and CAP_PERFMON are missing"},
	} {
		err := withCapabilities(t, tt.caps, func() error {
			it, err := Open()
			if err != nil {
				return err
			}
			return errors.Join(it.Each(func(sockopt.Conn) bool { return true }), it.Close())
		})
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("with %v: %v", tt.caps, err)
		case tt.want != "" && (!errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n")):
			t.Errorf("with %v: %v, want one line with %q", tt.caps, err, tt.want)
		}
	}
}

// TestRefusalIsNoLack has what cilium/ebpf's probes make of a refusal: its probe for BTF calls EPERM "not supported".
func TestRefusalIsNoLack(t *testing.T) {
	refused := fmt.Errorf("load BTF: %w", ebpf.ErrNotSupported)
	err := withCapabilities(t, nil, func() error { return explain("load", refused) })
	if !errors.Is(err, os.ErrPermission) || errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "CAP_BPF and CAP_PERFMON are missing") {
		t.Errorf("without capabilities: %v", err)
	}
	err = withCapabilities(t, []uint{unix.CAP_BPF, unix.CAP_PERFMON}, func() error { return explain("load", refused) })
	if !errors.Is(err, ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		t.Errorf("with them: %v", err)
	}
}

// withCapabilities runs fn on a thread that has exactly these capabilities, and ends the thread.
func withCapabilities(t *testing.T, caps []uint, fn func() error) error {
	t.Helper()
	// cilium/ebpf remembers for the process what its probes found, also those that were refused: the maps' are made ahead, with all.
	makeRing(t)
	var data [2]unix.CapUserData
	for _, c := range caps {
		data[c/32].Effective |= 1 << (c % 32)
		data[c/32].Permitted |= 1 << (c % 32)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		if err := unix.Capset(&header, &data[0]); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	return <-done
}

// TestWithoutBTF hides the kernel's BTF from a thread.
func TestWithoutBTF(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for a mount namespace")
	}
	if _, err := os.Stat("/sys/kernel/btf"); err == nil {
		runtime.LockOSThread() // never unlocked
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			t.Skipf("needs mount namespaces: %v", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", "/sys/kernel/btf", "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	_, err := Open()
	_, hookErr := OpenHook()
	for _, err := range []error{err, hookErr} {
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "CONFIG_DEBUG_INFO_BTF") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v, want one line that says that there is no BTF", err)
		}
	}
}

// TestFeatureBits compares the numbers that decode.go knows with the running kernel's.
func TestFeatureBits(t *testing.T) {
	k, err := readKernel()
	if errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]uint64{
		"NETIF_F_GSO_SHIFT": gsoShift, "NETIF_F_TSO_BIT": 16, "NETIF_F_TSO6_BIT": 20, "NETIF_F_GSO_ESP_BIT": gsoESPBit,
		"SKB_GSO_TCPV4": 1 << 0, "SKB_GSO_TCPV6": 1 << 4, "BPF_TCP_MAX_STATES": maxState + 1,
	}
	got := map[string]uint64{}
	for typ, err := range k.types.All() {
		if err != nil {
			t.Fatal(err)
		}
		if enum, ok := typ.(*btf.Enum); ok {
			for _, v := range enum.Values {
				if _, ok := want[v.Name]; ok {
					got[v.Name] = v.Value
				}
			}
		}
	}
	// BPF_TCP_BOUND_INACTIVE came with 6.8; without it there is a state less.
	if got["BPF_TCP_MAX_STATES"] == maxState {
		want["BPF_TCP_MAX_STATES"] = maxState
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%v (-want +got):\n%s", slices.Sorted(maps.Keys(got)), diff)
	}
}
