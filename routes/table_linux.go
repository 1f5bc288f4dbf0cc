package routes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// A Table writes routes and rules to the kernel and reads them back. It belongs to the network
// namespace of the thread that opened it and is not safe for concurrent use: a program has one
// for each namespace, and none of them shared with a Watcher.
//
// The kernel's errors can be told apart by errors.Is with a syscall.Errno; their text holds
// the kernel's own explanation.
type Table struct {
	c   *talk
	dec Decoder
	out []byte // the messages of a batch
	// answers reads those of LookupAll, nil before the first.
	answers *train
	payload []byte // of a question
}

// tableBuffer is room for what the kernel tells of a batch, which is a KiB for each write, or much more where a route has many ways: all
// of it is there before the first is read.
const tableBuffer = 4 << 20

// OpenTable opens a Table in the network namespace of the calling thread.
func OpenTable() (*Table, error) {
	c, err := dialTalk(tableBuffer)
	if err != nil {
		return nil, err
	}
	return &Table{c: c}, nil
}

// File is a copy of its socket for another process, which TableFrom makes a Table of there, once this one is not used any more.
func (t *Table) File() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(t.c.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("routes: copy a socket: %w", os.NewSyscallError("fcntl", err))
	}
	return os.NewFile(uintptr(fd), "rtnetlink"), nil
}

// TableFrom makes a Table of the copy of another one's socket. It takes the file over, also where it fails.
func TableFrom(f *os.File) (*Table, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("routes: copy a socket: %w", os.NewSyscallError("fcntl", err))
	}
	c, err := talkOn(fd)
	if err != nil {
		return nil, err
	}
	return &Table{c: c}, nil
}

// Close closes the connection.
func (t *Table) Close() error { return t.c.Close() }

// Port is the netlink port of the Table: the Origin.Port of the events that its writes cause.
func (t *Table) Port() uint32 { return t.c.PID() }

// Replace changes the first route with the key of msg (from EncodeLock). It does not create
// one: if the route is gone, the error is ENOENT in both families. seq is the Origin.Seq of the
// events that the write causes; a replace that changes nothing causes none.
func (t *Table) Replace(msg []byte) (seq uint32, err error) {
	return t.write("replace", Write{Op: OpReplace, Msg: msg})
}

// Add adds a route, or fails with EEXIST where there is one with its key.
func (t *Table) Add(msg []byte) (seq uint32, err error) {
	return t.write("add", Write{Op: OpAdd, Msg: msg})
}

// Put adds a route or replaces the one with its key. It is for the table of our own.
func (t *Table) Put(msg []byte) (seq uint32, err error) {
	return t.write("put", Write{Op: OpPut, Msg: msg})
}

// Delete removes the route that msg names, ESRCH if there is none.
func (t *Table) Delete(msg []byte) (seq uint32, err error) {
	return t.write("delete", Write{Op: OpDelete, Msg: msg})
}

// AddRule adds a rule, EEXIST if there is the same one.
//
// The kernel says so as well where what the new rule has is the same, and there is a rule of its priority, action and table that has more: of
// addresses it compares those that the new one has (fib4_rule_compare, net/ipv4/fib_rules.c; fib6_rule_compare). Such a rule is added nonetheless.
func (t *Table) AddRule(r Rule) error {
	w, err := t.rule(r)
	if err != nil {
		return err
	}
	err = w.do("add", OpAddRule)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	switch have, derr := t.Rules(r.Family); {
	case derr != nil:
		return derr // whether it is there is not known
	case slices.Contains(have, w.rule):
		return err
	}
	return w.do("add", opAppendRule)
}

// DeleteRule removes a rule, ENOENT if there is no such.
//
// The kernel removes the first one that has what is asked for, and may have more (rule_find, net/core/fib_rules.c). It tells which that was:
// another one is added again, behind the others of its priority. It has the protocol of r in any case.
func (t *Table) DeleteRule(r Rule) error {
	w, err := t.rule(r)
	if err != nil {
		return err
	}
	var others []Rule
	for err = w.do("delete", OpDeleteRule); err == nil && w.told != w.rule; err = w.do("delete", OpDeleteRule) {
		others = append(others, w.told)
	}
	if lost := t.putBack(others); lost != nil {
		return lost // which is worse than that r was not there
	}
	return err
}

// putBack adds rules again that were removed for another one.
func (t *Table) putBack(rules []Rule) error {
	var errs []error
	for _, r := range rules {
		w, err := t.rule(r)
		if err == nil {
			err = w.do("add", opAppendRule)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// ruleWrite writes a rule.
type ruleWrite struct {
	t    *Table
	msg  []byte
	rule Rule // as the kernel tells of it
	told Rule // of which it has told
}

func (t *Table) rule(r Rule) (*ruleWrite, error) {
	msg, err := EncodeRule(r)
	if err != nil {
		return nil, err
	}
	w := &ruleWrite{t: t, msg: msg}
	err = w.hear(Header{Type: rtmNewRule}, msg)
	w.rule = w.told
	return w, err
}

func (w *ruleWrite) hear(h Header, data []byte) error {
	ev, err := w.t.dec.Decode(h, data)
	switch ev := ev.(type) {
	case RuleSet:
		w.told = *ev.Rule
	case RuleGone:
		w.told = *ev.Rule
	}
	return err
}

func (w *ruleWrite) do(verb string, op Op) error {
	w.told = w.rule
	typ, flags := op.header()
	if _, err := w.t.c.request(typ, flags|unix.NLM_F_ACK|unix.NLM_F_ECHO, w.msg, w.hear); err != nil {
		return fmt.Errorf("routes: %s rule %d: %w", verb, w.rule.Priority, err)
	}
	return nil
}

// Op is what a Write does.
type Op uint8

// The operations; each is the Table's method of that name.
const (
	OpReplace Op = iota + 1
	OpAdd
	OpPut
	OpDelete
	OpAddRule
	OpDeleteRule
	opAppendRule // whatever there is
)

func (o Op) header() (typ, flags uint16) {
	switch o {
	case OpReplace:
		return rtmNewRoute, unix.NLM_F_REPLACE
	case OpAdd:
		return rtmNewRoute, unix.NLM_F_CREATE | unix.NLM_F_EXCL
	case OpPut:
		return rtmNewRoute, unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	case OpDelete:
		return rtmDelRoute, 0
	case OpAddRule:
		return rtmNewRule, unix.NLM_F_CREATE | unix.NLM_F_EXCL
	case OpDeleteRule:
		return rtmDelRule, 0
	case opAppendRule:
		return rtmNewRule, unix.NLM_F_CREATE
	}
	return unix.NLMSG_NOOP, 0
}

// Write is one operation of a batch.
type Write struct {
	Op  Op
	Msg []byte // the payload, from one of the Encode functions
}

// Result is what became of a Write.
type Result struct {
	Seq uint32 // the Origin.Seq of its events
	Err error  // the kernel's answer, nil if it was done
	// Events are what every Watcher will be told of an OpPut or OpDelete, in its order, and nil of others. A put that changes nothing has none
	// on IPv4.
	Events []Event
}

// batchBytes and batchLen bound what goes into one system call, below the default send buffer
// and such that all errors fit the receive buffer. The kernel takes its routing lock for each
// write anew (rtnetlink_rcv_msg, net/core/rtnetlink.c), so that others get it in between.
const (
	batchBytes = 64 << 10
	batchLen   = 256
)

// Batch does several writes in as few system calls as it can, in order, each on its own: one
// that fails does not stop the others. The results stand in the order of the writes. The error
// is for the connection itself; results are then missing or incomplete.
func (t *Table) Batch(writes []Write) ([]Result, error) {
	results := make([]Result, 0, len(writes))
	for len(writes) > 0 {
		done := len(results)
		results = t.encodeBatch(writes, results)
		n := len(results) - done
		if err := t.c.send(t.out); err != nil {
			return results[:done], fmt.Errorf("routes: send %d writes: %w", n, err)
		}
		if err := t.c.acknowledged(&t.dec, results[done:]); err != nil {
			return results[:done], fmt.Errorf("routes: wait for %d writes: %w", n, err)
		}
		writes = writes[n:]
	}
	return results, nil
}

// encodeBatch puts as many of the writes into the buffer as go into one system call, and appends
// a result for each. Only the last one asks for an acknowledgement: of the others the kernel
// tells errors alone, in order (netlink_rcv_skb, net/netlink/af_netlink.c). What is for a table of our
// own has its notification sent here, too (NLM_F_ECHO; nlmsg_notify, net/netlink/af_netlink.c).
func (t *Table) encodeBatch(writes []Write, results []Result) []Result {
	t.out = t.out[:0]
	last := 0
	for n, w := range writes {
		size := unix.NLMSG_HDRLEN + len(w.Msg)
		if n > 0 && (len(t.out)+size > batchBytes || n == batchLen) {
			break
		}
		seq := t.c.next()
		last, results = len(t.out), append(results, Result{Seq: seq})
		typ, flags := w.Op.header()
		if w.Op == OpPut || w.Op == OpDelete {
			flags |= unix.NLM_F_ECHO
		}
		t.out = binary.NativeEndian.AppendUint32(t.out, uint32(size))
		t.out = binary.NativeEndian.AppendUint16(t.out, typ)
		t.out = binary.NativeEndian.AppendUint16(t.out, unix.NLM_F_REQUEST|flags)
		t.out = binary.NativeEndian.AppendUint32(t.out, seq)
		t.out = binary.NativeEndian.AppendUint32(t.out, t.c.PID())
		t.out = append(t.out, w.Msg...)
		for len(t.out)%unix.NLMSG_ALIGNTO != 0 {
			t.out = append(t.out, 0)
		}
	}
	const flagsAt = 6 // of nlmsg_flags
	flags := binary.NativeEndian.Uint16(t.out[last+flagsAt:])
	binary.NativeEndian.PutUint16(t.out[last+flagsAt:], flags|unix.NLM_F_ACK)
	return results
}

func (t *Table) write(verb string, w Write) (uint32, error) {
	seq, err := t.send(w)
	if err != nil {
		name := "a route"
		if r, perr := t.dec.Interner.ParseRoute(w.Msg); perr == nil {
			name = r.Key().String()
		}
		return seq, fmt.Errorf("routes: %s %s: %w", verb, name, err)
	}
	return seq, nil
}

func (t *Table) send(w Write) (uint32, error) {
	typ, flags := w.Op.header()
	return t.c.request(typ, flags|unix.NLM_F_ACK, w.Msg, nil)
}

// ErrUnreachable is the error of a Lookup that the kernel answers with an error: no route, or
// one of type unreachable, blackhole or prohibit. The errno is in the chain too.
var ErrUnreachable = errors.New("unreachable")

// Query asks the kernel how it would route a packet.
//
// What a source address may be differs. IPv4 without Iif looks up a packet of this host's own,
// and refuses a Src that is no address of the host (EINVAL, ENETUNREACH on 6.18). With Iif it looks up a forwarded
// packet, as if it had come in by that device: the device must be up, forwarding must be on
// there, and Src must pass the reverse path filter, else the answer is EHOSTUNREACH, EXDEV or
// EINVAL. IPv6 takes any Src, with or without Iif, and asks neither for a local address nor for
// forwarding. Rules with `iif` match Iif only; without one the kernel uses the loopback device.
type Query struct {
	Family       Family // may be 0 with a Dst
	Dst, Src     netip.Addr
	Iif, Oif     Ifindex
	Mark         uint32
	IPProto      uint8
	Sport, Dport uint16
	UID          *uint32 // nil for our own
	// FibMatch asks for the route itself, with its prefix, instead of the way of one packet.
	FibMatch bool
}

// Answer is how the kernel would route a packet.
type Answer struct {
	Type    Type
	Table   TableID
	Oif     Ifindex
	Gateway netip.Addr
	PrefSrc netip.Addr
	// MTU is the route's MTU metric, 0 for none, and MTULocked its lock. While there is a learnt
	// PMTU the kernel shows that instead.
	MTU       uint32
	MTULocked bool
	AdvMSS    uint32
	// PMTU is the path MTU that was learnt for the destination, 0 for none, for Expires more
	// seconds.
	PMTU    uint32
	Expires uint32
	// Route is the route that was found, only with FibMatch.
	Route Route
}

// Lookup asks the kernel (RTM_GETROUTE). Where the answer is an error, it is ErrUnreachable and
// the errno.
func (t *Table) Lookup(q Query) (Answer, error) {
	var ans Answer
	got := false
	payload, err := q.encode()
	if err == nil {
		err = t.c.ask(rtmGetRoute, payload, func(h Header, data []byte) error {
			if h.Type != rtmNewRoute {
				return nil
			}
			got = true
			return ans.decode(&t.dec.Interner, data, q.FibMatch)
		})
		err = unreachable(err)
	}
	if err == nil && !got {
		err = errShort
	}
	if err != nil {
		return Answer{}, q.failed(err)
	}
	return ans, nil
}

// unreachable is the error of a lookup: ErrUnreachable, too, where the kernel says that there is no way.
func unreachable(err error) error {
	if k := (*kernelError)(nil); errors.As(err, &k) {
		switch k.errno {
		case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.EAGAIN:
			return fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
	}
	return err
}

func (q Query) failed(err error) error { return fmt.Errorf("routes: look up %s: %w", q.Dst, err) }

func (q Query) encode() ([]byte, error) { return q.appendTo(make([]byte, 0, 128)) }

// appendTo appends the payload to what is empty.
func (q Query) appendTo(b []byte) ([]byte, error) {
	if !q.Dst.IsValid() {
		return nil, errAddress
	}
	f := FamilyOf(q.Dst)
	if (q.Family != 0 && q.Family != f) || (q.Src.IsValid() && FamilyOf(q.Src) != f) {
		return nil, errAddress
	}
	b = append(b, make([]byte, rtmsgLen)...)
	b[0], b[1] = byte(f), byte(f.Bits())
	var flags uint32
	if f == IPv4 { // IPv6 always says which table, and refuses the flag
		flags = rtmFLookupTable
	}
	if q.FibMatch {
		flags |= rtmFFibMatch
	}
	binary.NativeEndian.PutUint32(b[8:], flags)
	b = appendAttr(b, rtaDst, q.Dst.AsSlice())
	if q.Src.IsValid() {
		b[2] = byte(f.Bits())
		b = appendAttr(b, rtaSrc, q.Src.AsSlice())
	}
	for _, a := range []struct {
		typ uint16
		val uint32
	}{{rtaIif, uint32(q.Iif)}, {rtaOif, uint32(q.Oif)}, {rtaMark, q.Mark}} {
		if a.val != 0 {
			b = appendU32(b, a.typ, a.val)
		}
	}
	if q.UID != nil {
		b = appendU32(b, rtaUID, *q.UID)
	}
	if q.IPProto != 0 {
		b = appendAttr(b, rtaIPProto, []byte{q.IPProto})
	}
	if q.Sport != 0 {
		b = appendAttr(b, rtaSport, binary.BigEndian.AppendUint16(nil, q.Sport))
	}
	if q.Dport != 0 {
		b = appendAttr(b, rtaDport, binary.BigEndian.AppendUint16(nil, q.Dport))
	}
	return b, nil
}

func (a *Answer) decode(in *Interner, data []byte, match bool) error {
	if len(data) < rtmsgLen || !knownFamily(data[0]) {
		return errShort
	}
	// An answer for a single packet is marked as cached, which a route is not.
	flags := binary.NativeEndian.Uint32(data[8:])
	*a = Answer{Type: Type(data[7]), Table: TableID(data[4])}
	expires, err := a.attributes(Family(data[0]), data[rtmsgLen:])
	if err != nil {
		return err
	}
	if match {
		binary.NativeEndian.PutUint32(data[8:], flags&^rtmFCloned)
		a.Route, err = in.ParseRoute(data)
		return err
	}
	// The time is in USER_HZ.
	if flags&rtmFCloned != 0 && expires != 0 {
		a.PMTU, a.Expires = a.MTU, max(1, expires/userHZ)
		a.MTU, a.MTULocked = 0, false
	}
	return nil
}

// attributes decodes the attributes of an answer. Of several ways the first counts. expires is that of the cache information.
func (a *Answer) attributes(f Family, b []byte) (expires uint32, err error) {
	var first hop
	var metrics Metrics
	w := attrs{b: b}
	for w.next() {
		switch w.typ {
		case rtaTable:
			a.Table = TableID(w.u32())
		case rtaPrefsrc:
			a.PrefSrc = w.addr(f)
		case rtaMetrics:
			w.err = metrics.decode(w.val)
		case rtaOif, rtaGateway, rtaVia:
			w.nexthop(&first)
		case rtaMultipath:
			var several []Nexthop
			if several, w.err = decodeMultipath(w.val); len(several) > 0 {
				first.Nexthop = several[0]
			}
		case rtaCacheinfo:
			if len(w.val) >= cacheExpiresAt+4 {
				expires = binary.NativeEndian.Uint32(w.val[cacheExpiresAt:])
			}
		}
	}
	a.Oif, a.Gateway = first.Oif, first.Gateway
	a.MTU, a.MTULocked, a.AdvMSS = metrics.MTU, metrics.MTULocked(), metrics.AdvMSS
	return expires, w.err
}

// userHZ is the unit of times in netlink, the same on all architectures that Go runs on.
const userHZ = 100
