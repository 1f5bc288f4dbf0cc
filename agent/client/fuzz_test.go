package client

import (
	"bytes"
	"io"
	"net/http"
	"testing"

	"tsoagent/agent/api"
	"tsoagent/agent/flows"
)

// answered is a client whose requests are all answered with the same.
type answered struct {
	status int
	body   []byte
}

func (a answered) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: a.status, Status: http.StatusText(a.status), Body: io.NopCloser(bytes.NewReader(a.body)), Request: r}, nil
}

// FuzzAnswers has an agent answer anything: the client gives an answer of its own version or an error, never both, and it comes to an end.
func FuzzAnswers(f *testing.F) {
	for _, s := range []string{
		``, `{}`, `{"version":1}`, `{"version":2}`, `null`, `{"error":"no"}`, `{"event":{"seq":1}}` + "\n" + `{"lost":3}`,
		`{"world":{"version":1}}` + "\n" + `{"end":true}`, `{"end":true}`, `{"result":{"version":1}}` + "\n", `{"error":"no such device","absent":"device"}`,
	} {
		f.Add(uint16(http.StatusOK), []byte(s))
		f.Add(uint16(http.StatusNotFound), []byte(s))
	}
	f.Fuzz(func(t *testing.T, status uint16, body []byte) {
		c := New(t.TempDir())
		c.http.Transport = answered{200 + int(status)%400, body}
		ctx := t.Context()
		if r, err := c.ReportIn(ctx, ""); (r == nil) == (err == nil) || err == nil && r.Version != api.Version {
			t.Errorf("%+v, %v", r, err)
		}
		if w, err := c.WorldIn(ctx, ""); (w == nil) == (err == nil) {
			t.Errorf("%+v, %v", w, err)
		}
		lines := 0
		if r, err := c.FlowsIn(ctx, "", flows.Filter{}, func(*flows.Flow) error { lines++; return nil }); (r == nil) == (err == nil) || lines > bytes.Count(body, []byte("\n")) {
			t.Errorf("%d flows, %+v, %v", lines, r, err)
		}
		events := 0
		if err := c.Follow(ctx, "", 0, func(api.EventLine) error { events++; return nil }); events > len(body) {
			t.Errorf("%d events in %d bytes, %v", events, len(body), err)
		}
	})
}
