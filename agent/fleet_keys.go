package agent

import (
	"context"
	"io"
	"runtime/debug"
	"slices"

	"tsoagent/sockopt"
	"tsoagent/sockopt/sockbpf"
)

// keyHook tells of TCP keys that are set or deleted, and of sockets with keys that begin to listen or to connect, or end,
// in whichever namespace (sockbpf.Hook).
type keyHook interface {
	io.Closer
	Run(ctx context.Context, fn func([]sockbpf.KeyEvent)) error
	Functions() []string
	Watches(sockopt.Kind) bool
	WatchesSockets() bool
	Refused() error
}

var _ keyHook = (*sockbpf.Hook)(nil)

func openKeyHook() (keyHook, error) {
	h, err := sockbpf.OpenHook()
	if err != nil {
		return nil, err // and no interface around nil
	}
	return h, nil
}

// hooked says how the agent knows of keys: by functions of the kernel that are traced, or, where there are
// none, by polls, and why.
type hooked struct {
	functions []string  // and the tracepoint of sockets that begin to listen or to connect
	all       bool      // keys of all kinds that are set and deleted, and sockets that go with theirs: polls are for what was missed
	why       string    // why keys that are set on a socket are seen by polls alone
	ao        keyLister // lists TCP-AO's keys, nil where they aren't known
}

// keyLister lists the keys of the sockets in the namespace of the calling thread (sockbpf.HeldIter).
type keyLister interface {
	io.Closer
	Keys() (keys []sockopt.Key, hidden int, err error)
}

var _ keyLister = (*sockbpf.HeldIter)(nil)

// openAO opens what lists TCP-AO's keys: sock_diag doesn't show them.
func openAO() (keyLister, error) {
	it, err := sockbpf.OpenHeld(false)
	if err != nil {
		return nil, err
	}
	return it, nil
}

func (h hooked) on() bool { return len(h.functions) > 0 }

// onlySockets says, ahead of why, what is seen at once where the kernel's key functions can't be traced.
const onlySockets = "sockets that have keys when they begin to listen or to connect are seen at once, other keys by polls, as the kernel's key " +
	"functions are not traced: "

// watchKeys follows the kernel's key functions for all namespaces until the context ends. Where they can't be
// traced, or not any more, all works by polls.
func (f *Fleet) watchKeys(ctx context.Context) {
	h, err := f.openHook()
	if err != nil {
		f.log.Info("TCP keys are polled, as the kernel's key functions are not traced", "why", err)
		polled := hooked{why: oneLine(err)}
		if polled.ao = f.listAO(); polled.ao != nil {
			defer polled.ao.Close()
		}
		f.setHooked(polled)
		<-ctx.Done()
		return
	}
	defer h.Close()
	now := hooked{functions: h.Functions()}
	if err := h.Refused(); err != nil {
		now.why = onlySockets + oneLine(err)
		f.log.Info("TCP keys are polled, but for sockets that have keys when they begin to listen or to connect, as the kernel's key functions "+
			"are not traced", "why", err)
	}
	if now.ao = f.listAO(); now.ao != nil {
		defer now.ao.Close()
	}
	now.all = h.Watches(sockopt.MD5) && (h.WatchesSockets() || slices.Contains(now.functions, "tcp_clear_md5_list")) &&
		(now.ao == nil || h.Watches(sockopt.AO))
	f.setHooked(now)
	// Reading the kernel's types took some megabytes, which would stay with us until the heap has grown by as much again.
	debug.FreeOSMemory()
	err = h.Run(ctx, f.keysChanged)
	if ctx.Err() == nil {
		f.log.Warn("the kernel's key functions are not followed any more: TCP keys are polled", "err", err)
		f.setHooked(hooked{why: oneLine(err), ao: now.ao})
		<-ctx.Done() // what lists TCP-AO's keys stays open: keys that are not looked for are not gone
	}
}

// listAO opens what lists TCP-AO's keys, nil where the kernel has none or doesn't show them. It needs no function that is traced.
func (f *Fleet) listAO() keyLister {
	ao, err := f.openAO()
	if err != nil {
		f.log.Info("TCP-AO keys are not seen", "why", err)
		return nil
	}
	return ao
}

// keysChanged has the keys looked at in the namespaces that events are about, once in each. The events only ask for that: what
// is there now, the kernel's sockets say.
func (f *Fleet) keysChanged(events []sockbpf.KeyEvent) {
	urgent, everywhere := wantedLooks(events)
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, m := range f.members {
		now, wanted := urgent[id.Ino]
		switch {
		case m.agent == nil:
		case now || everywhere:
			m.agent.sources.lookAtKeys()
		case wanted:
			m.agent.sources.lookAtKeysSoon()
		}
	}
}

// wantedLooks are the namespaces, by the inode, in which keys are to be looked at, and whether that is urgent; everywhere says that they all are.
func wantedLooks(events []sockbpf.KeyEvent) (urgent map[uint64]bool, everywhere bool) {
	urgent = map[uint64]bool{}
	for _, ev := range events {
		switch ev.Op {
		case sockbpf.Lost:
			everywhere = true
		case sockbpf.Inherited, sockbpf.Connected, sockbpf.Cleared: // as often as connections come and go
			urgent[uint64(ev.Netns)] = urgent[uint64(ev.Netns)]
		default:
			urgent[uint64(ev.Netns)] = true
		}
	}
	return urgent, everywhere
}

// setHooked tells all namespaces' sources how keys are known from now on.
func (f *Fleet) setHooked(h hooked) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hooked = h
	for _, m := range f.members {
		if m.agent != nil {
			m.agent.sources.setHooked(h)
			m.agent.inbox.post(batch{}) // a round, whose report says so
		}
	}
}
