// Package trust refuses files that somebody else could have made or could write to: what is in them decides what root does.
package trust

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// OpenFlags never follow a link, never leak to a child and never hang on a FIFO.
const OpenFlags = unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK

// Check refuses an open file, or directory, that somebody else than root and the calling user owns or can write to. The error is
// os.ErrPermission (errors.Is), and says what to do.
func Check(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	uid, gid := os.Geteuid(), os.Getegid()
	switch {
	case st.Uid != 0 && int64(st.Uid) != int64(uid):
		return fmt.Errorf("%s belongs to user %d, not to root or to user %d; look at what is in it, then remove it or give it to root: %w",
			f.Name(), st.Uid, uid, os.ErrPermission)
	case st.Mode&unix.S_IWOTH != 0:
		return fmt.Errorf("%s is writable for everybody (mode %04o); look at what is in it, then run chmod o-w %s: %w",
			f.Name(), st.Mode&0o7777, f.Name(), os.ErrPermission)
	// The group of the service may read, and is not trusted with more; that of a user who isn't root is his own, as a rule.
	case st.Mode&unix.S_IWGRP != 0 && st.Gid != 0 && (uid == 0 || int64(st.Gid) != int64(gid)):
		return fmt.Errorf("%s is writable for group %d (mode %04o); look at what is in it, then run chmod g-w %s: %w",
			f.Name(), st.Gid, st.Mode&0o7777, f.Name(), os.ErrPermission)
	}
	return nil
}

// ReadFile reads a regular file of at most so many bytes, if it can be trusted.
func ReadFile(path string, most int64) ([]byte, error) {
	fd, err := unix.Open(path, OpenFlags|unix.O_RDONLY, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link; look at where it leads, then remove it: %w", path, err)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is no regular file; remove it", path), err)
	}
	if err := Check(f); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s is larger than %d bytes", path, most)
	}
	return b, err
}
