package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"syscall"
	"time"

	"tsoagent/agent/api"
)

// mostError bounds the text of an error: a configuration has a line for each mistake.
const mostError = 1 << 20

// errEarly is an answer that broke off.
var errEarly = errors.New("it ended early: the agent stopped, or was too busy; try again")

func inNetns(v url.Values, netns string) url.Values {
	if netns != "" {
		v.Set("netns", netns)
	}
	return v
}

// get asks for a document.
func get[T any](ctx context.Context, c *Client, path string, query url.Values) (*T, error) {
	return ask[T](ctx, c, http.MethodGet, path, query, nil)
}

// post orders something, and gets a document that says what came of it.
func post[T any](ctx context.Context, c *Client, path string, query url.Values, request any) (*T, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("agent: ask %s: %w", path, err)
	}
	return ask[T](ctx, c, http.MethodPost, path, query, body)
}

func ask[T any](ctx context.Context, c *Client, method, path string, query url.Values, body []byte) (*T, error) {
	a, err := c.open(ctx, method, path, query, body)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	into := new(T)
	err = json.NewDecoder(a).Decode(into)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = errEarly
	}
	if err != nil {
		return nil, unread(path, err)
	}
	if v := reflect.ValueOf(into).Elem(); v.Kind() == reflect.Struct {
		if f := v.FieldByName("Version"); f.IsValid() {
			if err := speaks(int(f.Int()), api.Version); err != nil {
				return nil, err
			}
		}
	}
	return into, nil
}

// speaks holds an answer's version to the one that is known. Within one, fields are only added: another one may mean something else.
func speaks(version, known int) error {
	if version != known {
		return fmt.Errorf("%w (it answers in version %d, and %d is known here)", ErrVersion, version, known)
	}
	return nil
}

// unread is why an answer could not be read.
func unread(path string, err error) error {
	if errors.Is(err, ErrSilent) {
		return err
	}
	return fmt.Errorf("agent: read the answer to %s: %w", path, err)
}

// An answer is the body of one, as long as the agent goes on with it.
type answer struct {
	body    io.ReadCloser
	ctx     context.Context
	cancel  context.CancelCauseFunc
	silence *time.Timer // ends ctx
	every   time.Duration
}

// Read reads what comes, and fails with ErrSilent when nothing does. Only the wait counts: what a pager takes to show it is not the
// agent's silence.
func (a *answer) Read(b []byte) (int, error) {
	if a.every > 0 {
		a.silence.Reset(a.every)
	}
	n, err := a.body.Read(b)
	a.silence.Stop()
	if err != nil && !errors.Is(err, io.EOF) && a.ctx.Err() != nil {
		err = context.Cause(a.ctx)
	}
	return n, err
}

// Close gives the connection back.
func (a *answer) Close() error {
	err := a.body.Close()
	a.cancel(nil)
	return err
}

// forever lets the agent say nothing for as long as it likes.
func (a *answer) forever() { a.every = 0 }

// open asks, and returns the answer's body if it is one.
func (c *Client) open(ctx context.Context, method, path string, query url.Values, body []byte) (*answer, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	a := &answer{ctx: ctx, cancel: cancel, every: c.patience}
	a.silence = time.AfterFunc(c.patience, func() {
		cancel(fmt.Errorf("%w for %s on %s: it hangs, or has too much to do; its log says more", ErrSilent, c.patience, c.path))
	})
	res, err := c.send(ctx, method, path, query, body)
	if err != nil {
		a.silence.Stop()
		cancel(nil)
		return nil, err
	}
	a.silence.Stop()
	a.body = res.Body
	if res.StatusCode != http.StatusOK {
		defer a.Close()
		return nil, refusal(res.StatusCode, res.Status, a)
	}
	return a, nil
}

func (c *Client) send(ctx context.Context, method, path string, query url.Values, body []byte) (*http.Response, error) {
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
		return nil, c.unanswered(ctx, path, err)
	}
	return res, nil
}

// unanswered says why nobody has answered. That no agent runs is said where that is sure: whoever hears it goes on without one.
func (c *Client) unanswered(ctx context.Context, path string, err error) error {
	var op *net.OpError
	dial := errors.As(err, &op) && op.Op == "dial"
	switch {
	case ctx.Err() != nil:
		if err = context.Cause(ctx); errors.Is(err, ErrSilent) {
			return err
		}
	case dial && errors.Is(err, os.ErrPermission):
		return fmt.Errorf("the control socket %s is not yours to open: run it as root: %w", c.path, ErrPermission)
	case dial && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOTDIR)):
		return fmt.Errorf("%w (nobody answers on %s)", ErrNoAgent, c.path)
	case dial && errors.Is(err, syscall.EAGAIN): // connect(2): as many connections wait as may
		return fmt.Errorf("%w on %s, where others wait already: it hangs, or has too much to do; its log says more", ErrSilent, c.path)
	}
	// What package net/http adds is the made-up name of the host.
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	return fmt.Errorf("agent: ask %s: %w", path, err)
}

// refusal is the error that an answer with another status than 200 is.
func refusal(code int, status string, body io.Reader) error {
	var e api.Error
	if err := json.NewDecoder(io.LimitReader(body, mostError)).Decode(&e); errors.Is(err, ErrSilent) {
		return err
	} else if err != nil || e.Text == "" {
		e.Text = status
	}
	var err error = &Error{code, e.Text}
	switch {
	case e.Absent != "":
		return &api.AbsentError{Of: e.Absent, Text: e.Text, Err: err}
	case code == http.StatusNotFound || code == http.StatusMethodNotAllowed: // the path itself
		return fmt.Errorf("%w (%w)", ErrVersion, err)
	}
	return err
}
