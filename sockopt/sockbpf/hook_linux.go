package sockbpf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"

	"tsoagent/sockopt"
)

// A tap is a program on a kernel function. A way is the taps that together tell one thing; all are attached, or none.
type tap struct{ program, function string }

// ways are for each thing to know the ways to know it, the best first.
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
}

// Hook tells when keys are set and deleted, in all network namespaces.
type Hook struct {
	programs  map[string]*ebpf.Program
	links     []link.Link
	functions []string
	kinds     []sockopt.Kind
	reader    *ringbuf.Reader
	lost      *ebpf.Variable
	maps      []*ebpf.Map
	told      uint64 // how many of lost have been told
}

// OpenHook loads and attaches the programs. It needs CAP_BPF and CAP_PERFMON, and no more; without them the error is os.ErrPermission.
// Where the kernel has none of the functions, or can't trace them, it is ErrUnsupported. Events are kept from then on.
func OpenHook() (*Hook, error) {
	types, err := kernelTypes()
	if err != nil {
		return nil, err
	}
	return openHook(types, func(string) bool { return true })
}

// openHook leaves out the functions that use doesn't take.
func openHook(types *btf.Spec, use func(function string) bool) (*Hook, error) {
	h := &Hook{programs: map[string]*ebpf.Program{}}
	if err := h.open(types, func(f string) bool { return use(f) && hasFunc(types, f) }); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

func (h *Hook) open(types *btf.Spec, has func(function string) bool) error {
	spec, err := loadKeys()
	if err != nil {
		return fmt.Errorf("sockbpf: %w", err)
	}
	for _, thing := range ways {
		for _, way := range thing.ways {
			for _, t := range way {
				if !has(t.function) {
					delete(spec.Programs, t.program)
				}
			}
		}
	}
	if len(spec.Programs) == 0 {
		return fmt.Errorf("sockbpf: the kernel has none of its functions for TCP-MD5 and TCP-AO keys (CONFIG_TCP_MD5SIG): %w", ErrUnsupported)
	}
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{KernelTypes: types}})
	if err != nil {
		return explain("load the hook on TCP-MD5 and TCP-AO keys", err)
	}
	h.programs, h.lost = loaded.Programs, loaded.Variables[keysVarLost]
	for _, m := range loaded.Maps {
		h.maps = append(h.maps, m)
	}
	if h.reader, err = ringbuf.NewReader(loaded.Maps[keysMapEvents]); err != nil {
		return explain("map the ring of key events", err)
	}
	return h.attach()
}

// attach takes the first way that works for each thing. What can't be known is no error as long as something can.
func (h *Hook) attach() error {
	var errs []error
	for _, thing := range ways {
		for _, way := range thing.ways {
			err := h.attachAll(way)
			if err == nil {
				if thing.kind != 0 {
					h.kinds = append(h.kinds, thing.kind)
				}
				break
			}
			errs = append(errs, err)
		}
	}
	if len(h.kinds) == 0 {
		return explain("attach the hook on TCP-MD5 and TCP-AO keys", errors.Join(errs...))
	}
	return nil
}

// errAbsent says that the kernel hasn't got the function.
var errAbsent = fmt.Errorf("not in the kernel: %w", ebpf.ErrNotSupported)

func (h *Hook) attachAll(way []tap) error {
	var links []link.Link
	var err error
	for _, t := range way {
		program := h.programs[t.program]
		if program == nil {
			err = fmt.Errorf("%s: %w", t.function, errAbsent)
			break
		}
		var l link.Link
		if l, err = link.AttachTracing(link.TracingOptions{Program: program}); err != nil {
			err = fmt.Errorf("%s: %w", t.function, err)
			break
		}
		links = append(links, l)
	}
	if err != nil {
		for _, l := range links {
			err = errors.Join(err, l.Close())
		}
		return err
	}
	h.links = append(h.links, links...)
	for _, t := range way {
		h.functions = append(h.functions, t.function)
	}
	return nil
}

// Functions are the kernel's functions that are traced.
func (h *Hook) Functions() []string { return slices.Clone(h.functions) }

// Watches reports whether keys of this kind are seen when they are set and deleted.
func (h *Hook) Watches(kind sockopt.Kind) bool { return slices.Contains(h.kinds, kind) }

// Run calls fn with each event, in order, until ctx is done, and returns nil then. The kernel keeps events while nobody runs it, as many
// as have room; those that hadn't are told by one Lost when there is room again. Run may be called again, but not at the same time.
func (h *Hook) Run(ctx context.Context, fn func(KeyEvent)) error {
	h.reader.SetDeadline(time.Time{})
	defer context.AfterFunc(ctx, func() { h.reader.SetDeadline(time.Unix(1, 0)) })()
	var record ringbuf.Record
	for ctx.Err() == nil {
		switch err := h.reader.ReadInto(&record); {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case err != nil:
			return fmt.Errorf("sockbpf: read key events: %w", err)
		}
		// The ring was full at some time ahead of this record if it lost some: whatever was lost is told after at most one more.
		if err := h.tell(record.RawSample, fn); err != nil {
			return err
		}
	}
	return nil
}

func (h *Hook) tell(sample []byte, fn func(KeyEvent)) error {
	var lost uint64
	if err := h.lost.Get(&lost); err != nil {
		return fmt.Errorf("sockbpf: read the number of lost key events: %w", err)
	}
	e, err := decodeKey(sample)
	if err != nil {
		e = KeyEvent{Op: Lost, Missing: 1} // not one of ours: what it was to say is missing
	}
	fn(e)
	if lost > h.told {
		fn(KeyEvent{Op: Lost, Missing: lost - h.told})
		h.told = lost
	}
	return nil
}

// Close detaches the programs and unloads them. Run must have returned.
func (h *Hook) Close() error {
	var errs []error
	for _, l := range h.links {
		errs = append(errs, l.Close())
	}
	if h.reader != nil {
		errs = append(errs, h.reader.Close())
	}
	for _, p := range h.programs {
		errs = append(errs, p.Close())
	}
	for _, m := range h.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
