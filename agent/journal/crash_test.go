package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// history writes a journal and returns it with the state after each of its lines.
func history(t testing.TB) (file []byte, states []map[string]string) {
	dir := newDir(t)
	j, _ := open(t, dir)
	state := map[string]string{}
	snap := func() { states = append(states, maps.Clone(state)) }
	snap() // nothing
	snap() // the header
	for i := range 6 {
		a, b := fmt.Sprintf("feature/%d/tso", i), fmt.Sprintf("route/10.%d.0.0/16", i%2)
		put(t, j, entry(a, fmt.Sprintf(`{"n":%d}`, i)), entry(b, fmt.Sprint(i)))
		state[a] = fmt.Sprintf(`{"n":%d}`, i)
		snap()
		state[b] = fmt.Sprint(i)
		snap()
		if i%3 == 2 {
			if err := j.Remove(a); err != nil {
				t.Fatal(err)
			}
			delete(state, a)
			snap()
		}
	}
	closeJournal(t, j)
	return content(t, dir), states
}

func asMap(entries []Entry) map[string]string {
	m := map[string]string{}
	for _, e := range entries {
		m[e.ID] = string(e.Data)
	}
	return m
}

func TestCrashAtEveryByte(t *testing.T) {
	file, states := history(t)
	dir := newDir(t)
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	for n := range len(file) + 1 {
		if err := os.WriteFile(filepath.Join(dir, fileName), file[:n], 0o640); err != nil {
			t.Fatal(err)
		}
		want := states[bytes.Count(file[:n], []byte("\n"))]
		torn := 0
		if n > 0 && file[n-1] != '\n' {
			torn = 1
		}
		check := func(what string, r *Recovery) {
			t.Helper()
			if diff := cmp.Diff(want, asMap(r.Entries)); diff != "" || r.Torn != torn || len(r.Problems)+len(r.Foreign) > 0 {
				t.Errorf("%s, %d bytes: %+v (-want +got):\n%s", what, n, r, diff)
			}
		}
		looked, err := Read(dir, here)
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		check("read", looked)
		j, r := open(t, dir)
		check("open", r)
		put(t, j, entry("next", "1"))
		closeJournal(t, j)
		// What is written after a crash is whole.
		want, torn = maps.Clone(want), 0
		want["next"] = "1"
		j, r = open(t, dir)
		check("open again", r)
		closeJournal(t, j)
	}
}

// A byte that is not what was written can cost what its line said, and never makes up anything.
func TestEveryByteFlipped(t *testing.T) {
	file, states := history(t)
	ever := map[string]bool{}
	for _, s := range states {
		for id, data := range s {
			ever[id+" "+data] = true
		}
	}
	for n := range file {
		for _, x := range []byte{0x01, 0x20, 0x80, file[n], file[n] ^ '\n'} {
			if x == 0 {
				continue
			}
			bad := slices.Clone(file)
			bad[n] ^= x
			p, err := parse(bad)
			if err != nil {
				t.Fatalf("byte %d ^ %#x: %v", n, x, err)
			}
			if len(p.problems)+p.torn == 0 {
				t.Errorf("byte %d ^ %#x: not noticed", n, x)
			}
			for id, data := range asMap(p.recovery(here).Entries) {
				if !ever[id+" "+data] {
					t.Errorf("byte %d ^ %#x: made up %s %s", n, x, id, data)
				}
			}
		}
	}
}

func TestDamagedFileIsKeptAndRepaired(t *testing.T) {
	file, states := history(t)
	dir := newDir(t)
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	bad := slices.Clone(file)
	bad[bytes.IndexByte(bad, '\n')+20] ^= 1 // in the second line: the put of feature/0/tso
	if err := os.WriteFile(filepath.Join(dir, fileName), bad, 0o640); err != nil {
		t.Fatal(err)
	}
	want := maps.Clone(states[len(states)-1])
	delete(want, "feature/0/tso")
	for round := range 2 {
		j, r := open(t, dir)
		if diff := cmp.Diff(want, asMap(r.Entries)); diff != "" {
			t.Errorf("round %d (-want +got):\n%s", round, diff)
		}
		if len(r.Problems) != 1-round {
			t.Errorf("round %d: problems %q", round, r.Problems)
		}
		closeJournal(t, j)
	}
	if kept, err := os.ReadFile(filepath.Join(dir, damagedName)); err != nil || !bytes.Equal(kept, bad) {
		t.Errorf("the damaged file was not kept: %v", err)
	}
}

// A disk that is full: the journal stays as it was, and works again when there is room.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN for a small tmpfs in a mount namespace of its own)")
	}
	mnt := t.TempDir()
	// The thread is never unlocked, so it ends with the test, and its mounts with it.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		t.Skipf("needs mount namespaces: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) }()
	j, _, err := Open(filepath.Join(mnt, dirName), here)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	put(t, j, entry("first", "1"))
	before := j.Entries()
	big := json.RawMessage(`"` + strings.Repeat("x", 200<<10) + `"`)
	for range 2 {
		if err := j.Put(entry("second", "2"), Entry{ID: "big", Kind: "k", Data: big}); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("got %v, want ENOSPC", err)
		}
		if diff := cmp.Diff(before, j.Entries()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		r, err := Read(filepath.Join(mnt, dirName), here)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, r.Entries); diff != "" {
			t.Errorf("on disk (-want +got):\n%s", diff)
		}
	}
	put(t, j, entry("third", "3"))
	r, err := Read(filepath.Join(mnt, dirName), here)
	if err != nil || len(r.Entries) != 2 || r.Torn != 0 || len(r.Problems) > 0 {
		t.Errorf("got %+v, %v", r, err)
	}
}

// A write that fails changes nothing, and the next one starts on a new file.
func TestFailedWrite(t *testing.T) {
	dir := newDir(t)
	j, _ := open(t, dir)
	put(t, j, entry("first", "1"))
	real := j.file
	readOnly, err := os.Open(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	j.file = readOnly
	if err := j.Put(entry("second", "2")); err == nil {
		t.Fatal("no error")
	}
	if err := real.Close(); err != nil {
		t.Fatal(err)
	}
	if got := asMap(j.Entries()); len(got) != 1 {
		t.Errorf("got %v", got)
	}
	if err := j.Remove("first"); err != nil {
		t.Fatal(err)
	}
	put(t, j, entry("third", "3"))
	closeJournal(t, j)
	_, r := open(t, dir)
	if diff := cmp.Diff(map[string]string{"third": "3"}, asMap(r.Entries)); diff != "" || r.Torn > 0 || len(r.Problems) > 0 {
		t.Errorf("%+v (-want +got):\n%s", r, diff)
	}
}

func TestJournalIsAMap(t *testing.T) {
	parent := newDir(t)
	if err := os.Mkdir(parent, 0o750); err != nil {
		t.Fatal(err)
	}
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		dir := filepath.Join(parent, fmt.Sprint(n))
		compact := CompactAfter(rapid.Int64Range(0, 500).Draw(rt, "compact after"))
		j, _, err := Open(dir, here, compact)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = j.Close() }()
		model := map[string]string{}
		ids := rapid.SampledFrom([]string{"a", "b", "c", "d/é", "e \n f"})
		rt.Repeat(map[string]func(*rapid.T){
			"put": func(rt *rapid.T) {
				var batch []Entry
				for range rapid.IntRange(0, 3).Draw(rt, "n") {
					id, data := ids.Draw(rt, "id"), fmt.Sprint(rapid.IntRange(0, 9).Draw(rt, "data"))
					batch = append(batch, entry(id, data))
					model[id] = data
				}
				if err := j.Put(batch...); err != nil {
					rt.Fatal(err)
				}
			},
			"remove": func(rt *rapid.T) {
				gone := rapid.SliceOfN(ids, 0, 3).Draw(rt, "ids")
				if err := j.Remove(gone...); err != nil {
					rt.Fatal(err)
				}
				for _, id := range gone {
					delete(model, id)
				}
			},
			"reopen": func(rt *rapid.T) {
				if err := j.Close(); err != nil {
					rt.Fatal(err)
				}
				var r *Recovery
				if j, r, err = Open(dir, here, compact); err != nil {
					rt.Fatal(err)
				}
				if diff := cmp.Diff(model, asMap(r.Entries)); diff != "" || r.Torn > 0 || len(r.Problems) > 0 {
					rt.Fatalf("%+v (-want +got):\n%s", r, diff)
				}
			},
			"": func(rt *rapid.T) {
				if diff := cmp.Diff(model, asMap(j.Entries())); diff != "" {
					rt.Fatalf("(-want +got):\n%s", diff)
				}
				var live int64
				for _, e := range j.entries {
					live += int64(e.size)
				}
				header, _, _ := encodeLine(record{Format: formatName, Version: formatVersion})
				if j.live != live+int64(len(header)) {
					rt.Fatalf("%d live bytes, the journal thinks %d", live+int64(len(header)), j.live)
				}
			},
		})
	})
}

func FuzzParse(f *testing.F) {
	file, _ := history(f)
	f.Add(file)
	f.Add(file[:len(file)/2])
	f.Add([]byte("00000000 0 \n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parse(b)
		if err != nil {
			if !errors.Is(err, ErrVersion) {
				t.Errorf("got %v, want ErrVersion", err)
			}
			return
		}
		if p.good > len(b) || p.good > 0 && b[p.good-1] != '\n' {
			t.Errorf("the good part ends at %d", p.good)
		}
		// What was believed is written and read as the same.
		for _, e := range p.entries {
			line, back, err := encodeLine(record{Put: &e.Entry})
			if err != nil {
				t.Fatal(err)
			}
			again, _, err := encodeLine(back)
			if err != nil || !bytes.Equal(line, again) {
				t.Errorf("%q is not %q: %v", line, again, err)
			}
		}
	})
}

// FuzzRecord seals what may stand in a line, so that the checksum keeps nothing away from what is behind it: what is believed is written and read
// as the same, and one line is never two entries.
func FuzzRecord(f *testing.F) {
	file, _ := history(f)
	for line := range bytes.Lines(file) {
		f.Add(bytes.SplitN(bytes.TrimSuffix(line, []byte("\n")), []byte(" "), 3)[2])
	}
	f.Add([]byte(`{"put":{"id":"a","kind":"b","data":{"a":1e999}}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		line := fmt.Appendf(nil, "%08x %d %s", crc32.Checksum(text, castagnoli), len(text), text)
		r, err := decodeLine(line)
		if err != nil {
			return
		}
		again, back, err := encodeLine(r)
		if err != nil || bytes.Count(again, []byte("\n")) != 1 {
			t.Fatalf("%+v is written as %q, %v", r, again, err)
		}
		if once, _, err := encodeLine(back); err != nil || !bytes.Equal(once, again) {
			t.Errorf("%q is not %q: %v", again, once, err)
		}
		if p, err := parse(append(line, '\n')); err == nil && len(p.entries) > 1 {
			t.Errorf("%d entries in %q", len(p.entries), line)
		}
	})
}
