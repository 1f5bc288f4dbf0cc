package agent

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"tsoagent/agent/flows"
)

// The bounds of a search for the processes that have sockets open.
const (
	maxOpenFiles     = 1 << 20 // that are looked at
	maxSocketSharers = 8       // that are named for one socket: a server can have forked thousands
)

// owners are the processes that have sockets open, by the sockets' inodes.
type owners struct {
	of map[uint64][]flows.Process
	// hidden counts the processes that may not be looked at, cut says that there are too many files.
	hidden int
	cut    bool
}

// findOwners looks for those who have sockets open that are wanted, in a procfs. The kernel has no
// index for it: each open file of each process is looked at (/proc/PID/fd, proc(5)).
func findOwners(proc string, wanted func(inode uint64) bool, most int) owners {
	o := owners{of: map[uint64][]flows.Process{}}
	pids, err := os.ReadDir(proc)
	if err != nil {
		o.hidden++
		return o
	}
	for _, e := range pids {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join(proc, e.Name())
		files, err := names(filepath.Join(dir, "fd"))
		if errors.Is(err, fs.ErrPermission) {
			o.hidden++
		}
		p := flows.Process{PID: pid}
		for _, fd := range files {
			if most--; most < 0 {
				o.cut = true
				return o
			}
			inode, ok := socketOf(filepath.Join(dir, "fd", fd))
			if !ok || !wanted(inode) || len(o.of[inode]) >= maxSocketSharers {
				continue
			}
			if p.Name == "" {
				p.Name = comm(dir)
			}
			if !slices.Contains(o.of[inode], p) {
				o.of[inode] = append(o.of[inode], p)
			}
		}
	}
	return o
}

// names lists a directory, unsorted.
func names(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// socketOf is the inode of the socket that a file descriptor is open on.
func socketOf(link string) (uint64, bool) {
	target, err := os.Readlink(link)
	if err != nil {
		return 0, false
	}
	rest, ok := strings.CutPrefix(target, "socket:[")
	if !ok {
		return 0, false
	}
	inode, err := strconv.ParseUint(strings.TrimSuffix(rest, "]"), 10, 64)
	return inode, err == nil
}

// comm is a process's name, as ps(1) shows it.
func comm(dir string) string {
	b, err := os.ReadFile(filepath.Join(dir, "comm"))
	if err != nil {
		return "?"
	}
	return cmp.Or(strings.TrimSuffix(string(b), "\n"), "?")
}

// name fills in the processes of listeners, or why they are not known.
func (o owners) name(list []flows.Collateral) {
	for i := range list {
		c := &list[i]
		for _, inode := range c.Inodes {
			for _, p := range o.of[inode] {
				if !slices.Contains(c.Processes, p) {
					c.Processes = append(c.Processes, p)
				}
			}
		}
		slices.SortFunc(c.Processes, func(a, b flows.Process) int { return cmp.Compare(a.PID, b.PID) })
		if len(c.Processes) == 0 {
			c.ProcessesUnknown = o.unknown(len(c.Inodes) > 0)
		}
	}
}

// unknown is why nobody was found.
func (o owners) unknown(open bool) string {
	switch {
	case !open:
		return ""
	case o.hidden > 0:
		return "not every process may be looked at: it takes root, with CAP_SYS_PTRACE"
	case o.cut:
		return "too many open files to look at all of them"
	}
	return "no process that can be seen from here has it open"
}
