package journal

import (
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// A change is a batch of lines and what they do to the entries.
type change struct {
	lines   []byte
	puts    []stored
	removes []key
}

// commit writes and syncs a change and applies it to the entries, or does neither.
func (j *Journal) commit(c change) error {
	if j.file == nil {
		return os.ErrClosed
	}
	if len(c.lines) == 0 {
		return nil
	}
	if j.suspect != nil {
		if err := j.compact(); err != nil {
			return fmt.Errorf("%w (after %w)", err, j.suspect)
		}
	}
	if err := j.append(c.lines); err != nil {
		j.suspect = err
		// What a crash would find is as good with as without the end of this write: the kernel
		// was not touched. So this may fail; compact makes it right.
		_ = j.file.Truncate(j.size)
		return err
	}
	j.size += int64(len(c.lines))
	for _, e := range c.puts {
		j.live += int64(e.size - j.entries[e.key()].size)
		j.entries[e.key()] = e
	}
	for _, k := range c.removes {
		j.live -= int64(j.entries[k].size)
		delete(j.entries, k)
	}

	dead := j.size - j.live
	if dead > j.live && dead > j.compactDead+j.patience {
		if err := j.compact(); err != nil {
			// The change is on disk all the same. Try again when there is as much more to gain.
			j.patience = dead
		}
	}
	return nil
}

func (j *Journal) append(b []byte) error {
	failpoint.Hit("journal-append-before")
	if failpoint.Here("journal-append-torn") {
		_, _ = j.file.Write(b[:len(b)/2])
		failpoint.Die()
	}
	if _, err := j.file.Write(b); err != nil {
		return err
	}
	failpoint.Hit("journal-append-written")
	if err := unix.Fdatasync(int(j.file.Fd())); err != nil {
		return os.NewSyscallError("fdatasync", err)
	}
	failpoint.Hit("journal-append-synced")
	return nil
}

// compact writes the entries to a new file and puts it in the place of the old one. If it fails
// before that, the old file and everything else is as it was.
func (j *Journal) compact() error {
	b, _, err := encodeLine(record{Format: formatName, Version: formatVersion})
	if err != nil {
		return err
	}
	for _, k := range slices.SortedFunc(maps.Keys(j.entries), func(a, b key) int {
		return compare(j.entries[a].Entry, j.entries[b].Entry)
	}) {
		e := j.entries[k].Entry
		line, _, err := encodeLine(record{Put: &e})
		if err != nil {
			return err
		}
		b = append(b, line...)
	}
	file, err := j.dir.replace(b)
	if file == nil {
		return fmt.Errorf("write it anew: %w", err)
	}
	if j.file != nil {
		_ = j.file.Close()
	}
	j.file, j.size, j.live, j.patience = file, int64(len(b)), int64(len(b)), 0
	j.suspect = err
	if err != nil {
		return fmt.Errorf("write it anew: %w", err)
	}
	return nil
}
