package peers

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// keepsSecretsInMemory fails the test if a password is anywhere in what the agent can write: its heap, stacks and buffers. That its run directory
// is found there shows that the search finds what there is.
func (a *agent) keepsSecretsInMemory() {
	a.lab.t.Helper()
	pid := a.process.cmd.Process.Pid
	marker := false
	err := eachWritable(pid, func(b []byte) {
		marker = marker || bytes.Contains(b, []byte(a.run))
		for _, p := range a.lab.secrets {
			if bytes.Contains(b, []byte(p)) {
				a.lab.t.Error("a password is in the agent's memory")
			}
		}
	})
	switch {
	case errors.Is(err, os.ErrPermission):
		a.lab.t.Logf("the agent's memory can't be read: %v", err)
	case err != nil:
		a.lab.t.Error(err)
	case !marker:
		a.lab.t.Errorf("%s is not in the agent's memory: the search proves nothing", a.run)
	}
}

// eachWritable calls fn with each region of a process's memory that it can write. What is gone before it is read is left out.
func eachWritable(pid int, fn func(b []byte)) error {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer mem.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			return fmt.Errorf("/proc/%d/maps: %q: %w", pid, line, err)
		}
		if !strings.HasPrefix(mode, "rw") {
			continue
		}
		b := make([]byte, to-from)
		n, err := mem.ReadAt(b, int64(from))
		if err != nil && !errors.Is(err, unix.EIO) && n == 0 {
			continue
		}
		fn(b[:n])
	}
	return nil
}
