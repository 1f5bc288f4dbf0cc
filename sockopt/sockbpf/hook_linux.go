package sockbpf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"

	"tsoagent/sockopt"
)

// A tap is a program on a kernel function, or on a tracepoint.
type tap struct{ program, function string }

// stateTracepoint is where each change of a TCP socket's state is told (include/trace/events/sock.h). It needs no function that is traced.
const stateTracepoint = "inet_sock_set_state"

// in reports whether the kernel has what the tap is for.
func (t tap) in(k *kernel) bool {
	if t.function == stateTracepoint {
		var f *btf.Typedef
		return k.types.TypeByName("btf_trace_"+t.function, &f) == nil
	}
	return k.hasFunc(t.function)
}

// ways are the ways to know each thing, the best first. The taps of a way belong together: all are attached, or none.
var ways = []struct {
	kind sockopt.Kind // that can't be known without it, 0 for none
	ways [][]tap
}{
	{sockopt.MD5, [][]tap{
		{{keysProgMd5Add, "tcp_md5_do_add"}, {keysProgMd5Del, "tcp_md5_do_del"}},
		{{keysProgMd5OptionV4, "tcp_v4_parse_md5_keys"}, {keysProgMd5OptionV6, "tcp_v6_parse_md5_keys"}},
	}},
	{sockopt.AO, [][]tap{{{keysProgAoOption, "tcp_parse_ao"}}}},
	{0, [][]tap{{{keysProgMd5Copy, "tcp_md5_key_copy"}}}},
	{0, [][]tap{{{keysProgMd5Clear, "tcp_clear_md5_list"}}}},
	{0, [][]tap{{{keysProgSockState, stateTracepoint}}}},
}

// Hook tells when keys are set and deleted, and when sockets that hold some begin to listen or to connect, or end, in all network namespaces.
type Hook struct {
	kernel    *kernel // until all is loaded
	maps      *ebpf.Collection
	closers   []io.Closer
	functions []string
	kinds     []sockopt.Kind
	refused   error // why kinds are none
	reader    *ringbuf.Reader
	lost      *ebpf.Variable
	told      uint64 // how many of lost have been told
}

// OpenHook loads and attaches the programs. It needs CAP_BPF and CAP_PERFMON, and no more; without them the error is os.ErrPermission.
// Where the kernel refuses to trace functions, or can't, sockets that hold keys are still told of when their state changes; Refused says why
// there is no more. Where it has no keys, or nothing to tell of them, the error is ErrUnsupported. Events are kept from then on.
func OpenHook() (*Hook, error) { return openHook(func(string) bool { return true }) }

// openHook leaves out the functions that use doesn't take.
func openHook(use func(function string) bool) (*Hook, error) {
	k, err := readKernel()
	if err != nil {
		return nil, err
	}
	h := &Hook{kernel: k}
	if err := h.open(use); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	h.kernel = nil
	return h, nil
}

func (h *Hook) open(use func(function string) bool) error {
	spec, err := loadKeys()
	if err != nil {
		return fmt.Errorf("sockbpf: %w", err)
	}
	if err := h.openRing(spec); err != nil {
		return err
	}
	return h.takeWays(spec, use)
}

// openRing makes the maps that the programs share.
func (h *Hook) openRing(spec *ebpf.CollectionSpec) (err error) {
	maps := spec.Copy()
	maps.Programs = nil
	if h.maps, err = ebpf.NewCollection(maps); err != nil {
		return explain("make the ring of key events", err)
	}
	h.lost = h.maps.Variables[keysVarLost]
	if h.reader, err = ringbuf.NewReader(h.maps.Maps[keysMapEvents]); err != nil {
		return explain("map the ring of key events", err)
	}
	return nil
}

// takeWays takes the first way that works for each thing. What can't be known is no error as long as something can.
func (h *Hook) takeWays(spec *ebpf.CollectionSpec, use func(function string) bool) error {
	var errs []error
	for _, thing := range ways {
		for _, way := range thing.ways {
			if slices.ContainsFunc(way, func(t tap) bool { return !use(t.function) || !t.in(h.kernel) }) {
				continue
			}
			if err := h.take(spec, way); err != nil {
				errs = append(errs, err)
				continue
			}
			if thing.kind != 0 {
				h.kinds = append(h.kinds, thing.kind)
			}
			break
		}
	}
	switch {
	case len(h.kinds) > 0:
		return nil
	case len(errs) > 0:
		h.refused = errs[0] // the best way's
	default:
		h.refused = fmt.Errorf("sockbpf: the kernel has none of its functions for TCP-MD5 and TCP-AO keys (CONFIG_TCP_MD5SIG): %w", ErrUnsupported)
	}
	if slices.Contains(h.functions, stateTracepoint) && holdsKeys(h.kernel.types) {
		return nil
	}
	return h.refused
}

// holdsKeys reports whether the kernel's sockets can hold keys.
func holdsKeys(types *btf.Spec) bool {
	var sock *btf.Struct
	return types.TypeByName("tcp_sock", &sock) == nil &&
		slices.ContainsFunc(sock.Members, func(m btf.Member) bool { return m.Name == "md5sig_info" || m.Name == "ao_info" })
}

// take loads and attaches the programs of a way, or nothing.
func (h *Hook) take(spec *ebpf.CollectionSpec, way []tap) (err error) {
	var taken []io.Closer
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll(taken))
		}
	}()
	for _, t := range way {
		one := spec.Copy()
		one.Programs = map[string]*ebpf.ProgramSpec{t.program: spec.Programs[t.program]}
		options := h.kernel.options()
		options.MapReplacements = h.maps.Maps
		loaded, err := ebpf.NewCollectionWithOptions(one, *options)
		if err != nil {
			return explain("trace "+t.function, err)
		}
		taken = append(taken, closer(loaded.Close))
		l, err := link.AttachTracing(link.TracingOptions{Program: loaded.Programs[t.program]})
		if err != nil {
			return explain("trace "+t.function, err)
		}
		taken = append(taken, l)
	}
	h.closers = append(h.closers, taken...)
	for _, t := range way {
		h.functions = append(h.functions, t.function)
	}
	return nil
}

// closer is a Close that can't fail.
type closer func()

// Close calls it.
func (c closer) Close() error {
	c()
	return nil
}

// closeAll closes the last first: a link goes before its program.
func closeAll(closers []io.Closer) error {
	var errs []error
	for _, c := range slices.Backward(closers) {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// Functions are the kernel's functions that are traced, and its tracepoint inet_sock_set_state, where it tells of sockets that hold keys.
func (h *Hook) Functions() []string { return slices.Clone(h.functions) }

// Watches reports whether keys of this kind are seen when they are set and deleted.
func (h *Hook) Watches(kind sockopt.Kind) bool { return slices.Contains(h.kinds, kind) }

// Refused is why keys that are set and deleted aren't seen, of neither kind, but only the sockets that hold some; nil where they are.
func (h *Hook) Refused() error { return h.refused }

// WatchesSockets reports whether sockets that hold keys are seen when they begin to listen or to connect, and when they end.
func (h *Hook) WatchesSockets() bool { return slices.Contains(h.functions, stateTracepoint) }

// maxDrain bounds the events that are told together: somebody may set keys faster than they are read.
const maxDrain = 4096

// Run calls fn with the events that are there, in order, all of them at once, until ctx is done, and returns nil then. The slice is good until fn
// returns. The kernel keeps events while nobody runs it, or fn does, as many as have room; those that hadn't are told by one Lost when there is
// room again. Run may be called again, but not at the same time.
func (h *Hook) Run(ctx context.Context, fn func([]KeyEvent)) error {
	// Flush wakes the reader, which SetDeadline would wait for.
	defer context.AfterFunc(ctx, func() { _ = h.reader.Flush() })()
	var record ringbuf.Record
	var events []KeyEvent
	for ctx.Err() == nil {
		switch err := h.reader.ReadInto(&record); {
		case errors.Is(err, ringbuf.ErrFlushed):
			continue
		case err != nil:
			return fmt.Errorf("sockbpf: read key events: %w", err)
		}
		e, err := decodeKey(record.RawSample)
		if err != nil {
			e = KeyEvent{Op: Lost, Missing: 1} // not one of ours: what it was to say is missing
		}
		events = append(events, e)
		if record.Remaining > 0 && len(events) < maxDrain {
			continue
		}
		// The ring was full at some time ahead of the last record if it lost some: whatever was lost is told with at most one more.
		if events, err = h.withLost(events); err != nil {
			return err
		}
		fn(events)
		events = events[:0]
	}
	return nil
}

// withLost adds how many more are missing than were told.
func (h *Hook) withLost(events []KeyEvent) ([]KeyEvent, error) {
	var lost uint64
	if err := h.lost.Get(&lost); err != nil {
		return nil, fmt.Errorf("sockbpf: read the number of lost key events: %w", err)
	}
	if lost > h.told {
		events = append(events, KeyEvent{Op: Lost, Missing: lost - h.told})
		h.told = lost
	}
	return events, nil
}

// Close detaches the programs and unloads them. Run must have returned.
func (h *Hook) Close() error {
	err := closeAll(h.closers)
	if h.reader != nil {
		err = errors.Join(err, h.reader.Close())
	}
	if h.maps != nil {
		h.maps.Close()
	}
	return err
}
