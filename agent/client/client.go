// Package client asks a running agent, and tells it to pause, over its control socket. What it gets are values of
// package api. tsoctl is written with it.
package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
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

// ErrSilent is matched (errors.Is) when an agent has taken a request, or a connection, and says nothing.
var ErrSilent = errors.New("the agent says nothing")

// ErrVersion is matched (errors.Is) by answers of an agent that is of another version than this package.
var ErrVersion = errors.New("the agent is of another version: start it again after an upgrade, and use the tsoctl that came with it")

// Client asks one agent. Where a name that it is given isn't there, the error is an api.AbsentError. It is safe for concurrent use.
type Client struct {
	path string
	http http.Client
	// patience is how long the agent may say nothing.
	patience time.Duration
}

// patience is longer than the agent itself takes for anything: it gives up an answer after 30 seconds, and lets those who list connections
// wait for their turn for 20.
const patience = 45 * time.Second

// New returns a client for the agent with this run directory. Nothing is opened before the first request.
func New(runDir string) *Client {
	c := &Client{path: api.SocketPath(runDir), patience: patience}
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
	return get[api.Report](ctx, c, "/v1/report", inNetns(url.Values{}, netns))
}

// Namespaces asks for all that are followed, or are to be.
func (c *Client) Namespaces(ctx context.Context) ([]api.NamespaceReport, error) {
	list, err := get[[]api.NamespaceReport](ctx, c, "/v1/namespaces", nil)
	if err != nil {
		return nil, err
	}
	return *list, nil
}

// Explain asks what happens to a flow in the namespace that the agent was started in.
func (c *Client) Explain(ctx context.Context, q api.Question) (*api.Explanation, error) {
	return c.ExplainIn(ctx, "", q)
}

// ExplainIn is Explain in a namespace, by any of the names that the agent knows.
func (c *Client) ExplainIn(ctx context.Context, netns string, q api.Question) (*api.Explanation, error) {
	return get[api.Explanation](ctx, c, "/v1/explain", inNetns(q.Values(), netns))
}

// DevicesIn asks for the devices of a namespace that concern the agent, or for all.
func (c *Client) DevicesIn(ctx context.Context, netns string, all bool) (*api.DeviceList, error) {
	v := inNetns(url.Values{}, netns)
	if all {
		v.Set("all", "true")
	}
	return get[api.DeviceList](ctx, c, "/v1/devices", v)
}

// LocksIn asks for all that gives covered flows in a namespace an MTU.
func (c *Client) LocksIn(ctx context.Context, netns string) (*api.LockList, error) {
	return get[api.LockList](ctx, c, "/v1/locks", inNetns(url.Values{}, netns))
}

// DiagnosisIn asks for a fresh diagnosis of a namespace, by any of the names that the agent knows.
func (c *Client) DiagnosisIn(ctx context.Context, netns string) (*api.Diagnosis, error) {
	return get[api.Diagnosis](ctx, c, "/v1/diagnosis", inNetns(url.Values{}, netns))
}

// EventsIn asks for the newest events of a namespace, those with a higher number than since.
func (c *Client) EventsIn(ctx context.Context, netns string, since uint64) (*api.EventList, error) {
	return get[api.EventList](ctx, c, "/v1/events", sinceEvent(netns, since))
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
	body.forever() // nothing may happen for days
	in := json.NewDecoder(body)
	for {
		var line api.EventLine
		switch err := in.Decode(&line); {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return unread("/v1/events", err)
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
	return post[api.PauseAnswer](ctx, c, "/v1/pause", inNetns(url.Values{}, netns), p)
}

// Resume has the agent go on, as Pause has it stop.
func (c *Client) Resume(ctx context.Context, netns string) (*api.PauseAnswer, error) {
	return post[api.PauseAnswer](ctx, c, "/v1/resume", inNetns(url.Values{}, netns), api.ResumeRequest{})
}

// Reload has the agent read its configuration again, and waits until it is in use. The error is an Error with the status 409 where it is
// refused, and ErrPermission unless root asks.
func (c *Client) Reload(ctx context.Context) (*api.ReloadAnswer, error) {
	return post[api.ReloadAnswer](ctx, c, "/v1/reload", nil, api.ReloadRequest{})
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
			err = errEarly
		}
		if err != nil {
			return nil, unread("/v1/flows", err)
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
			return nil, unread("/v1/flows", err)
		case line.Error != "":
			return nil, errors.New(line.Error)
		case line.Result != nil:
			if err := speaks(line.Result.Version, flows.Version); err != nil {
				return nil, err
			}
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
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errEarly
		}
		switch {
		case err != nil:
			return nil, unread("/v1/world", err)
		case p.World != nil:
			if err := speaks(p.World.Version, verify.Version); err != nil {
				return nil, err
			}
			w = p.World
		case w == nil:
			return nil, unread("/v1/world", errors.New("it has no beginning"))
		case p.End:
			return w, nil
		}
		w.Policies, w.SAs = append(w.Policies, p.Policies...), append(w.SAs, p.SAs...)
	}
}
