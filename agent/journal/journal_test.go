package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var here = Scope{BootID: "2b0e6d5c-boot", NetnsCookie: 7}

func TestMain(m *testing.M) {
	// The other process of TestSecondAgentIsRefused.
	if dir := os.Getenv("JOURNAL_TEST_OPEN"); dir != "" {
		_, _, err := Open(dir, here)
		locked := (*LockedError)(nil)
		if errors.Is(err, ErrLocked) && errors.As(err, &locked) {
			fmt.Println("locked by", locked.PID)
		} else {
			fmt.Println("open:", err)
		}
		os.Exit(0)
	}
	// The agent of TestLockOutlivesAnAgentByItsGuard: it hands its lock on to a process that inherits this file.
	if dir := os.Getenv("JOURNAL_TEST_DIE"); dir != "" {
		j, _, err := Open(dir, here)
		if err != nil {
			panic(err)
		}
		lock, err := j.LockFile()
		if err != nil {
			panic(err)
		}
		guard := exec.Command("cat") // which ends when its input does
		guard.Stdin, guard.ExtraFiles = os.Stdin, []*os.File{lock}
		if err := guard.Start(); err != nil {
			panic(err)
		}
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	os.Exit(m.Run())
}

func entry(id string, data string) Entry {
	return Entry{ID: id, Kind: "feature", Scope: here, Data: json.RawMessage(data)}
}

func open(t testing.TB, dir string, opts ...Option) (*Journal, *Recovery) {
	t.Helper()
	return openAs(t, dir, here, opts...)
}

func openAs(t testing.TB, dir string, scope Scope, opts ...Option) (*Journal, *Recovery) {
	t.Helper()
	j, r, err := Open(dir, scope, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	return j, r
}

func closeJournal(t testing.TB, j *Journal) {
	t.Helper()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, j *Journal, entries ...Entry) {
	t.Helper()
	if err := j.Put(entries...); err != nil {
		t.Fatal(err)
	}
}

func content(t testing.TB, dir string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// newDir names a directory that is not there yet, in memory if possible: thousands of syncs
// take a minute on a disk.
func newDir(t testing.TB) string {
	t.Helper()
	parent, err := os.MkdirTemp("/dev/shm", "tsoagent-journal-")
	if err != nil {
		return filepath.Join(t.TempDir(), dirName)
	}
	t.Cleanup(func() { _ = os.RemoveAll(parent) })
	return filepath.Join(parent, dirName)
}

func TestEntriesSurvive(t *testing.T) {
	dir := newDir(t)
	j, r := open(t, dir)
	if len(r.Entries)+len(r.Foreign)+len(r.Problems)+r.Torn > 0 {
		t.Errorf("a new journal has %+v", r)
	}
	want := []Entry{entry("a", `{"wanted":true,"<&>":"é"}`), entry("b", `null`), {ID: "c", Kind: "route", Scope: here}}
	put(t, j, want[1], entry("x", `1`), want[2])
	put(t, j, entry("a", `"old"`))
	put(t, j, Entry{ID: "a", Kind: "feature", Data: json.RawMessage("{\n \"wanted\" : true, \"<&>\": \"é\" }")})
	if err := j.Remove("x", "nosuch"); err != nil {
		t.Fatal(err)
	}
	same := func(what string, got []Entry) {
		t.Helper()
		// <, > and & come back as escapes, which mean the same.
		for i := range got {
			got[i].Data = bytes.ReplaceAll(bytes.ReplaceAll(bytes.ReplaceAll(got[i].Data,
				[]byte(`\u003c`), []byte("<")), []byte(`\u003e`), []byte(">")), []byte(`\u0026`), []byte("&"))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	same("entries", j.Entries())
	looked, err := Read(dir, here)
	if err != nil {
		t.Fatal(err)
	}
	same("read while it is open", looked.Entries)

	size := len(content(t, dir))
	put(t, j, entry("b", `null`))
	if len(content(t, dir)) != size {
		t.Error("an entry that is there was written again")
	}
	closeJournal(t, j)
	closeJournal(t, j)
	if err := j.Put(entry("d", `1`)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("put after close: %v", err)
	}
	j, r = open(t, dir)
	same("recovery", r.Entries)
	same("entries after recovery", j.Entries())
	for name, mode := range map[string]os.FileMode{".": 0o750, fileName: 0o640, lockName: 0o640} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode().Perm()&^mode != 0 {
			t.Errorf("%s: mode %v, %v; want no more than %v", name, st.Mode().Perm(), err, mode)
		}
	}
}

func TestPutRefusesWhatWouldNotComeBack(t *testing.T) {
	j, _ := open(t, newDir(t))
	for name, e := range map[string]Entry{
		"no id":         {Kind: "feature"},
		"no kind":       {ID: "a"},
		"not UTF-8":     {ID: "a\xff", Kind: "feature"},
		"not JSON":      entry("a", `{"`),
		"another scope": {ID: "a", Kind: "feature", Scope: Scope{BootID: "x", NetnsCookie: 1}},
	} {
		if err := j.Put(entry("good", "1"), e); err == nil {
			t.Errorf("%s: no error", name)
		}
		if got := j.Entries(); len(got) > 0 {
			t.Errorf("%s: the journal has %v", name, got)
		}
	}
}

func TestForeignEntriesAreNotOurs(t *testing.T) {
	dir := newDir(t)
	otherNS, otherBoot := Scope{here.BootID, 8}, Scope{"another-boot", 7}
	// Three agents, one after the other, each with the same ID.
	for _, scope := range []Scope{otherBoot, otherNS, here} {
		j, _ := openAs(t, dir, scope)
		put(t, j, Entry{ID: "feature/7/tso", Kind: "feature", Data: json.RawMessage(fmt.Sprint(scope.NetnsCookie))})
		closeJournal(t, j)
	}
	j, r := open(t, dir, CompactAfter(0))
	if diff := cmp.Diff([]Entry{{"feature/7/tso", "feature", here, json.RawMessage("7")}}, r.Entries); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	var scopes []Scope
	for _, e := range r.Foreign {
		scopes = append(scopes, e.Scope)
	}
	// The entry of the other boot went when the second agent compacted, or is still there.
	if !slices.Contains(scopes, otherNS) || slices.Contains(scopes, here) {
		t.Errorf("foreign: %v", scopes)
	}
	if n := j.Len(); n != 1 {
		t.Errorf("Len is %d, want 1", n)
	}
	if err := j.Remove("feature/7/tso"); err != nil {
		t.Fatal(err)
	}
	if n := j.Len(); n != 0 || len(j.Entries()) != 0 {
		t.Errorf("Len is %d and Entries %v, want none", n, j.Entries())
	}
	for i := range 20 {
		put(t, j, entry("x", fmt.Sprint(i)))
	}
	if n := j.Len(); n != 1 {
		t.Errorf("Len after compactions is %d, want 1", n)
	}
	closeJournal(t, j)
	r, err := Read(dir, otherNS)
	if err != nil || len(r.Entries) != 1 {
		t.Errorf("the other namespace's agent finds %+v, %v; its entry must stay", r, err)
	}
	if strings.Contains(string(content(t, dir)), otherBoot.BootID) {
		t.Error("a compaction kept the entry of another boot")
	}
}

func TestLaterFormatIsRefused(t *testing.T) {
	dir := newDir(t)
	j, _ := open(t, dir)
	closeJournal(t, j)
	line, _, err := encodeLine(record{Format: formatName, Version: formatVersion + 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, fileName), line, 0o640); err != nil {
		t.Fatal(err)
	}
	_, _, err = Open(dir, here)
	if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "tsoctl restore") {
		t.Errorf("got %v, want ErrVersion and what to do", err)
	}
	if _, err := Read(dir, here); !errors.Is(err, ErrVersion) {
		t.Errorf("read: got %v, want ErrVersion", err)
	}
	if !bytes.Equal(content(t, dir), line) {
		t.Error("the file was changed")
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	dir := newDir(t)
	j, _ := open(t, dir)
	other := func() string {
		t.Helper()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "JOURNAL_TEST_OPEN="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if got, want := other(), fmt.Sprint("locked by ", os.Getpid()); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if _, _, err := Open(dir, here); !errors.Is(err, ErrLocked) {
		t.Errorf("in the same process: got %v, want ErrLocked", err)
	}
	closeJournal(t, j)
	if got, want := other(), "open: <nil>"; got != want {
		t.Errorf("after close: got %q, want %q", got, want)
	}
}

// TestCloseUnlocks although a process that is being started still has a copy of the file.
func TestCloseUnlocks(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	j, _ := open(t, dir)
	fd, err := unix.Dup(int(j.lock.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	closeJournal(t, j)
	again, _ := open(t, dir)
	closeJournal(t, again)
}

func TestUntrustedPlacesAreRefused(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(dir string) error
		says    string
	}{
		{"directory is a link", func(dir string) error {
			if err := os.Mkdir(dir+".real", 0o750); err != nil {
				return err
			}
			return os.Symlink(dir+".real", dir)
		}, "symbolic link"},
		{"directory is a file", func(dir string) error { return os.WriteFile(dir, nil, 0o640) }, dirName},
		{"directory is writable for everybody", func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o750), os.Chmod(dir, 0o757))
		}, "chmod o-w"},
		{"journal is a link", func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o750), os.Symlink("/etc/passwd", filepath.Join(dir, fileName)))
		}, "symbolic link"},
		{"journal is a FIFO", func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o750), unix.Mkfifo(filepath.Join(dir, fileName), 0o640))
		}, "no regular file"},
		{"journal is writable for everybody", func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o750), os.WriteFile(filepath.Join(dir, fileName), nil, 0o640),
				os.Chmod(filepath.Join(dir, fileName), 0o666))
		}, "chmod o-w"},
		{"lock is a link", func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o750), os.Symlink("/etc/passwd", filepath.Join(dir, lockName)))
		}, "symbolic link"},
		{"directory is somebody's", func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o750), os.Chown(dir, 4711, 4711))
		}, "belongs to user 4711"},
		{"directory is writable for a group", func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o750), os.Chown(dir, 0, 4711), os.Chmod(dir, 0o770))
		}, "chmod g-w"},
		{"journal is writable for a group", func(dir string) error {
			path := filepath.Join(dir, fileName)
			return errors.Join(os.Mkdir(dir, 0o750), os.WriteFile(path, nil, 0o640), os.Chown(path, 0, 4711), os.Chmod(path, 0o660))
		}, "chmod g-w"},
		{"journal is somebody's", func(dir string) error {
			path := filepath.Join(dir, fileName)
			return errors.Join(os.Mkdir(dir, 0o750), os.WriteFile(path, nil, 0o640), os.Chown(path, 4711, 4711))
		}, "belongs to user 4711"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), dirName)
			err := tt.prepare(dir)
			if errors.Is(err, os.ErrPermission) {
				t.Skip("needs root (CAP_CHOWN)")
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{dir, dir + "/"} {
				_, _, err = Open(dir, here)
				if err == nil || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("open %s: got %v, want an error that says %q", dir, err, tt.says)
				}
			}
		})
	}
}

const dirName = "tsoagent"

func TestCompaction(t *testing.T) {
	dir := newDir(t)
	j, _ := open(t, dir)
	put(t, j, entry("stays", "1"))
	largest := 0
	for i := range 2000 {
		put(t, j, entry("changes", fmt.Sprintf(`{"n":%d}`, i)))
		largest = max(largest, len(content(t, dir)))
	}
	if limit := compactDead + 1024; largest > limit || largest < compactDead {
		t.Errorf("the file grew to %d bytes, want about %d", largest, compactDead)
	}
	if j.size != int64(len(content(t, dir))) {
		t.Errorf("the size is %d, the journal thinks %d", len(content(t, dir)), j.size)
	}
	closeJournal(t, j)
	_, r := open(t, dir)
	if diff := cmp.Diff(map[string]string{"stays": "1", "changes": `{"n":1999}`}, asMap(r.Entries)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestReadScope(t *testing.T) {
	a, err := ReadScope()
	if errors.Is(err, unix.ENOPROTOOPT) {
		t.Skip("needs SO_NETNS_COOKIE (Linux 5.14)")
	}
	if err != nil {
		t.Fatal(err)
	}
	b, err := ReadScope()
	if err != nil || a != b || a.BootID == "" || a.NetnsCookie == 0 {
		t.Errorf("got %+v, then %+v, %v", a, b, err)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN for a network namespace)")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	c, err := ReadScope()
	if err != nil || c.BootID != a.BootID || c.NetnsCookie == a.NetnsCookie {
		t.Errorf("in another namespace: %+v, %v; want another cookie than %+v", c, err, a)
	}
}

func TestReadWithoutJournal(t *testing.T) {
	r, err := Read(filepath.Join(t.TempDir(), "nosuch"), here)
	if err != nil || len(r.Entries) > 0 {
		t.Errorf("got %+v, %v, want nothing and no error", r, err)
	}
}

func BenchmarkPutRemove(b *testing.B) {
	j, _ := open(b, newDir(b))
	for b.Loop() {
		put(b, j, entry("feature/7/tx-tcp-segmentation", `{"wanted":true}`))
		if err := j.Remove("feature/7/tx-tcp-segmentation"); err != nil {
			b.Fatal(err)
		}
	}
}

// TestLockOutlivesAnAgentByItsGuard kills an agent whose lock another process has a copy of: the next one waits for that one's end, and no longer.
func TestLockOutlivesAnAgentByItsGuard(t *testing.T) {
	for _, reaped := range []bool{true, false} {
		t.Run(fmt.Sprintf("reaped %t", reaped), func(t *testing.T) {
			dir := t.TempDir()
			in, out, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			agent := exec.Command(os.Args[0])
			agent.Env = append(os.Environ(), "JOURNAL_TEST_DIE="+dir)
			agent.Stdin = in
			if err := errors.Join(agent.Start(), in.Close()); err != nil {
				t.Fatal(err)
			}
			var info unix.Siginfo
			if err := unix.Waitid(unix.P_PID, agent.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
				t.Fatal(err)
			}
			if reaped {
				_ = agent.Wait()
			} else {
				defer func() { _ = agent.Wait() }()
			}
			lock, err := os.Open(filepath.Join(dir, lockName))
			if err != nil {
				t.Fatal(err)
			}
			defer lock.Close()
			if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
				t.Fatalf("the lock went with the agent: %v", err)
			}
			opened := make(chan error)
			go func() {
				j, _, err := Open(dir, here)
				if err == nil {
					err = j.Close()
				}
				opened <- err
			}()
			select {
			case err := <-opened:
				t.Errorf("it does not wait: %v", err)
			case <-time.After(50 * time.Millisecond): // of waiting
				_ = out.Close()
				if err := <-opened; err != nil {
					t.Error(err)
				}
			}
		})
	}
}
