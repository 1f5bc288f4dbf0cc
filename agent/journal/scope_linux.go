package journal

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ReadScope returns the scope of the calling thread: this boot, and the thread's network
// namespace (SO_NETNS_COOKIE, Linux 5.14 or newer).
func ReadScope() (Scope, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Scope{}, fmt.Errorf("journal: read the boot id: %w", err)
	}
	boot := strings.TrimSpace(string(b))
	if boot == "" {
		return Scope{}, errors.New("journal: read the boot id: it is empty")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return Scope{}, fmt.Errorf("journal: read the namespace's cookie: %w", os.NewSyscallError("socket", err))
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return Scope{}, fmt.Errorf("journal: read the namespace's cookie: %w", os.NewSyscallError("getsockopt", err))
	}
	return Scope{BootID: boot, NetnsCookie: cookie}, nil
}
