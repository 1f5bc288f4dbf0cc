package routes

import (
	"errors"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// asksAtOnce is how many questions are in a system call. The kernel keeps a page or two for each answer until it is read, which the receive
	// buffer of a Table has room for.
	asksAtOnce = 64
	// answerLen is more than an answer has, as a rule. One that is longer is asked for alone.
	answerLen = 2 << 10
)

// LookupAll asks as Lookup does, and calls f with each answer in the order of the questions. With many at once a question costs about half.
func (t *Table) LookupAll(queries []Query, f func(i int, ans Answer, err error)) {
	if len(queries) > 1 && t.answers == nil {
		t.answers = newTrain(asksAtOnce, answerLen)
	}
	for at := 0; at < len(queries); at += asksAtOnce {
		t.lookupSome(queries[at:min(at+asksAtOnce, len(queries))], func(i int, ans Answer, err error) { f(at+i, ans, err) })
	}
}

// lookupSome asks up to asksAtOnce questions.
func (t *Table) lookupSome(queries []Query, f func(i int, ans Answer, err error)) {
	var answers [asksAtOnce]Answer
	var errs [asksAtOnce]error
	var seqs [asksAtOnce]uint32
	t.out = t.out[:0]
	for i, q := range queries {
		errs[i] = errUnanswered
		payload, err := q.appendTo(t.payload[:0])
		if err != nil {
			errs[i] = q.failed(err)
			continue
		}
		m := netlink.Message{Header: netlink.Header{Type: rtmGetRoute, Flags: netlink.Request}, Data: payload}
		t.payload, t.out = payload, t.c.append(t.out, &m)
		seqs[i] = m.Header.Sequence
	}
	if len(queries) > 1 && t.c.send(t.out) == nil {
		t.collect(queries, seqs[:len(queries)], answers[:], errs[:])
	}
	for i, q := range queries {
		if errors.Is(errs[i], errUnanswered) {
			answers[i], errs[i] = t.Lookup(q)
		}
		f(i, answers[i], errs[i])
	}
}

// errUnanswered is for a question that is asked again, alone.
var errUnanswered = errors.New("no answer")

// collect takes the answers to requests, which are in a row and all there.
func (t *Table) collect(queries []Query, seqs []uint32, answers []Answer, errs []error) {
	next := 0 // the kernel answers in order
	for next < len(seqs) {
		b, got, err := t.answers.next()
		if !got {
			if err := t.answers.fill(t.c.fd); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			continue
		}
		for err == nil && len(b) > 0 {
			var h Header
			var data []byte
			if h, data, b, err = nextMessage(b); err != nil {
				break
			}
			i := next
			for i < len(seqs) && seqs[i] != h.Seq {
				i++
			}
			if i == len(seqs) {
				continue // left over
			}
			next = i + 1
			answers[i], errs[i] = t.answer(queries[i], h, data)
		}
	}
}

// answer reads what answers a question.
func (t *Table) answer(q Query, h Header, data []byte) (ans Answer, err error) {
	switch h.Type {
	case rtmNewRoute:
		err = ans.decode(&t.dec.Interner, data, q.FibMatch)
	case unix.NLMSG_ERROR:
		err = unreachable(ackError(h, data))
	default:
		err = errShort
	}
	if err != nil {
		return Answer{}, q.failed(err)
	}
	return ans, nil
}
