// Package journal remembers what the agent changed in the kernel, so that it can be undone also
// after a crash: an entry is written and synced before the change is made, and removed after it
// was undone.
//
//	Put ──> change ──> … ──> undo ──> Remove
//
// So an entry means "may have been changed", never "was changed", and what has no entry was not
// changed by us. The package knows nothing of what the entries mean.
package journal

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"tsoagent/failpoint"
)

// Scope is where an entry is true: in one network namespace, for as long as the machine is not
// booted again. The kernel's state dies with either.
type Scope struct {
	// BootID is /proc/sys/kernel/random/boot_id.
	BootID string `json:"boot"`
	// NetnsCookie is the number of the namespace that is never given twice in a boot
	// (SO_NETNS_COOKIE).
	NetnsCookie uint64 `json:"netns"`
}

// Kind says what an entry is about, and so what its data mean: "feature", "route" …
type Kind string

// Entry is one object that may have been changed.
type Entry struct {
	// ID is chosen by the caller and unique for each object, "feature/7/tx-tcp-segmentation".
	ID   string `json:"id"`
	Kind Kind   `json:"kind"`
	// Scope is filled in by Put.
	Scope Scope `json:"scope"`
	// Data are the caller's. They come back as compact JSON.
	Data json.RawMessage `json:"data,omitempty"`
}

// Recovery is what an earlier run left behind.
type Recovery struct {
	// Entries are of this boot and namespace, sorted by ID.
	Entries []Entry
	// Foreign are entries of another namespace or boot, which must not be undone here. Those of
	// another namespace stay in the file, those of another boot go with the next compaction.
	Foreign []Entry
	// Torn is the number of writes that were cut short by a crash. The kernel was not touched
	// for them.
	Torn int
	// Problems are the lines that can't be trusted, for a person to read.
	Problems []string
}

// ErrLocked is matched (errors.Is) by LockedError.
var ErrLocked = errors.New("the journal is in use")

// LockedError says that another process has the journal open.
type LockedError struct {
	Dir string
	// PID is the process, 0 if it is not known.
	PID int
}

func (e *LockedError) Error() string {
	who := "another process"
	if e.PID != 0 {
		who = fmt.Sprintf("process %d", e.PID)
	}
	return fmt.Sprintf("journal: %s is in use by %s; stop that one first", e.Dir, who)
}

// Is makes errors.Is(err, ErrLocked) true.
func (e *LockedError) Is(target error) bool { return target == ErrLocked }

const (
	fileName    = "journal"
	newName     = "journal.new"
	damagedName = "journal.damaged"
	lockName    = "lock"

	// compactDead is how many bytes of dead lines are worth a compaction.
	compactDead = 64 << 10
)

// Option changes how a journal is kept.
type Option func(*Journal)

// CompactAfter sets how many bytes of dead lines, if they also outweigh the live ones, make the
// file be written anew. The default is 64 KiB.
func CompactAfter(bytes int64) Option { return func(j *Journal) { j.compactDead = bytes } }

// A Journal is an open journal. It is safe for concurrent use.
type Journal struct {
	scope       Scope
	compactDead int64

	mu   sync.Mutex
	dir  *directory
	lock *os.File
	file *os.File
	// size is the length of the file, live that of the header and of the lines of entries.
	size, live int64
	entries    map[key]stored
	foreign    int // entries of other namespaces, which stay as they are
	// suspect is set after a failed write: what the end of the file looks like is not known,
	// so it is written anew before anything else is.
	suspect error
	// patience is how many dead bytes a failed compaction has made us bear.
	patience int64
}

// Open opens the journal in dir, which is created if need be, and locks it against a second
// agent (LockedError). The lock goes with the process. A journal that is torn or damaged is no
// error: what can be trusted is in the Recovery, and a damaged file is kept as journal.damaged.
//
// dir, and the files in it, are refused if they are a symbolic link, owned by somebody else
// than root or the effective user, or writable for everybody. The directories above are taken
// as they are.
func Open(dir string, scope Scope, opts ...Option) (*Journal, *Recovery, error) {
	if scope.BootID == "" {
		return nil, nil, errors.New("journal: open: the scope has no boot id")
	}
	d, err := openDirectory(dir, true)
	if err != nil {
		return nil, nil, fmt.Errorf("journal: open %s: %w", dir, err)
	}
	j := &Journal{scope: scope, compactDead: compactDead, dir: d}
	if failpoint.Armed() {
		j.compactDead = 2 << 10 // the tests are to meet it
	}
	for _, opt := range opts {
		opt(j)
	}
	recovery, err := j.open()
	if err != nil {
		err = errors.Join(err, j.release())
		if locked := (*LockedError)(nil); errors.As(err, &locked) {
			return nil, nil, err
		}
		return nil, nil, fmt.Errorf("journal: open %s: %w", dir, err)
	}
	return j, recovery, nil
}

func (j *Journal) open() (recovery *Recovery, err error) {
	if j.lock, err = j.dir.lock(); err != nil {
		return nil, err
	}
	b, file, err := j.dir.read(unix.O_RDWR | unix.O_APPEND)
	if err != nil {
		return nil, err
	}
	j.file = file
	p, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", fileName, err)
	}
	recovery = p.recovery(j.scope)
	j.entries = p.entries
	maps.DeleteFunc(j.entries, func(k key, _ stored) bool { return k.Scope.BootID != j.scope.BootID })
	for k := range j.entries {
		if k.Scope != j.scope {
			j.foreign++
		}
	}

	if len(p.problems) > 0 {
		if err := j.dir.keepDamaged(); err != nil {
			return nil, fmt.Errorf("keep the damaged file: %w", err)
		}
	}
	if file == nil || !p.header || p.torn > 0 || len(p.problems) > 0 {
		return recovery, j.compact()
	}
	j.size = int64(p.good)
	header, _, err := encodeLine(record{Format: formatName, Version: formatVersion})
	j.live = int64(len(header))
	for _, e := range j.entries {
		j.live += int64(e.size)
	}
	return recovery, err
}

// recovery sorts the entries by where they are true.
func (p parsed) recovery(scope Scope) *Recovery {
	r := &Recovery{Torn: p.torn, Problems: p.problems}
	for _, e := range p.entries {
		if e.Scope == scope {
			r.Entries = append(r.Entries, e.Entry.clone())
		} else {
			r.Foreign = append(r.Foreign, e.Entry.clone())
		}
	}
	slices.SortFunc(r.Entries, compare)
	slices.SortFunc(r.Foreign, compare)
	return r
}

func compare(a, b Entry) int {
	return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Scope.BootID, b.Scope.BootID),
		cmp.Compare(a.Scope.NetnsCookie, b.Scope.NetnsCookie))
}

func (e Entry) clone() Entry {
	e.Data = slices.Clone(e.Data)
	return e
}

// Read reads the journal in dir without locking or changing it, for those who only look. It can
// run while an agent writes; a write that is under way counts as torn. Where there is no
// journal, the recovery is empty.
func Read(dir string, scope Scope) (*Recovery, error) {
	d, err := openDirectory(dir, false)
	if errors.Is(err, os.ErrNotExist) {
		return &Recovery{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: read %s: %w", dir, err)
	}
	defer d.Close()
	b, file, err := d.read(unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("journal: read %s: %w", dir, err)
	}
	if file != nil {
		defer file.Close()
	}
	p, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("journal: read %s: %s: %w", dir, fileName, err)
	}
	return p.recovery(scope), nil
}

// Put writes entries, replacing those with the same ID, and returns when they are on disk: one
// write and one sync for all of them. An entry that is there already is not written again. If
// Put returns an error, the journal is as it was before, and the kernel must not be touched.
//
// A crash during Put can leave some of the entries behind and not others.
func (j *Journal) Put(entries ...Entry) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var c change
	for _, e := range entries {
		if e.Scope == (Scope{}) {
			e.Scope = j.scope
		}
		if e.Scope != j.scope {
			return fmt.Errorf("journal: put %s: it is of another boot or namespace", e.ID)
		}
		if err := e.check(); err != nil {
			return fmt.Errorf("journal: put: %w", err)
		}
		line, back, err := encodeLine(record{Put: &e})
		if err != nil {
			return fmt.Errorf("journal: put %s: %w", e.ID, err)
		}
		if old, ok := j.entries[e.key()]; ok && len(entries) == 1 && old.Kind == e.Kind && string(old.Data) == string(back.Put.Data) {
			return nil
		}
		c.lines = append(c.lines, line...)
		c.puts = append(c.puts, stored{*back.Put, len(line)})
	}
	if err := j.commit(c); err != nil {
		return fmt.Errorf("journal: put %d entries: %w", len(entries), err)
	}
	return nil
}

// Remove removes entries and returns when that is on disk. IDs that are not there are ignored.
// If it returns an error, the journal is as it was before.
func (j *Journal) Remove(ids ...string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var c change
	for _, id := range ids {
		k := key{id, j.scope}
		if _, ok := j.entries[k]; !ok {
			continue
		}
		line, _, err := encodeLine(record{Remove: &k})
		if err != nil {
			return fmt.Errorf("journal: remove %s: %w", id, err)
		}
		c.lines = append(c.lines, line...)
		c.removes = append(c.removes, k)
	}
	if err := j.commit(c); err != nil {
		return fmt.Errorf("journal: remove %d entries: %w", len(ids), err)
	}
	return nil
}

// Entries returns the entries of this boot and namespace, sorted by ID.
func (j *Journal) Entries() []Entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	return parsed{entries: j.entries}.recovery(j.scope).Entries
}

// Len is how many entries there are of this boot and namespace. It is cheap.
func (j *Journal) Len() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.entries) - j.foreign
}

// LockFile is a copy of the lock's file, for another process: where this one ends without closing the journal, the lock lasts until that one does,
// too, or closes its copy (flock(2)).
func (j *Journal) LockFile() (*os.File, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.lock == nil {
		return nil, fmt.Errorf("journal: %w", os.ErrClosed)
	}
	fd, err := unix.FcntlInt(j.lock.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("journal: copy the lock: %w", os.NewSyscallError("fcntl", err))
	}
	return os.NewFile(uintptr(fd), j.lock.Name()), nil
}

// Close closes the journal and gives up the lock. The entries stay.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file == nil {
		return nil
	}
	if err := j.release(); err != nil {
		return fmt.Errorf("journal: close: %w", err)
	}
	return nil
}

func (j *Journal) release() error {
	var errs []error
	if j.lock != nil {
		errs = append(errs, unlock(j.lock))
	}
	for _, f := range []*os.File{j.file, j.lock} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	j.file, j.lock = nil, nil
	return errors.Join(append(errs, j.dir.Close())...)
}
