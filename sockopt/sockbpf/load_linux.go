package sockbpf

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// kernel is the running kernel's BTF. It takes some megabytes, which are free again when the caller lets go of it.
type kernel struct {
	types *btf.Spec
	cache *btf.Cache // of the same: without it each load reads them again
}

func readKernel() (*kernel, error) {
	k := &kernel{cache: btf.NewCache()}
	var err error
	switch k.types, err = k.cache.Kernel(); {
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("sockbpf: no BTF of the kernel (/sys/kernel/btf/vmlinux, CONFIG_DEBUG_INFO_BTF): %w", ErrUnsupported)
	case err != nil:
		return nil, fmt.Errorf("sockbpf: read the kernel's BTF: %w", err)
	}
	return k, nil
}

// options are those of a collection, or an object, that is loaded into the kernel.
func (k *kernel) options() *ebpf.CollectionOptions {
	return &ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{KernelTypes: k.types}, Cache: k.cache}
}

// hasFunc reports whether the kernel has a function that can be traced.
func (k *kernel) hasFunc(name string) bool {
	var f *btf.Func
	return k.types.TypeByName(name, &f) == nil
}

// explain is a load's or an attachment's error in one line. Where the kernel refuses, it is os.ErrPermission and names the capability
// that is missing; where it lacks something, ErrUnsupported.
func explain(what string, err error) error {
	var verifier *ebpf.VerifierError
	switch {
	// A probe that is refused says that the kernel doesn't support what it is for, as well.
	case errors.Is(err, unix.EPERM), (errors.Is(err, unix.EACCES) || errors.Is(err, ebpf.ErrNotSupported)) && len(missing()) > 0:
		if names := missing(); len(names) > 0 {
			return fmt.Errorf("sockbpf: %s: %w (%s missing)", what, os.ErrPermission, lacking(names))
		}
		return fmt.Errorf("sockbpf: %s: %w, although CAP_BPF and CAP_PERFMON are there (a user namespace, a security module, lockdown, or a "+
			"kernel that doesn't let its functions be traced)", what, os.ErrPermission)
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("sockbpf: %s: no bpf(2) (CONFIG_BPF_SYSCALL): %w", what, ErrUnsupported)
	case errors.As(err, &verifier):
		// The log has a line for each instruction; the last ones tell.
		return fmt.Errorf("sockbpf: %s: %w: %s", what, ErrUnsupported, oneLine(verifier.Error()))
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, btf.ErrNotFound):
		return fmt.Errorf("sockbpf: %s: %w: %s", what, ErrUnsupported, oneLine(err.Error()))
	}
	return fmt.Errorf("sockbpf: %s: %w", what, err)
}

// lacking is the subject of "missing".
func lacking(names []string) string {
	if len(names) == 1 {
		return names[0] + " is"
	}
	return strings.Join(names, " and ") + " are"
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// missing are those of the two capabilities that the calling thread doesn't have in effect. CAP_SYS_ADMIN stands for both.
func missing() []string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return nil
	}
	has := func(c uint) bool { return data[c/32].Effective&(1<<(c%32)) != 0 }
	if has(unix.CAP_SYS_ADMIN) {
		return nil
	}
	var names []string
	if !has(unix.CAP_BPF) {
		names = append(names, "CAP_BPF")
	}
	if !has(unix.CAP_PERFMON) {
		names = append(names, "CAP_PERFMON")
	}
	return names
}
