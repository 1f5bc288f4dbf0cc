package stockkernel

import (
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// entry is what a reader sees of an archive's entry.
type entry struct {
	name string
	mode uint64
	text string
}

// readArchive reads as the kernel does (init/initramfs.c): 13 numbers of 8 hexadecimal digits behind the magic, name and text padded.
func readArchive(t *testing.T, archive string) []entry {
	t.Helper()
	var entries []entry
	take := func(n int) string {
		if n > len(archive) {
			t.Fatalf("%d bytes wanted, %d there", n, len(archive))
		}
		part := archive[:n]
		archive = archive[n:]
		return part
	}
	total := len(archive)
	for {
		if magic := take(6); magic != "070701" {
			t.Fatalf("magic %q", magic)
		}
		var fields [13]uint64
		for i := range fields {
			n, err := strconv.ParseUint(take(8), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			fields[i] = n
		}
		name := take(int(fields[11]))
		take(-(total - len(archive)) & 3)
		text := take(int(fields[6]))
		take(-(total - len(archive)) & 3)
		name, ok := strings.CutSuffix(name, "\x00")
		if !ok {
			t.Fatalf("name %q isn't terminated", name)
		}
		if name == "TRAILER!!!" {
			if archive != "" {
				t.Fatalf("%d bytes behind the trailer", len(archive))
			}
			return entries
		}
		entries = append(entries, entry{name, fields[1], text})
	}
}

func TestArchive(t *testing.T) {
	archive := &cpio{}
	archive.dir("modules")
	archive.file("init", 0o755, []byte("odd"))
	archive.file("modules/00-a.ko", 0o644, []byte(strings.Repeat("x", 4096)))
	archive.file("empty", 0o600, nil)
	want := []entry{
		{"modules", 0o040755, ""},
		{"init", 0o100755, "odd"},
		{"modules/00-a.ko", 0o100644, strings.Repeat("x", 4096)},
		{"empty", 0o100600, ""},
	}
	if diff := cmp.Diff(want, readArchive(t, string(archive.bytes())), cmp.AllowUnexported(entry{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
