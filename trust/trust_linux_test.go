package trust

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const somebody = 4711

func TestWhatSomebodyElseCanHaveMadeIsRefused(t *testing.T) {
	write := func(path string) error { return os.WriteFile(path, []byte("text"), 0o644) }
	for name, x := range map[string]struct {
		prepare func(path string) error
		says    string // empty if it is read
	}{
		"a file":              {write, ""},
		"a group of root's":   {func(p string) error { return errors.Join(write(p), os.Chown(p, 0, 0), os.Chmod(p, 0o664)) }, ""},
		"a group's to read":   {func(p string) error { return errors.Join(write(p), os.Chown(p, 0, somebody), os.Chmod(p, 0o640)) }, ""},
		"nothing":             {func(string) error { return nil }, "no such file"},
		"a link":              {func(p string) error { return os.Symlink("/etc/hostname", p) }, "symbolic link"},
		"a FIFO":              {func(p string) error { return unix.Mkfifo(p, 0o644) }, "no regular file"},
		"a directory":         {func(p string) error { return os.Mkdir(p, 0o755) }, "no regular file"},
		"too large":           {func(p string) error { return os.WriteFile(p, make([]byte, 11), 0o644) }, "larger than 10 bytes"},
		"everybody's":         {func(p string) error { return errors.Join(write(p), os.Chmod(p, 0o646)) }, "chmod o-w"},
		"a group's":           {func(p string) error { return errors.Join(write(p), os.Chown(p, 0, somebody), os.Chmod(p, 0o664)) }, "chmod g-w"},
		"somebody's":          {func(p string) error { return errors.Join(write(p), os.Chown(p, somebody, 0)) }, "belongs to user 4711"},
		"somebody's FIFO":     {func(p string) error { return errors.Join(unix.Mkfifo(p, 0o600), os.Chown(p, somebody, 0)) }, "no regular file"},
		"a device of the tty": {func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o600, 5<<8) }, "no"},
	} {
		path := filepath.Join(t.TempDir(), "file")
		if err := x.prepare(path); errors.Is(err, os.ErrPermission) && os.Geteuid() != 0 {
			t.Logf("%s: not root: no file of somebody else can be made", name)
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		b, err := ReadFile(path, 10)
		switch {
		case x.says == "" && (err != nil || string(b) != "text"):
			t.Errorf("%s: %q, %v", name, b, err)
		case x.says != "" && (err == nil || !strings.Contains(err.Error(), x.says)):
			t.Errorf("%s: got %v, want an error that says %q", name, err, x.says)
		}
	}
}
