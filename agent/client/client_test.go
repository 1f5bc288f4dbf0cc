package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/api"
	"tsoagent/agent/flows"
)

// answering is a client of somebody who answers on a control socket in a way of his own.
func answering(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	c := New(t.TempDir())
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", c.path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	t.Cleanup(func() {
		c.Close()
		_ = srv.Close()
		<-done
	})
	return c
}

// saying answers each request alike.
func saying(t *testing.T, status int, body string) *Client {
	t.Helper()
	return answering(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
}

// asks is each way to ask, by the path.
var asks = map[string]func(context.Context, *Client) error{
	"/v1/report":     func(ctx context.Context, c *Client) error { _, err := c.Report(ctx); return err },
	"/v1/namespaces": func(ctx context.Context, c *Client) error { _, err := c.Namespaces(ctx); return err },
	"/v1/explain": func(ctx context.Context, c *Client) error {
		_, err := c.Explain(ctx, api.Question{Dst: netip.MustParseAddr("fd00::1")})
		return err
	},
	"/v1/devices":   func(ctx context.Context, c *Client) error { _, err := c.DevicesIn(ctx, "", true); return err },
	"/v1/locks":     func(ctx context.Context, c *Client) error { _, err := c.LocksIn(ctx, ""); return err },
	"/v1/events":    func(ctx context.Context, c *Client) error { _, err := c.EventsIn(ctx, "", 0); return err },
	"/v1/diagnosis": func(ctx context.Context, c *Client) error { _, err := c.DiagnosisIn(ctx, ""); return err },
	"/v1/flows":     list,
	"/v1/world":     func(ctx context.Context, c *Client) error { _, err := c.WorldIn(ctx, ""); return err },
	"/v1/pause":     func(ctx context.Context, c *Client) error { _, err := c.Pause(ctx, "", api.PauseRequest{}); return err },
	"/v1/resume":    func(ctx context.Context, c *Client) error { _, err := c.Resume(ctx, ""); return err },
	"/v1/reload":    func(ctx context.Context, c *Client) error { _, err := c.Reload(ctx); return err },
	"/v1/events, followed": func(ctx context.Context, c *Client) error {
		return c.Follow(ctx, "", 0, func(api.EventLine) error { return nil })
	},
}

func list(ctx context.Context, c *Client) error {
	_, err := c.FlowsIn(ctx, "", flows.Filter{}, func(*flows.Flow) error { return nil })
	return err
}

func TestEveryOperationCanBeAsked(t *testing.T) {
	for _, op := range api.Operations {
		if asks[op.Path] == nil {
			t.Errorf("%s is not tested", op.Path)
		}
	}
}

// eachAsk runs a test for each way to ask.
func eachAsk(t *testing.T, fn func(t *testing.T, ask func(context.Context, *Client) error)) {
	t.Helper()
	for path, ask := range asks {
		t.Run(strings.TrimPrefix(path, "/v1/"), func(t *testing.T) { fn(t, ask) })
	}
}

// A refusal is the agent's sentence, and what kind it is can be asked.
func TestRefusals(t *testing.T) {
	eachAsk(t, func(t *testing.T, ask func(context.Context, *Client) error) {
		for _, tt := range []struct {
			status     int
			body, want string
			version    bool
		}{
			{503, `{"error":"8 others are asking already: try again in a moment"}`, "8 others are asking already: try again in a moment", false},
			{500, "<html>", "500 Internal Server Error", false},
			{500, `{"error":""}`, "500 Internal Server Error", false},
			{500, "", "500 Internal Server Error", false},
			{404, `{"error":"there is no \"/v1/x\"; this agent has /v1/report"}`, `there is no "/v1/x"; this agent has /v1/report`, true},
			{405, `{"error":"/v1/reload takes GET, not POST"}`, "takes GET", true},
			{302, "", "302 Found", false},
		} {
			err := ask(t.Context(), saying(t, tt.status, tt.body))
			var e *Error
			if !errors.As(err, &e) || e.Status != tt.status || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%d %q: %v", tt.status, tt.body, err)
			}
			if errors.Is(err, ErrVersion) != tt.version || errors.Is(err, ErrNoAgent) || errors.Is(err, ErrPermission) {
				t.Errorf("%d %q is taken for something else: %v", tt.status, tt.body, err)
			}
		}
		err := ask(t.Context(), saying(t, 403, `{"error":"only root may do this"}`))
		if !errors.Is(err, ErrPermission) || err.Error() != "only root may do this" {
			t.Errorf("forbidden: %v", err)
		}
		err = ask(t.Context(), saying(t, 404, `{"error":"this agent does not follow x","absent":"netns"}`))
		var absent *api.AbsentError
		if !errors.As(err, &absent) || absent.Of != api.AbsentNetns || errors.Is(err, ErrVersion) {
			t.Errorf("absent: %v", err)
		}
	})
}

// The text of an error is read up to a bound, however much of it comes.
func TestHugeRefusalIsCutOff(t *testing.T) {
	sent := make(chan int, 1)
	c := answering(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(500)
		n, _ := io.WriteString(w, `{"error":"`)
		for piece := strings.Repeat("x", 64<<10); n < 64<<20; {
			m, err := io.WriteString(w, piece)
			if n += m; err != nil {
				break
			}
		}
		sent <- n
	})
	if _, err := c.Report(t.Context()); err == nil || err.Error() != "500 Internal Server Error" {
		t.Errorf("%.80v", err)
	}
	if n := <-sent; n >= 64<<20 {
		t.Errorf("all of it was read")
	}
}

// What is no answer is said to be none.
func TestMalformedAnswers(t *testing.T) {
	eachAsk(t, func(t *testing.T, ask func(context.Context, *Client) error) {
		for _, body := range []string{"<html>\n", `{"version":`, "7\n", `{"version":"1","flows":7,"world":7,"seq":"x","connections":"y","configured":1}` + "\n", "\x00\n"} {
			c := saying(t, 200, body)
			err := ask(t.Context(), c)
			if followed := strings.HasSuffix(t.Name(), "followed"); err == nil && (!followed || body != `{"version":`) {
				t.Errorf("%q is taken for an answer", body)
			}
			if err != nil && !strings.HasPrefix(err.Error(), "agent: read the answer to /v1/") {
				t.Errorf("%q: %v", body, err)
			}
		}
	})
}

func TestAnswersThatBreakOff(t *testing.T) {
	eachAsk(t, func(t *testing.T, ask func(context.Context, *Client) error) {
		c := answering(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, `{"seq":1`)
		})
		err := ask(t.Context(), c)
		if strings.HasSuffix(t.Name(), "followed") {
			if err != nil {
				t.Errorf("the agent has stopped, which is no error: %v", err)
			}
		} else if err == nil || !strings.HasSuffix(err.Error(), "it ended early: the agent stopped, or was too busy; try again") {
			t.Errorf("got %v", err)
		}
	})
}

// A line of the list of connections is bounded.
func TestHugeLineIsRefused(t *testing.T) {
	c := saying(t, 200, `{"local":"`+strings.Repeat("x", 2*maxFlowLine))
	if err := list(t.Context(), c); !errors.Is(err, bufio.ErrBufferFull) {
		t.Errorf("got %.80v", err)
	}
}

// An answer in another version may mean something else: it is refused and not shown.
func TestOtherVersionsAreRefused(t *testing.T) {
	eachAsk(t, func(t *testing.T, ask func(context.Context, *Client) error) {
		for _, suffix := range []string{"namespaces", "diagnosis", "events,_followed"} {
			if strings.HasSuffix(t.Name(), "/"+suffix) {
				return // it has no version but the one of its path
			}
		}
		for _, version := range []string{"0", "2"} {
			body := fmt.Sprintf(`{"version":%[1]s,"world":{"version":%[1]s},"result":{"version":%[1]s}}`+"\n", version)
			err := ask(t.Context(), saying(t, 200, body))
			if want := "(it answers in version " + version + ", and 1 is known here)"; !errors.Is(err, ErrVersion) || !strings.HasSuffix(err.Error(), want) {
				t.Errorf("version %s: %v", version, err)
			}
		}
	})
}

// An agent that hangs is not one that isn't there: nobody goes on without it.
func TestSilentAgent(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	eachAsk(t, func(t *testing.T, ask func(context.Context, *Client) error) {
		begins := func(begin string) *Client {
			c := answering(t, func(w http.ResponseWriter, r *http.Request) {
				if begin != "" {
					_, _ = io.WriteString(w, begin)
					_ = http.NewResponseController(w).Flush()
				}
				select {
				case <-release:
				case <-r.Context().Done():
				}
			})
			c.patience = 50 * time.Millisecond
			return c
		}
		c := begins("")
		if err := ask(t.Context(), c); !errors.Is(err, ErrSilent) || errors.Is(err, ErrNoAgent) || !strings.HasPrefix(err.Error(), "the agent says nothing for 50ms on "+c.path+": ") {
			t.Errorf("before its answer: %v", err)
		}
		if strings.HasSuffix(t.Name(), "followed") {
			return
		}
		if err := ask(t.Context(), begins(`{"version":`)); !errors.Is(err, ErrSilent) {
			t.Errorf("in its answer: %v", err)
		}
	})
}

// Who follows events waits for the next one for as long as it takes.
func TestFollowingIsPatient(t *testing.T) {
	next := make(chan struct{})
	c := answering(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"seq":1}`+"\n")
		_ = http.NewResponseController(w).Flush()
		<-next
		_, _ = io.WriteString(w, `{"lost":2}`+"\n")
	})
	c.patience = 50 * time.Millisecond
	var got []api.EventLine
	err := c.Follow(t.Context(), "", 0, func(l api.EventLine) error {
		if got = append(got, l); len(got) == 1 {
			time.AfterFunc(4*c.patience, func() { close(next) })
		}
		return nil
	})
	if err != nil || len(got) != 2 || got[0].Event == nil || got[0].Seq != 1 || got[1].Event != nil || got[1].Lost != 2 {
		t.Errorf("%v, %+v", err, got)
	}
}

// What the reader of a list takes for itself is not the agent's silence.
func TestSlowReaderBlamesNobody(t *testing.T) {
	c := answering(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"local":"10.0.0.1:1"}`+"\n")
		_ = http.NewResponseController(w).Flush()
		_, _ = io.WriteString(w, `{"result":{"version":1}}`+"\n")
	})
	c.patience = 50 * time.Millisecond
	_, err := c.FlowsIn(t.Context(), "", flows.Filter{}, func(*flows.Flow) error {
		<-time.After(4 * c.patience)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestCancelledContexts(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	eachAsk(t, func(t *testing.T, ask func(context.Context, *Client) error) {
		asked := make(chan struct{}, 1)
		c := answering(t, func(_ http.ResponseWriter, r *http.Request) {
			asked <- struct{}{}
			select {
			case <-release:
			case <-r.Context().Done():
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-asked; cancel() }()
		err := ask(ctx, c)
		if !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoAgent) || errors.Is(err, ErrSilent) || strings.Contains(err.Error(), "http://") {
			t.Errorf("while it is asked: %v", err)
		}
		if err := ask(ctx, c); !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoAgent) {
			t.Errorf("before it is asked: %v", err)
		}
	})
}

// That no agent runs is said where that is sure.
func TestWhoIsNotThere(t *testing.T) {
	for name, tt := range map[string]struct {
		prepare func(t *testing.T, c *Client)
		want    error
	}{
		"no directory": {func(_ *testing.T, c *Client) { c.path = filepath.Join(filepath.Dir(c.path), "none", "tsoagent.sock") }, ErrNoAgent},
		"no socket":    {func(*testing.T, *Client) {}, ErrNoAgent},
		"a file": {func(t *testing.T, c *Client) {
			if err := os.WriteFile(c.path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, ErrNoAgent},
		"below a file": {func(t *testing.T, c *Client) {
			if err := os.WriteFile(c.path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			c.path += "/tsoagent.sock"
		}, ErrNoAgent},
		"a dead agent's socket": {func(t *testing.T, c *Client) {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.path})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			_ = l.Close()
		}, ErrNoAgent},
		"one whose queue is full": {func(t *testing.T, c *Client) { fill(t, c.path) }, ErrSilent},
		"a path that can be none": {func(_ *testing.T, c *Client) { c.path = "/" + strings.Repeat("x", 200) }, syscall.EINVAL},
	} {
		t.Run(name, func(t *testing.T) {
			c := New(t.TempDir())
			tt.prepare(t, c)
			for _, is := range []error{ErrNoAgent, ErrSilent, syscall.EINVAL} {
				if _, err := c.Report(t.Context()); errors.Is(err, is) != errors.Is(tt.want, is) {
					t.Errorf("%v, want %v", err, tt.want)
				}
			}
		})
	}
}

// fill listens on a socket for one connection at a time, takes none, and has others wait until no more may.
func fill(t *testing.T, path string) {
	t.Helper()
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(l) })
	if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: path}), unix.Listen(l, 1)); err != nil {
		t.Fatal(err)
	}
	for {
		c, err := net.Dial("unix", path)
		if errors.Is(err, syscall.EAGAIN) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
	}
}
