// Package netns names, compares, enters and watches network namespaces. It knows nothing of what
// is done in them.
//
// A namespace is named as `ip netns` does (a file in /run/netns), by a path, or by a process.
// Whoever holds a file of it open, or a socket in it, keeps it alive: so does a Namespace until
// it is closed.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"unicode"
)

// Dir is where `ip netns` keeps its names (NETNS_RUN_DIR, iproute2's include/namespace.h).
const Dir = "/run/netns"

// Host and All are no names of single namespaces: the one that the process was started in, and
// that one with all that have a name.
const (
	Host = "host"
	All  = "all"
)

// ErrNotNetns is matched (errors.Is) where a file is there and is no network namespace. It may
// become one: `ip netns add` makes the file first and mounts the namespace on it then.
var ErrNotNetns = errors.New("not a network namespace")

// ID tells namespaces apart while they exist: the device and inode of their file (ioctl_ns(2)).
// An inode is given again after its namespace is gone, so an ID is worth something only while
// somebody holds the namespace open.
type ID struct{ Dev, Ino uint64 }

// String is the form that /proc/PID/ns/net links to.
func (id ID) String() string { return fmt.Sprintf("net:[%d]", id.Ino) }

// pidPrefix stands before a process's number.
const pidPrefix = "pid:"

// Check says what is wrong with the way in which a configuration names a namespace: host, all, a
// name in Dir, an absolute path, or pid:N.
func Check(spec string) error {
	pid, isPid := strings.CutPrefix(spec, pidPrefix)
	switch {
	case spec == "":
		return errors.New("an empty name")
	case strings.ContainsFunc(spec, func(r rune) bool { return !strconv.IsPrint(r) || r == unicode.ReplacementChar }):
		return fmt.Errorf("%q has characters that can't be printed", spec)
	case isPid:
		if n, err := strconv.ParseInt(pid, 10, 32); err != nil || n < 1 || pid[0] == '+' {
			return fmt.Errorf("%q is no process number", pid)
		}
	case spec[0] == '/':
	case strings.Contains(spec, "/"):
		return fmt.Errorf("%q is neither a name in %s nor an absolute path", spec, Dir)
	case spec == "." || spec == "..":
		return fmt.Errorf("%q is no name", spec)
	case len(spec) > 255:
		return errors.New("a name longer than 255 bytes")
	}
	return nil
}

// Path is the file of a namespace that is named in one of Check's forms, "" for host and all.
func Path(spec string) string {
	if pid, ok := strings.CutPrefix(spec, pidPrefix); ok {
		return "/proc/" + pid + "/ns/net"
	}
	switch {
	case spec == Host, spec == All:
		return ""
	case spec[0] == '/':
		return filepath.Clean(spec)
	}
	return filepath.Join(Dir, spec)
}

var procPath = regexp.MustCompile(`^/proc/([0-9]+)/(?:task/[0-9]+/)?ns/net$`)

// PidOf is the process whose end makes a path lead nowhere: that of /proc/PID/ns/net, and of
// symbolic links to it. It is 0 for other paths, such as mounts.
func PidOf(path string) int {
	for range 8 { // links to links
		if m := procPath.FindStringSubmatch(path); m != nil {
			pid, _ := strconv.Atoi(m[1])
			return pid
		}
		to, err := os.Readlink(path)
		if err != nil {
			return 0
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(path), to)
		}
		path = filepath.Clean(to)
	}
	return 0
}

// Names are the names in Dir, in its order; those that would mean another namespace, such as host, are paths. It is no error if there is no
// such directory.
func Names() ([]string, error) {
	entries, err := os.ReadDir(Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("netns: list the names: %w", err)
	}
	out := make([]string, 0, len(entries))
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() || Check(name) != nil {
			continue
		}
		if path := filepath.Join(Dir, name); Path(name) != path {
			name = path // host, all and pid:N mean others
		}
		out = append(out, name)
	}
	return out, nil
}
