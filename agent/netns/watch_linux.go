package netns

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// A Watcher tells when namespaces may have come or gone. It carries no data: who is told looks
// again. It is safe for concurrent use.
//
//	mounts and unmounts in our mount namespace ──┐   (a name is a mount: `ip netns add`)
//	files in the watched directories ────────────┼──> changed()
//	processes that end ──────────────────────────┘
//
// A file of /run/netns is made first and becomes a namespace when it is mounted, for which
// inotify has no event; the kernel tells of mounts by poll(2) on /proc/self/mountinfo
// (mounts_poll, fs/namespace.c).
type Watcher struct {
	changed func()
	wake    int // an eventfd
	files   int // inotify
	mounts  int // mountinfo

	mu   sync.Mutex
	dirs []string
	pids []int
}

// NewWatcher opens a Watcher that calls changed from Run. Close it if Run is never called.
func NewWatcher(changed func()) (*Watcher, error) {
	w := &Watcher{changed: changed, wake: -1, files: -1, mounts: -1}
	var err error
	if w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, errors.Join(fmt.Errorf("netns: %w", os.NewSyscallError("eventfd", err)), w.Close())
	}
	if w.files, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err != nil {
		return nil, errors.Join(fmt.Errorf("netns: %w", os.NewSyscallError("inotify_init1", err)), w.Close())
	}
	if w.mounts, err = unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("netns: open mountinfo: %w", err), w.Close())
	}
	return w, nil
}

// Close closes the files of a Watcher that was never run; Run does it by itself.
func (w *Watcher) Close() error {
	var errs []error
	for _, fd := range []*int{&w.wake, &w.files, &w.mounts} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	return errors.Join(errs...)
}

// Watch says which directories and processes are looked at from now on, besides mounts. A
// directory that is not there is waited for. changed is called once it is so.
func (w *Watcher) Watch(dirs []string, pids []int) {
	dirs, pids = slices.Clone(dirs), slices.Clone(pids)
	slices.Sort(dirs)
	slices.Sort(pids)
	w.mu.Lock()
	defer w.mu.Unlock()
	if slices.Equal(dirs, w.dirs) && slices.Equal(pids, w.pids) {
		return
	}
	w.dirs, w.pids = dirs, pids
	w.poke()
}

// poke makes Run go round; the caller holds the lock, under which Run closes the file.
func (w *Watcher) poke() {
	if w.wake >= 0 {
		_, _ = unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // full is awake, too
	}
}

// Run watches until the context ends, which is no error. It closes the Watcher.
func (w *Watcher) Run(ctx context.Context) error {
	run := &watchRun{Watcher: w, marks: map[string]int{}, procs: map[int]int{}}
	stop := context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.poke()
	})
	defer stop()
	defer run.close()
	for ctx.Err() == nil {
		if err := run.arm(); err != nil {
			return err
		}
		w.changed()
		if err := run.wait(); err != nil {
			return err
		}
	}
	return nil
}

// A watchRun is the state of one Run.
type watchRun struct {
	*Watcher
	marks map[string]int // inotify watches by directory
	procs map[int]int    // pidfds by process, -1 for one that is gone
}

func (r *watchRun) close() {
	for _, fd := range r.procs {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.Close()
}

const dirEvents = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// arm watches what is to be watched, and nothing else.
func (r *watchRun) arm() error {
	r.mu.Lock()
	dirs, pids := r.dirs, r.pids
	r.mu.Unlock()
	marks := map[string]int{}
	for _, dir := range dirs {
		if err := r.mark(dir, marks); err != nil {
			return err
		}
	}
	used := slices.Collect(maps.Values(marks))
	for _, wd := range r.marks {
		if !slices.Contains(used, wd) {
			_, _ = unix.InotifyRmWatch(r.files, uint32(wd)) // it may have gone by itself
		}
	}
	r.marks = marks
	for pid, fd := range r.procs {
		if !slices.Contains(pids, pid) {
			if fd >= 0 {
				_ = unix.Close(fd)
			}
			delete(r.procs, pid)
		}
	}
	for _, pid := range pids {
		if _, ok := r.procs[pid]; ok {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			fd = -1 // gone: who looks again sees it
		}
		r.procs[pid] = fd
	}
	return nil
}

// mark watches a directory, or the nearest one above it that exists.
func (r *watchRun) mark(dir string, marks map[string]int) error {
	at := dir
	for range 64 { // whoever makes and removes directories all the time is looked at later
		wd, err := unix.InotifyAddWatch(r.files, at, dirEvents)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EACCES):
			if at == "/" {
				return nil
			}
			at = filepath.Dir(at)
			continue
		case err != nil:
			return fmt.Errorf("netns: watch %s: %w", at, err)
		}
		marks[at] = wd
		// What appeared below while we went up would be missed.
		next := below(at, dir)
		if st, err := os.Stat(next); next == at || err != nil || !st.IsDir() {
			return nil
		}
		at = next
	}
	return nil
}

// below is the directory one step from at towards dir.
func below(at, dir string) string {
	for next := dir; next != at; next = filepath.Dir(next) {
		if filepath.Dir(next) == at {
			return next
		}
		if next == "/" {
			break
		}
	}
	return at
}

// wait returns when something happened.
func (r *watchRun) wait() error {
	fds := []unix.PollFd{
		{Fd: int32(r.wake), Events: unix.POLLIN},
		{Fd: int32(r.files), Events: unix.POLLIN},
		{Fd: int32(r.mounts), Events: unix.POLLPRI},
	}
	var pids []int
	for pid, fd := range r.procs {
		if fd >= 0 {
			fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
			pids = append(pids, pid)
		}
	}
	for {
		_, err := unix.Poll(fds, -1)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return fmt.Errorf("netns: %w", os.NewSyscallError("poll", err))
		}
	}
	drain(r.wake)
	drain(r.files)
	for i, pid := range pids {
		if fds[3+i].Revents != 0 {
			_ = unix.Close(r.procs[pid])
			r.procs[pid] = -1
		}
	}
	return nil
}

// drain reads all that a file that doesn't block has.
func drain(fd int) {
	var b [4096]byte
	for {
		if n, err := unix.Read(fd, b[:]); n <= 0 && err != unix.EINTR {
			return
		}
	}
}
