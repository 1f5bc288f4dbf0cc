package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/flows"
)

// serveFlows answers with a line of JSON for each flow, as they come from the kernel.
func serveFlows(s served, w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	f, err := flows.FilterFrom(q)
	if err != nil {
		answerError(w, http.StatusBadRequest, err)
		return
	}
	a, err := s.agentOf(q.Get("netns"))
	if err != nil {
		answerError(w, statusOf(err), err)
		return
	}
	out := &patient{w: w, rc: http.NewResponseController(w), step: a.conns.step}
	lines := bufio.NewWriterSize(out, 256<<10)
	enc := json.NewEncoder(lines)
	var buf []byte
	res, err := a.listFlows(r.Context(), f, func(f *flows.Flow) (err error) {
		if buf, err = flows.AppendJSON(buf[:0], f); err == nil {
			_, err = lines.Write(append(buf, '\n'))
		}
		return err
	})
	switch {
	case err == nil:
		if n := q.Get("netns"); n != "" && res.Netns != "" {
			res.Netns = n
		}
		_ = enc.Encode(api.FlowLine{Result: res}) // a client that went away is its own affair
	case out.started:
		_ = enc.Encode(api.FlowLine{Error: oneLine(err)})
	default:
		answerFlowsError(w, err)
		return
	}
	_ = lines.Flush()
}

// answerFlowsError says why connections are not listed, and when it is worth to ask again.
func answerFlowsError(w http.ResponseWriter, err error) {
	code := flowsStatus(err)
	if code == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter.Seconds())))
	}
	answerError(w, code, inOneLine{err})
}

// inOneLine is an error in one line.
type inOneLine struct{ error }

// Error is the error's, in one line.
func (e inOneLine) Error() string { return oneLine(e.error) }

// Unwrap is the error.
func (e inOneLine) Unwrap() error { return e.error }

// flowsStatus is the HTTP status for why connections are not listed.
func flowsStatus(err error) int {
	switch {
	case errors.Is(err, ErrUnreadable):
		return http.StatusNotImplemented
	case errors.Is(err, errNotReady), errors.Is(err, errEndedAgent), errors.Is(err, errBusy), errors.Is(err, errCrowd), errors.As(err, new(errLate)):
		return http.StatusServiceUnavailable
	}
	return statusOf(err)
}

// patient puts the deadline of an answer off with each write: each piece has to be read within a time. What bounds the whole answer is
// listFlows.
type patient struct {
	w       http.ResponseWriter
	rc      *http.ResponseController
	step    time.Duration
	started bool
}

// Write writes b as a piece of the answer.
func (p *patient) Write(b []byte) (int, error) {
	if !p.started {
		p.started = true
		p.w.Header().Set("Content-Type", "application/x-ndjson")
	}
	if err := p.rc.SetWriteDeadline(time.Now().Add(p.step)); err != nil {
		return 0, err
	}
	return p.w.Write(b)
}

// serveDiagnosis answers with a Diagnosis that is fresh.
func serveDiagnosis(s served, w http.ResponseWriter, r *http.Request) {
	a, err := s.agentOf(r.URL.Query().Get("netns"))
	if err != nil {
		answerError(w, statusOf(err), err)
		return
	}
	d, err := a.diagnose(r.Context(), a.call)
	if err != nil {
		answerError(w, flowsStatus(err), err)
		return
	}
	answerJSON(w, http.StatusOK, d)
}
