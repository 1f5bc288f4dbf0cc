package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"tsoagent/xfrmwatch"
)

// The control API is HTTP with JSON on a unix socket:
//
//	GET /v1/report             the newest Report; 503 while the agent still reads the kernel
//	GET /v1/explain?dst=…      an Explanation; 400 for a wrong query
//	GET /v1/flows              TCP connections, a line of JSON for each as they come from the kernel,
//	                           and a flows.Result as {"result": …} in the last one; 501 where they
//	                           can't be read, 503 while others read theirs; see flows.Filter
//	                           for the query
//	GET /v1/diagnosis          a Diagnosis of the connections that is some seconds old at most
//	GET /v1/namespaces         all that are followed, or are to be, a list of NamespaceReport
//
// With netns=NAME all but the last are about that namespace; 404 if it is not followed.
// Errors are {"error": "…"}. Who may connect is up to the socket's mode, 0660.

// Serve answers on the control socket until the context ends. A socket that a dead agent left
// is taken over: the journal's lock says that no other agent runs.
func (a *Agent) Serve(ctx context.Context) error {
	return serve(ctx, SocketPath(a.cfg.RunDir), handler(a))
}

// Serve answers on the control socket for all namespaces, as Agent.Serve does for one.
func (f *Fleet) Serve(ctx context.Context) error {
	return serve(ctx, SocketPath(f.cfg.RunDir), handler(f))
}

func serve(ctx context.Context, path string, h http.Handler) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("agent: take over the control socket: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil // stopped while it started
	case err != nil:
		return fmt.Errorf("agent: listen on the control socket: %w", err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return errors.Join(fmt.Errorf("agent: set the mode of the control socket: %w", err), l.Close())
	}
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 2 * time.Second, ReadTimeout: 5 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10,
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("agent: control socket: %w", err)
	}
	return nil
}

// paths are what the control API has.
var paths = []string{"/v1/report", "/v1/explain", "/v1/flows", "/v1/diagnosis", "/v1/namespaces"}

func handler(s served) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/report", func(w http.ResponseWriter, r *http.Request) {
		rep, err := s.reportOf(r.URL.Query().Get("netns"))
		if err != nil {
			answerError(w, statusOf(err), err)
			return
		}
		answerJSON(w, http.StatusOK, rep)
	})
	mux.HandleFunc("GET /v1/namespaces", func(w http.ResponseWriter, _ *http.Request) {
		answerJSON(w, http.StatusOK, s.namespaces())
	})
	mux.HandleFunc("GET /v1/explain", func(w http.ResponseWriter, r *http.Request) {
		q, err := questionFrom(r.URL.Query())
		if err != nil {
			answerError(w, http.StatusBadRequest, err)
			return
		}
		a, err := s.agentOf(r.URL.Query().Get("netns"))
		if err != nil {
			answerError(w, statusOf(err), err)
			return
		}
		var e *Explanation
		callErr := a.call(r.Context(), func() {
			if a.lastP == nil {
				err = errNotReady
				return
			}
			e, err = a.explain(q)
		})
		if callErr != nil || errors.Is(err, errNotReady) {
			answerError(w, http.StatusServiceUnavailable, cmp.Or(callErr, err))
			return
		}
		if err != nil {
			answerError(w, http.StatusBadRequest, err)
			return
		}
		answerJSON(w, http.StatusOK, e)
	})
	mux.HandleFunc("GET /v1/flows", func(w http.ResponseWriter, r *http.Request) { serveFlows(s, w, r) })
	mux.HandleFunc("GET /v1/diagnosis", func(w http.ResponseWriter, r *http.Request) { serveDiagnosis(s, w, r) })
	for _, path := range paths {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", "GET, HEAD")
			answerError(w, http.StatusMethodNotAllowed, fmt.Errorf("%s takes GET, not %s", path, r.Method))
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answerError(w, http.StatusNotFound, fmt.Errorf("there is no %q; this agent has %s", r.URL.Path, strings.Join(paths, ", ")))
	})
	return mux
}

var errNotReady = errors.New("the agent is still reading the kernel's state; try again in a moment")

// statusOf is the HTTP status for what is said of a namespace, or a device in it.
func statusOf(err error) int {
	var absent *AbsentError
	switch {
	case errors.Is(err, errNotReady):
		return http.StatusServiceUnavailable
	case errors.As(err, &absent):
		return http.StatusNotFound
	}
	return http.StatusInternalServerError
}

// refusal is the answer where there is none.
type refusal struct {
	Error  string `json:"error"`
	Absent string `json:"absent,omitempty"` // AbsentError's Of
}

func answerJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A client that went away is its own affair.
	_ = json.NewEncoder(w).Encode(v)
}

func answerError(w http.ResponseWriter, code int, err error) {
	no := refusal{Error: err.Error()}
	var absent *AbsentError
	if errors.As(err, &absent) {
		no.Error, no.Absent = absent.Text, absent.Of
	}
	answerJSON(w, code, no)
}

// Client asks a running agent over its control socket. It is safe for concurrent use.
type Client struct {
	path string
	http http.Client
}

// ErrNoAgent is matched (errors.Is) when nobody answers on the control socket.
var ErrNoAgent = errors.New("no agent is running")

// NewClient returns a client for the agent with this run directory.
func NewClient(runDir string) *Client {
	c := &Client{path: SocketPath(runDir)}
	c.http = http.Client{
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", c.path)
		}},
	}
	return c
}

// Report asks for the newest report of the namespace that the agent was started in.
func (c *Client) Report(ctx context.Context) (*Report, error) { return c.ReportIn(ctx, "") }

// ReportIn asks for the newest report of a namespace, by any of the names that the agent knows.
func (c *Client) ReportIn(ctx context.Context, netns string) (*Report, error) {
	r := new(Report)
	return r, c.get(ctx, "/v1/report", inNetns(url.Values{}, netns), r)
}

// Namespaces asks for all that are followed, or are to be.
func (c *Client) Namespaces(ctx context.Context) ([]NamespaceReport, error) {
	var list []NamespaceReport
	err := c.get(ctx, "/v1/namespaces", nil, &list)
	return list, err
}

// Explain asks what happens to a flow in the namespace that the agent was started in.
func (c *Client) Explain(ctx context.Context, q Question) (*Explanation, error) {
	return c.ExplainIn(ctx, "", q)
}

// ExplainIn is Explain in a namespace, by any of the names that the agent knows.
func (c *Client) ExplainIn(ctx context.Context, netns string, q Question) (*Explanation, error) {
	e := new(Explanation)
	return e, c.get(ctx, "/v1/explain", inNetns(q.values(), netns), e)
}

func inNetns(v url.Values, netns string) url.Values {
	if netns != "" {
		v.Set("netns", netns)
	}
	return v
}

func (c *Client) get(ctx context.Context, path string, query url.Values, into any) error {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	body, err := c.open(ctx, path, query)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(into); err != nil {
		return fmt.Errorf("agent: read the answer to %s: %w", path, err)
	}
	return nil
}

// answerWithin bounds how long an answer may take that does not come bit by bit.
const answerWithin = 30 * time.Second

// open asks, and returns the answer's body if it is one.
func (c *Client) open(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: "tsoagent", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("agent: ask %s: %w", path, err)
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
		var no refusal
		if err := json.NewDecoder(res.Body).Decode(&no); err != nil || no.Error == "" {
			no.Error = res.Status
		}
		if no.Absent != "" {
			return nil, errors.Join(&AbsentError{Of: no.Absent, Text: no.Error}, res.Body.Close())
		}
		return nil, errors.Join(errors.New(no.Error), res.Body.Close())
	}
	return res.Body, nil
}

// Question asks what happens to a flow. From may be invalid; the zero values of the rest mean
// any.
type Question struct {
	Dst, From netip.Addr
	Proto     uint8
	Port      uint16 // destination port
	Mark      uint32
}

func (q Question) values() url.Values {
	v := url.Values{"dst": {q.Dst.String()}}
	if q.From.IsValid() {
		v.Set("from", q.From.String())
	}
	for _, n := range []struct {
		key string
		val uint64
	}{{"proto", uint64(q.Proto)}, {"port", uint64(q.Port)}, {"mark", uint64(q.Mark)}} {
		if n.val != 0 {
			v.Set(n.key, strconv.FormatUint(n.val, 10))
		}
	}
	return v
}

func questionFrom(v url.Values) (Question, error) {
	var q Question
	var errs []error
	addr := func(key string, into *netip.Addr) {
		s := v.Get(key)
		if s == "" {
			return
		}
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			errs = append(errs, fmt.Errorf("%s: %q is no IP address", key, s))
			return
		}
		*into = a.Unmap()
	}
	number := func(key string, bits int) uint64 {
		s := v.Get(key)
		if s == "" {
			return 0
		}
		n, err := strconv.ParseUint(s, 0, bits)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %q is no number of %d bits", key, s, bits))
		}
		return n
	}
	addr("dst", &q.Dst)
	addr("from", &q.From)
	q.Proto = uint8(number("proto", 8))
	q.Port = uint16(number("port", 16))
	q.Mark = uint32(number("mark", 32))
	switch {
	case len(errs) > 0:
	case !q.Dst.IsValid():
		errs = append(errs, errors.New("dst is missing"))
	case q.From.IsValid() && q.From.Is4() != q.Dst.Is4():
		errs = append(errs, errors.New("dst and from are of different families"))
	}
	return q, errors.Join(errs...)
}

// flow is the question as an XFRM lookup sees it.
func (q Question) flow(src netip.Addr, ifID uint32, oif int32) xfrmwatch.Flow {
	return xfrmwatch.Flow{Src: src, Dst: q.Dst, Proto: xfrmwatch.Proto(q.Proto), Dport: q.Port, Mark: q.Mark, IfID: ifID, Oif: oif}
}
