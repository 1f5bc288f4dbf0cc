package agent

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tsoagent/agent/api"
	"tsoagent/agent/journal"
)

// FuzzReadBody: what a request brings is taken strictly or refused with an answer that a program can read, and as it would be sent again.
func FuzzReadBody(f *testing.F) {
	for _, s := range []string{`{"for":"10m","restore":true}`, `{}`, `{"for":1}`, `{} {}`, `{"far":"1s"}`, `{"for":"` + strings.Repeat("9", maxBody) + `"}`, "null", "[", `{"for":"\ud800"}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, body string) {
		r := httptest.NewRequest(http.MethodPost, "/v1/pause", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		var ask api.PauseRequest
		if !readBody(w, r, &ask) {
			var no api.Error
			if err := json.Unmarshal(w.Body.Bytes(), &no); err != nil || no.Text == "" || w.Code != http.StatusBadRequest && w.Code != http.StatusRequestEntityTooLarge {
				t.Errorf("%d %s: %v", w.Code, w.Body, err)
			}
			return
		}
		if w.Body.Len() > 0 || len(ask.For) > maxBody {
			t.Errorf("%q is taken, and answered with %s", body, w.Body)
		}
		sent, err := json.Marshal(ask)
		var again api.PauseRequest
		if err != nil || json.Unmarshal(sent, &again) != nil || again != ask {
			t.Errorf("%+v is %s, and that is %+v, %v", ask, sent, again, err)
		}
	})
}

// FuzzAdopt has an agent adopt what it can't know to have written: a journal's entry of any kind is taken over once, or refused.
func FuzzAdopt(f *testing.F) {
	kinds := []journal.Kind{kindHold, kindLock, kindTables, kindMTU, kindClamp, kindLane, kindMoved, kindDeviceMTU}
	for i := range kinds {
		for _, data := range []string{`{}`, `null`, `{"device":{"index":3,"name":"eth0"},"feature":"tx-tcp-segmentation"}`, `{"dst":"10.0.0.0/8","table":254,"claim":{"ours":1400}}`, `{"index":-1}`, `[]`} {
			f.Add(uint8(i), data)
		}
	}
	f.Fuzz(func(t *testing.T, kind uint8, data string) {
		if !json.Valid([]byte(data)) {
			return // the journal's own decoder refuses that (agent/journal, FuzzParse)
		}
		a := newAgent(Config{RunDir: "/nonexistent"}.WithDefaults(), discard(), "")
		e := journal.Entry{ID: "x", Kind: kinds[int(kind)%len(kinds)], Data: json.RawMessage(data)}
		if err := a.adoptEntry(e); err != nil {
			return
		}
		if n := len(a.st.holds) + len(a.st.locks) + len(a.st.adopted) + len(a.st.mtus) + len(a.st.lanes.booked); n > 1 {
			t.Errorf("%d claims from one entry %s", n, data)
		}
	})
}
