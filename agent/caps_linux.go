package agent

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrPermission is matched (errors.Is) by errors that a missing capability causes.
var ErrPermission = errors.New("permission denied")

// checkCapabilities fails with an error that says what to do if the process may not read XFRM
// and write routes and features in its namespace. It looks at the effective set
// (capabilities(7), CapEff in /proc/self/status).
func checkCapabilities() error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return fmt.Errorf("agent: read the capabilities: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		hex, ok := strings.CutPrefix(line, "CapEff:")
		if !ok {
			continue
		}
		set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil {
			return fmt.Errorf("agent: read the capabilities: %w", err)
		}
		if set&(1<<unix.CAP_NET_ADMIN) != 0 {
			return nil
		}
		if os.Geteuid() != 0 {
			return fmt.Errorf("CAP_NET_ADMIN is missing and you are not root: run it as root (sudo): %w", ErrPermission)
		}
		return fmt.Errorf("CAP_NET_ADMIN is missing although you are root: a container or service drops it; add it there: %w", ErrPermission)
	}
	return nil
}
