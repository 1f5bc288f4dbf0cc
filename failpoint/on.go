//go:build failpoint

package failpoint

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// An order is what is to happen at the nth time that a point is reached.
type order struct {
	point string // * for any
	nth   int
	stop  bool
}

// What the environment says, and how often each point was reached.
var (
	once    sync.Once
	mu      sync.Mutex
	orders  []order
	reached = map[string]int{}
	tell    = -1
)

func read() {
	for text := range strings.SplitSeq(os.Getenv("TSOAGENT_FAILPOINT"), ",") {
		text, stop := strings.CutSuffix(text, "=stop")
		o := order{nth: 1, stop: stop}
		var nth string
		var counted bool
		if o.point, nth, counted = strings.Cut(text, ":"); counted {
			o.nth, _ = strconv.Atoi(nth)
		}
		orders = append(orders, o)
	}
	if fd, err := strconv.Atoi(os.Getenv("TSOAGENT_FAILPOINT_FD")); err == nil {
		tell = fd
		syscall.CloseOnExec(fd)
	}
}

// Armed reports that what happens between points is to be as fine as can be.
func Armed() bool { return true }

// Hit is a point: the process ends here if it was told to.
func Hit(point string) {
	if Here(point) {
		Die()
	}
}

// Here reports whether the process is to end at a point, after what the caller does yet: a part of a write. It is for Die then.
func Here(point string) bool {
	once.Do(read)
	mu.Lock()
	defer mu.Unlock()
	if !slices.Contains(Points, point) {
		panic("failpoint: " + point + " is not among the points")
	}
	reached[point]++
	reached["*"]++
	if tell >= 0 {
		_, _ = syscall.Write(tell, fmt.Appendf(nil, "%s\n", point))
	}
	for _, o := range orders {
		if (o.point != point && o.point != "*") || reached[o.point] != o.nth {
			continue
		}
		if !o.stop {
			return true
		}
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGSTOP)
	}
	return false
}

// Die ends the process as `kill -9` would.
func Die() {
	_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
	select {}
}
