package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
	"tsoagent/trust"
)

// A directory is an open directory; everything in it is reached through its descriptor, so that
// nobody can put another one in its place.
type directory struct {
	*os.File
	path string
}

// openDirectory opens and checks a directory, and creates it first (0750) if asked.
func openDirectory(path string, create bool) (*directory, error) {
	// A slash at the end would make O_NOFOLLOW follow.
	path = filepath.Clean(path)
	if create {
		if err := os.MkdirAll(path, 0o750); err != nil {
			return nil, err
		}
	}
	fd, err := unix.Open(path, trust.OpenFlags|unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link or no directory; name the directory itself: %w", path, err)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	d := &directory{os.NewFile(uintptr(fd), path), path}
	if err := trust.Check(d.File); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// open opens a regular file in the directory, and creates it (0640) if flags say so.
func (d *directory) open(name string, flags int) (*os.File, error) {
	path := filepath.Join(d.path, name)
	fd, err := unix.Openat(int(d.Fd()), name, trust.OpenFlags|flags, 0o640)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link; look at where it leads, then remove it: %w", path, err)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if err := trust.Check(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is no regular file; remove it", path), err, f.Close())
	}
	return f, nil
}

// read returns the journal's content and the open file, or neither if there is none.
func (d *directory) read(flags int) ([]byte, *os.File, error) {
	f, err := d.open(fileName, flags)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return b, f, nil
}

// lock takes the lock of the directory and leaves our process number in it.
func (d *directory) lock() (*os.File, error) {
	f, err := d.open(lockName, unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return nil, err
	}
	var pid int
	for until := time.Now().Add(lockWithin); ; time.Sleep(lockAgain) {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		b := make([]byte, 32)
		n, _ := f.ReadAt(b, 0)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(b[:n])))
		if pid <= 0 || !ended(pid) || time.Now().After(until) {
			break
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, errors.Join(&LockedError{Dir: d.path, PID: max(pid, 0)}, f.Close())
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
	}
	return f, nil
}

// The lock of a process that has ended is still held while its guard takes its rules away (LockFile): it is tried again for some time then, which is
// longer than the guard takes.
const (
	lockWithin = 6 * time.Second
	lockAgain  = time.Millisecond
)

// ended reports whether a process has ended, also where nobody has waited for it yet.
func ended(pid int) bool {
	if errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
		return true
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	// Behind the name, which is in parentheses and may have some, is the state (proc_pid_stat(5)).
	state := b[bytes.LastIndexByte(b, ')')+1:]
	return len(state) > 1 && (state[1] == 'Z' || state[1] == 'X')
}

// unlock gives the lock back at once. A process that is just being started has a copy of the file until it runs its
// own program (close-on-exec, fork(2)), and the lock would last as long as any copy (flock(2)).
func unlock(f *os.File) error {
	return os.NewSyscallError("flock", unix.Flock(int(f.Fd()), unix.LOCK_UN))
}

// keepDamaged gives the journal the second name journal.damaged, for a person to look at.
func (d *directory) keepDamaged() error {
	fd := int(d.Fd())
	if err := unix.Unlinkat(fd, damagedName, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return os.NewSyscallError("unlinkat", err)
	}
	failpoint.Hit("journal-damaged-unlinked")
	err := os.NewSyscallError("linkat", unix.Linkat(fd, fileName, fd, damagedName, 0))
	failpoint.Hit("journal-damaged-linked")
	return err
}

// replace puts a file with the content b in the place of the journal, and returns it open for
// appending. If the file is nil, the old one is still in place; a file and an error together
// say that the new one is in place but may not survive a crash.
func (d *directory) replace(b []byte) (*os.File, error) {
	failpoint.Hit("journal-new-before")
	fd := int(d.Fd())
	if err := unix.Unlinkat(fd, newName, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, os.NewSyscallError("unlinkat", err)
	}
	f, err := d.open(newName, unix.O_RDWR|unix.O_APPEND|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return nil, err
	}
	failpoint.Hit("journal-new-created")
	if failpoint.Here("journal-new-torn") {
		_, _ = f.Write(b[:len(b)/2])
		failpoint.Die()
	}
	if _, err = f.Write(b); err == nil {
		failpoint.Hit("journal-new-written")
		err = f.Sync()
	}
	if err == nil {
		failpoint.Hit("journal-new-synced")
		err = os.NewSyscallError("renameat", unix.Renameat(fd, newName, fd, fileName))
		failpoint.Hit("journal-new-renamed")
	}
	if err != nil {
		_ = unix.Unlinkat(fd, newName, 0)
		return nil, errors.Join(err, f.Close())
	}
	err = os.NewSyscallError("fsync", unix.Fsync(fd))
	failpoint.Hit("journal-new-done")
	return f, err
}
