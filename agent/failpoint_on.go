//go:build failpoint

package agent

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

var passed atomic.Int64

// failpoint kills the process at the place that TSOAGENT_FAILPOINT names ("lock-written", or
// "lock-written:3" for the third time it gets there), as `kill -9` would.
func failpoint(name string) {
	want, nth, ok := strings.Cut(os.Getenv("TSOAGENT_FAILPOINT"), ":")
	if want != name {
		return
	}
	n := int64(1)
	if ok {
		n, _ = strconv.ParseInt(nth, 10, 64)
	}
	if passed.Add(1) == n {
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
		select {}
	}
}
