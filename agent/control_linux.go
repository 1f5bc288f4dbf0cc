package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/api"
	"tsoagent/xfrmwatch"
)

// The control API is HTTP with JSON on a unix socket: package api has it in values, docs/openapi.yaml for other
// languages, package client asks. Who may connect is up to the socket's mode, 0660; of those only root may change
// anything. What a client does wrong costs it the connection, and nobody else anything: what is asked of the loop is
// checked first, is small, and there is a bound on how many ask.

// Serve answers on the control socket until the context ends. A socket that a dead agent left
// is taken over: the journal's lock says that no other agent runs.
func (a *Agent) Serve(ctx context.Context) error {
	return serve(ctx, SocketPath(a.cfg.RunDir), handler(a, ctx.Done()), a.log)
}

// Serve answers on the control socket for all namespaces, as Agent.Serve does for one.
func (f *Fleet) Serve(ctx context.Context) error {
	return serve(ctx, SocketPath(f.cfg.RunDir), handler(f, ctx.Done()), f.log)
}

func serve(ctx context.Context, path string, h http.Handler, log *slog.Logger) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("agent: take over the control socket: %w", err)
	}
	l, err := (&net.ListenConfig{Control: bindMode}).Listen(ctx, "unix", path)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil // stopped while it started
	case err != nil:
		return fmt.Errorf("agent: listen on the control socket: %w", err)
	}
	if err := os.Chmod(path, socketMode); err != nil { // the umask took its part of it
		return errors.Join(fmt.Errorf("agent: set the mode of the control socket: %w", err), l.Close())
	}
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 2 * time.Second, ReadTimeout: 5 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10,
		ConnContext: withPeer, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		// Those who follow events hear of the last ones.
		last, cancel := context.WithTimeout(context.Background(), farewell)
		defer cancel()
		_ = srv.Shutdown(last)
		_ = srv.Close()
	})
	err = srv.Serve(&bounded{Listener: l, byUID: map[uint32]int{}})
	if !stop() {
		<-closed
	}
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("agent: control socket: %w", err)
	}
	return nil
}

// socketMode says who may connect: root, and the group that an admin gives the socket to.
const socketMode = 0o660

// bindMode has bind make the socket with no more than its mode, whatever the umask is: unix_bind takes the mode of the
// socket's own inode (net/unix/af_unix.c).
func bindMode(_, _ string, conn syscall.RawConn) error {
	var failed error
	if err := conn.Control(func(fd uintptr) { failed = unix.Fchmod(int(fd), socketMode) }); err != nil {
		return err
	}
	return failed
}

// farewell bounds how long answers that are under way may take when the agent stops.
const farewell = time.Second

// control answers for an agent or a fleet.
type control struct {
	served
	asking  turns           // of requests that ask the loop
	follows turns           // of those who follow events
	answers turns           // of answers that can be large
	stopped <-chan struct{} // closed when nothing is served any more
}

func handler(s served, stopped <-chan struct{}) http.Handler {
	c := &control{s, newTurns(maxAsking), newTurns(maxFollows), newTurns(maxAnswers), stopped}
	handlers := map[string]http.HandlerFunc{
		"report":     c.report,
		"namespaces": func(w http.ResponseWriter, _ *http.Request) { answerJSON(w, http.StatusOK, s.namespaces()) },
		"explain":    c.explain,
		"devices":    c.devices,
		"locks":      c.locks,
		"events":     c.events,
		"flows":      func(w http.ResponseWriter, r *http.Request) { serveFlows(s, w, r) },
		"diagnosis":  func(w http.ResponseWriter, r *http.Request) { serveDiagnosis(s, w, r) },
		"world":      func(w http.ResponseWriter, r *http.Request) { serveWorld(s, w, r) },
		"pause":      c.pause,
		"resume":     c.resume,
		"reload":     c.reload,
	}
	mux := http.NewServeMux()
	var paths []string
	for i := range api.Operations {
		op := &api.Operations[i]
		h := handlers[op.Name]
		mux.HandleFunc(op.Method+" "+op.Path, func(w http.ResponseWriter, r *http.Request) {
			if op.ForRoot() && !isRoot(w, r) {
				return
			}
			h(w, r)
		})
		allow := op.Method
		if op.Method == http.MethodGet {
			allow += ", " + http.MethodHead
		}
		mux.HandleFunc(op.Path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", allow)
			answerError(w, http.StatusMethodNotAllowed, fmt.Errorf("%s takes %s, not %s", op.Path, op.Method, r.Method))
		})
		paths = append(paths, op.Path)
	}
	profiles(mux)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answerError(w, http.StatusNotFound, fmt.Errorf("there is no %q; this agent has %s", r.URL.Path, strings.Join(paths, ", ")))
	})
	return mux
}

func (c *control) report(w http.ResponseWriter, r *http.Request) {
	c.answerOf(w, r, func(rep *Report) any { return rep })
}

func (c *control) locks(w http.ResponseWriter, r *http.Request) {
	c.answerOf(w, r, func(rep *Report) any { return api.LocksOf(rep) })
}

func (c *control) answerOf(w http.ResponseWriter, r *http.Request, of func(*Report) any) {
	rep, err := c.reportOf(r.Context(), r.URL.Query().Get("netns"))
	if err != nil {
		answerError(w, statusOf(err), err)
		return
	}
	c.answerLarge(w, r, of(rep))
}

func (c *control) explain(w http.ResponseWriter, r *http.Request) {
	q, err := api.ParseQuestion(r.URL.Query())
	if err != nil {
		answerError(w, http.StatusBadRequest, err)
		return
	}
	a, asked := c.loopOf(w, r)
	if a == nil {
		return
	}
	defer asked()
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
}

func (c *control) devices(w http.ResponseWriter, r *http.Request) {
	all, err := flagOf(r.URL.Query(), "all")
	if err != nil {
		answerError(w, http.StatusBadRequest, err)
		return
	}
	a, asked := c.loopOf(w, r)
	if a == nil {
		return
	}
	defer asked()
	d, err := a.deviceList(r.Context(), a.call, all)
	if err != nil {
		answerError(w, http.StatusServiceUnavailable, err)
		return
	}
	if n := r.URL.Query().Get("netns"); n != "" && d.Netns != "" {
		d.Netns = n
	}
	answerJSON(w, http.StatusOK, d)
}

// loopOf is the agent that is asked for, and what gives back the turn to ask its loop. It has answered if there is none.
func (c *control) loopOf(w http.ResponseWriter, r *http.Request) (a *Agent, asked func()) {
	a, err := c.agentOf(r.URL.Query().Get("netns"))
	if err != nil {
		answerError(w, statusOf(err), err)
		return nil, nil
	}
	if asked = c.asking.take(r); asked == nil {
		answerError(w, http.StatusServiceUnavailable, fmt.Errorf("%d others are asking already: try again in a moment", maxAsking))
		return nil, nil
	}
	return a, asked
}

// events answers with the newest events, or with each one as it happens.
func (c *control) events(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	follow, err := flagOf(q, "follow")
	var since uint64
	if s := q.Get("since"); err == nil && s != "" {
		if since, err = strconv.ParseUint(s, 10, 64); err != nil {
			err = fmt.Errorf("since: %q is no number of an event", s)
		}
	}
	if err != nil {
		answerError(w, http.StatusBadRequest, err)
		return
	}
	a, err := c.agentOf(q.Get("netns"))
	if err != nil {
		answerError(w, statusOf(err), err)
		return
	}
	if !follow {
		l := &api.EventList{Version: api.Version, Since: a.ring.since, Events: []api.Event{}}
		if a.name != "" {
			l.Netns = q.Get("netns")
		}
		l.Events, l.Lost, l.Last = a.ring.after(since, maxEvents, l.Events)
		c.answerLarge(w, r, l)
		return
	}
	if r.Method == http.MethodHead { // there is nothing to wait for
		w.Header().Set("Content-Type", api.NDJSON)
		return
	}
	gone := c.follows.take(r)
	if gone == nil {
		answerError(w, http.StatusServiceUnavailable, fmt.Errorf("%d others follow events already: stop one of them", maxFollows))
		return
	}
	defer gone()
	a.followEvents(w, r, since, c.stopped)
}

// eventsAtOnce is how many events are copied at a time for one who follows, and followPatience how long he may
// take to read the next piece.
const (
	eventsAtOnce   = 64
	followPatience = 30 * time.Second
)

// followEvents writes events as they happen, until the client goes or the agent ends, and no other one takes its place. A client that does not
// read for followPatience is cut off; what it has missed meanwhile is told to one that reads slowly.
func (a *Agent) followEvents(w http.ResponseWriter, r *http.Request, since uint64, stopped <-chan struct{}) {
	rc := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	w.Header().Set("Content-Type", api.NDJSON)
	w.WriteHeader(http.StatusOK)
	var buf []api.Event
	for {
		if rc.SetWriteDeadline(time.Now().Add(followPatience)) != nil {
			return
		}
		var lost uint64
		more := a.ring.more(since)
		buf, lost, _ = a.ring.after(since, eventsAtOnce, buf[:0])
		if lost > 0 && since > 0 { // who asks from the beginning gets what there is
			if enc.Encode(api.EventLine{Lost: lost}) != nil {
				return
			}
		}
		for i := range buf {
			if enc.Encode(api.EventLine{Event: &buf[i]}) != nil {
				return
			}
			since = buf[i].Seq
		}
		if rc.Flush() != nil {
			return
		}
		if len(buf) > 0 {
			continue
		}
		select {
		case <-more:
			continue
		case <-r.Context().Done():
			return
		case <-a.ring.ended:
		case <-stopped:
		}
		if buf, _, _ = a.ring.after(since, 1, buf[:0]); len(buf) == 0 {
			return
		}
	}
}

func (c *control) pause(w http.ResponseWriter, r *http.Request) {
	var ask api.PauseRequest
	if !readBody(w, r, &ask) {
		return
	}
	p := &api.Paused{By: peerOf(r), Restore: ask.Restore}
	if ask.For != "" {
		d, err := time.ParseDuration(ask.For)
		if err != nil || d <= 0 {
			answerError(w, http.StatusBadRequest, fmt.Errorf("for: %q is no time above 0 with a unit, as 90s, 10m or 2h", ask.For))
			return
		}
		p.Until = time.Now().Add(d)
	}
	c.giveOrder(w, r, p)
}

func (c *control) resume(w http.ResponseWriter, r *http.Request) {
	if readBody(w, r, &api.ResumeRequest{}) {
		c.giveOrder(w, r, nil)
	}
}

func (c *control) giveOrder(w http.ResponseWriter, r *http.Request, p *api.Paused) {
	list, err := c.ordered(r.Context(), r.URL.Query().Get("netns"), p)
	if err != nil {
		answerError(w, statusOf(err), err)
		return
	}
	answerJSON(w, http.StatusOK, api.PauseAnswer{Version: api.Version, Namespaces: list})
}

func (c *control) reload(w http.ResponseWriter, r *http.Request) {
	if !readBody(w, r, &api.ReloadRequest{}) {
		return
	}
	a, err := c.reloaded(r.Context(), peerOf(r))
	var refused *refusedError
	switch {
	case err == nil:
		answerJSON(w, http.StatusOK, a)
	case errors.As(err, &refused):
		answerError(w, http.StatusConflict, err)
	case errors.Is(err, errNoFile):
		answerError(w, http.StatusNotImplemented, err)
	default:
		answerError(w, http.StatusServiceUnavailable, err)
	}
}

// maxBody bounds what a request may bring, in bytes.
const maxBody = 4 << 10

// readBody reads a request's JSON, strictly. It has answered if that is not possible.
func readBody(w http.ResponseWriter, r *http.Request, into any) bool {
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		answerError(w, http.StatusUnsupportedMediaType, fmt.Errorf("send JSON, with Content-Type: application/json"))
		return false
	}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); more == nil {
			err = errors.New("there is something behind the JSON")
		} else if !errors.Is(more, io.EOF) {
			err = more
		}
	}
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		answerError(w, http.StatusRequestEntityTooLarge, fmt.Errorf("the request is larger than %d bytes", maxBody))
	case err != nil:
		answerError(w, http.StatusBadRequest, fmt.Errorf("the request can't be read: %w", err))
	}
	return err == nil
}

func flagOf(v url.Values, key string) (bool, error) {
	s := v.Get(key)
	if s == "" {
		return false, nil
	}
	on, err := strconv.ParseBool(s)
	if err != nil {
		return false, fmt.Errorf("%s: %q is neither true nor false", key, s)
	}
	return on, nil
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

func answerJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A client that went away is its own affair.
	_ = json.NewEncoder(w).Encode(v)
}

func answerError(w http.ResponseWriter, code int, err error) {
	no := api.Error{Text: err.Error()}
	var absent *AbsentError
	if errors.As(err, &absent) {
		no.Text, no.Absent = absent.Text, absent.Of
	}
	answerJSON(w, code, no)
}

// flowOf is a question as an XFRM lookup sees it.
func flowOf(q Question, src netip.Addr, ifID uint32, oif int32) xfrmwatch.Flow {
	return xfrmwatch.Flow{Src: src, Dst: q.Dst, Proto: xfrmwatch.Proto(q.Proto), Dport: q.Port, Mark: q.Mark, IfID: ifID, Oif: oif}
}
