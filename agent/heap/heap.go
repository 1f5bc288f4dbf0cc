// Package heap gives memory back to the system that a process has no use for any more.
//
// Tables of a million routes are read once, and then little happens for days. The Go runtime collects garbage when the
// heap has grown by a part of what was in use, so what the start or a large change left behind would stay for those days,
// and more than the tables themselves take.
package heap

import (
	"runtime/debug"
	"sync"
	"time"
)

const (
	// large is how much work leaves garbage that is worth a collection, in events or coverages: some megabytes. A
	// collection takes about a millisecond for each megabyte in use.
	large = 20_000
	// quiet is how long it must not go on.
	quiet = 2 * time.Second
	// busy is how much work within that says that it goes on, however little of it is done at once: the rounds of a storm are short.
	busy = 2000
)

// Keeper has memory given back when much was done and no more comes. Without work it does nothing, and wakes nobody.
// The zero value is ready, nil is none. It is safe for concurrent use.
type Keeper struct {
	mu    sync.Mutex
	done  int
	since int         // of it, since timer was set
	timer *time.Timer // nil before the first; it runs where due
	due   bool
	less  func() bool // nil for nothing
	free  func()      // nil for the runtime's
}

// Less has fn called ahead of memory being given back, so that more of it is free. It reports whether that is work by itself: memory is given
// back once more when it is over.
func (k *Keeper) Less(fn func() bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.less = fn
}

// Did notes how much was done at once, in events or coverages.
func (k *Keeper) Did(n int) {
	if k == nil || n == 0 {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.done += n
	if k.due {
		k.since += n
		return
	}
	if k.done < large {
		return
	}
	k.due, k.since = true, 0
	if k.timer == nil {
		k.timer = time.AfterFunc(quiet, k.giveBack)
		return
	}
	k.timer.Reset(quiet)
}

// Soon has memory given back when no more work comes, however little was done: Less has something to say.
func (k *Keeper) Soon() { k.Did(large) }

// Settled says that what was done is over, and no more of it comes: the start of an agent.
func (k *Keeper) Settled() {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.done < large {
		return
	}
	k.done, k.due = 0, false
	k.timer.Stop()
	go k.giveBack()
}

func (k *Keeper) giveBack() {
	k.mu.Lock()
	if k.due && k.since >= busy {
		k.since = 0
		k.timer.Reset(quiet)
		k.mu.Unlock()
		return
	}
	k.done, k.due = 0, false
	less, free := k.less, k.free
	k.mu.Unlock()
	if less != nil && less() {
		k.Did(large)
	}
	if free == nil {
		free = debug.FreeOSMemory
	}
	free()
}
