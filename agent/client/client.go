// Package client asks a running agent, and tells it to pause, over its control socket. What it gets are values of
// package api. tsoctl is written with it.
package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"tsoagent/agent/api"
	"tsoagent/agent/flows"
	"tsoagent/agent/verify"
)

// ErrNoAgent is matched (errors.Is) when nobody answers on the control socket.
var ErrNoAgent = errors.New("no agent is running")

// ErrPermission is matched (errors.Is) where the socket is somebody else's, and where only root may ask.
var ErrPermission = os.ErrPermission

// Error is what the agent answers to a request that it does not serve.
type Error struct {
	Status int // HTTP
	Text   string
}

// Error is the agent's sentence, which says what to do.
func (e *Error) Error() string { return e.Text }

// Is matches ErrPermission.
func (e *Error) Is(target error) bool {
	return target == ErrPermission && e.Status == http.StatusForbidden
}

// Client asks one agent. Where a name that it is given isn't there, the error is an api.AbsentError. It is safe for concurrent use.
type Client struct {
	path string
	http http.Client
}

// New returns a client for the agent with this run directory. Nothing is opened before the first request.
func New(runDir string) *Client {
	c := &Client{path: api.SocketPath(runDir)}
	c.http = http.Client{
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", c.path)
		}},
	}
	return c
}

// Close closes the connections that wait for another request.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Do sends any request to the agent: what the other methods do, for those who want the bare answer.
func (c *Client) Do(req *http.Request) (*http.Response, error) { return c.http.Do(req) }

// Report asks for the newest report of the namespace that the agent was started in.
func (c *Client) Report(ctx context.Context) (*api.Report, error) { return c.ReportIn(ctx, "") }

// ReportIn asks for the newest report of a namespace, by any of the names that the agent knows.
func (c *Client) ReportIn(ctx context.Context, netns string) (*api.Report, error) {
	r := new(api.Report)
	return r, c.get(ctx, "/v1/report", inNetns(url.Values{}, netns), r)
}

// Namespaces asks for all that are followed, or are to be.
func (c *Client) Namespaces(ctx context.Context) ([]api.NamespaceReport, error) {
	var list []api.NamespaceReport
	err := c.get(ctx, "/v1/namespaces", nil, &list)
	return list, err
}

// Explain asks what happens to a flow in the namespace that the agent was started in.
func (c *Client) Explain(ctx context.Context, q api.Question) (*api.Explanation, error) {
	return c.ExplainIn(ctx, "", q)
}

// ExplainIn is Explain in a namespace, by any of the names that the agent knows.
func (c *Client) ExplainIn(ctx context.Context, netns string, q api.Question) (*api.Explanation, error) {
	e := new(api.Explanation)
	return e, c.get(ctx, "/v1/explain", inNetns(q.Values(), netns), e)
}

// DevicesIn asks for the devices of a namespace that concern the agent, or for all.
func (c *Client) DevicesIn(ctx context.Context, netns string, all bool) (*api.DeviceList, error) {
	v := inNetns(url.Values{}, netns)
	if all {
		v.Set("all", "true")
	}
	d := new(api.DeviceList)
	return d, c.get(ctx, "/v1/devices", v, d)
}

// LocksIn asks for all that gives covered flows in a namespace an MTU.
func (c *Client) LocksIn(ctx context.Context, netns string) (*api.LockList, error) {
	l := new(api.LockList)
	return l, c.get(ctx, "/v1/locks", inNetns(url.Values{}, netns), l)
}

// DiagnosisIn asks for a fresh diagnosis of a namespace, by any of the names that the agent knows.
func (c *Client) DiagnosisIn(ctx context.Context, netns string) (*api.Diagnosis, error) {
	d := new(api.Diagnosis)
	return d, c.get(ctx, "/v1/diagnosis", inNetns(url.Values{}, netns), d)
}

// EventsIn asks for the newest events of a namespace, those with a higher number than since.
func (c *Client) EventsIn(ctx context.Context, netns string, since uint64) (*api.EventList, error) {
	l := new(api.EventList)
	return l, c.get(ctx, "/v1/events", sinceEvent(netns, since), l)
}

// Follow calls fn for each event of a namespace with a higher number than since, then for each one as it happens,
// and for each hole where they were read too slowly. It returns nil when the agent stops, and else when the
// context ends or fn fails.
func (c *Client) Follow(ctx context.Context, netns string, since uint64, fn func(api.EventLine) error) error {
	v := sinceEvent(netns, since)
	v.Set("follow", "true")
	body, err := c.open(ctx, http.MethodGet, "/v1/events", v, nil)
	if err != nil {
		return err
	}
	defer body.Close()
	in := json.NewDecoder(body)
	for {
		var line api.EventLine
		switch err := in.Decode(&line); {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("agent: read the answer to /v1/events: %w", err)
		}
		if err := fn(line); err != nil {
			return err
		}
	}
}

func sinceEvent(netns string, since uint64) url.Values {
	return inNetns(url.Values{"since": {strconv.FormatUint(since, 10)}}, netns)
}

// Pause has the agent take its hands off, in one namespace, or with an empty name in all. The error is ErrPermission
// unless root asks.
func (c *Client) Pause(ctx context.Context, netns string, p api.PauseRequest) (*api.PauseAnswer, error) {
	return c.post(ctx, "/v1/pause", netns, p)
}

// Resume has the agent go on, as Pause has it stop.
func (c *Client) Resume(ctx context.Context, netns string) (*api.PauseAnswer, error) {
	return c.post(ctx, "/v1/resume", netns, api.ResumeRequest{})
}

// Reload has the agent read its configuration again, and waits until it is in use. The error is an Error with the status 409 where it is
// refused, and ErrPermission unless root asks.
func (c *Client) Reload(ctx context.Context) (*api.ReloadAnswer, error) {
	a := new(api.ReloadAnswer)
	return a, c.ask(ctx, http.MethodPost, "/v1/reload", nil, []byte("{}"), a)
}

// maxFlowLine bounds a line: 64 listeners with the processes that are named of each are the longest.
const maxFlowLine = 1 << 20

// FlowsIn asks for the flows of a namespace, by any of the names that the agent knows, and calls fn for
// each as it comes. A Flow is good until fn returns.
func (c *Client) FlowsIn(ctx context.Context, netns string, f flows.Filter, fn func(*flows.Flow) error) (*flows.Result, error) {
	body, err := c.open(ctx, http.MethodGet, "/v1/flows", inNetns(f.Values(), netns), nil)
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
		var line api.FlowLine
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

// WorldIn asks for what packets are sorted by in a namespace, by any of the names that the agent knows.
func (c *Client) WorldIn(ctx context.Context, netns string) (*verify.World, error) {
	body, err := c.open(ctx, http.MethodGet, "/v1/world", inNetns(url.Values{}, netns), nil)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var w *verify.World
	for dec := json.NewDecoder(body); ; {
		var p api.WorldPiece
		if err := dec.Decode(&p); err != nil {
			return nil, fmt.Errorf("agent: read the answer to /v1/world: it ended early: the agent stopped, or was too busy; try again: %w", err)
		}
		switch {
		case p.World != nil:
			w = p.World
		case w == nil:
			return nil, errors.New("agent: read the answer to /v1/world: it has no beginning")
		case p.End:
			return w, nil
		}
		w.Policies, w.SAs = append(w.Policies, p.Policies...), append(w.SAs, p.SAs...)
	}
}

func inNetns(v url.Values, netns string) url.Values {
	if netns != "" {
		v.Set("netns", netns)
	}
	return v
}

// answerWithin bounds how long an answer may take that does not come bit by bit.
const answerWithin = 30 * time.Second

func (c *Client) get(ctx context.Context, path string, query url.Values, into any) error {
	return c.ask(ctx, http.MethodGet, path, query, nil, into)
}

func (c *Client) post(ctx context.Context, path, netns string, request any) (*api.PauseAnswer, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("agent: ask %s: %w", path, err)
	}
	a := new(api.PauseAnswer)
	return a, c.ask(ctx, http.MethodPost, path, inNetns(url.Values{}, netns), body, a)
}

func (c *Client) ask(ctx context.Context, method, path string, query url.Values, body []byte, into any) error {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	answer, err := c.open(ctx, method, path, query, body)
	if err != nil {
		return err
	}
	defer answer.Close()
	if err := json.NewDecoder(answer).Decode(into); err != nil {
		return fmt.Errorf("agent: read the answer to %s: %w", path, err)
	}
	return nil
}

// open asks, and returns the answer's body if it is one.
func (c *Client) open(ctx context.Context, method, path string, query url.Values, body []byte) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: "tsoagent", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("agent: ask %s: %w", path, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			if errors.Is(err, os.ErrPermission) {
				return nil, fmt.Errorf("the control socket %s is not yours to open: run it as root: %w", c.path, ErrPermission)
			}
			return nil, fmt.Errorf("%w (nobody answers on %s)", ErrNoAgent, c.path)
		}
		return nil, fmt.Errorf("agent: ask %s: %w", path, err)
	}
	if res.StatusCode != http.StatusOK {
		var e api.Error
		if err := json.NewDecoder(res.Body).Decode(&e); err != nil || e.Text == "" {
			e.Text = res.Status
		}
		err = &Error{res.StatusCode, e.Text}
		if e.Absent != "" {
			err = &api.AbsentError{Of: e.Absent, Text: e.Text, Err: err}
		}
		return nil, errors.Join(err, res.Body.Close())
	}
	return res.Body, nil
}
