package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"tsoagent/agent/flows"
)

// flowLine is one line of the answer to /v1/flows: a flow, or, as the last one, the result or what went
// wrong in the middle.
type flowLine struct {
	flows.Flow
	Result *flows.Result `json:"result,omitempty"`
	Error  string        `json:"error,omitempty"`
}

// maxFlowLine bounds a line: 64 listeners with the processes that are named of each are the longest.
const maxFlowLine = 1 << 20

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
		_ = enc.Encode(flowLine{Result: res}) // a client that went away is its own affair
	case out.started:
		_ = enc.Encode(flowLine{Error: oneLine(err)})
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

// FlowsIn asks for the flows of a namespace, by any of the names that the agent knows, and calls fn for
// each as it comes. A Flow is good until fn returns.
func (c *Client) FlowsIn(ctx context.Context, netns string, f flows.Filter, fn func(*flows.Flow) error) (*flows.Result, error) {
	body, err := c.open(ctx, "/v1/flows", inNetns(f.Values(), netns))
	if err != nil {
		return nil, err
	}
	defer body.Close()
	in := bufio.NewReaderSize(body, maxFlowLine)
	var flow flows.Flow
	for {
		b, err := in.ReadSlice('\n')
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("it ended early: the agent stopped, or was too busy; try again")
		}
		if err != nil {
			return nil, fmt.Errorf("agent: read the answer to /v1/flows: %w", err)
		}
		if flows.ParseJSON(b, &flow) {
			if err := fn(&flow); err != nil {
				return nil, err
			}
			continue
		}
		var line flowLine
		switch err := json.Unmarshal(b, &line); {
		case err != nil:
			return nil, fmt.Errorf("agent: read the answer to /v1/flows: %w", err)
		case line.Error != "":
			return nil, errors.New(line.Error)
		case line.Result != nil:
			return line.Result, nil
		}
		if err := fn(&line.Flow); err != nil {
			return nil, err
		}
	}
}

// DiagnosisIn asks for a fresh diagnosis of a namespace, by any of the names that the agent knows.
func (c *Client) DiagnosisIn(ctx context.Context, netns string) (*Diagnosis, error) {
	d := new(Diagnosis)
	return d, c.get(ctx, "/v1/diagnosis", inNetns(url.Values{}, netns), d)
}
