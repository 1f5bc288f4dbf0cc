package metrics

import (
	"net/http"
	"time"
)

// maxScrapes is how many pages are made at a time, and scrapePatience how long a scrape waits for its own.
const (
	maxScrapes     = 4
	scrapePatience = 10 * time.Second
)

// inTurn has few requests answered at a time: the others wait in the order in which they came, so that who asks all the time
// doesn't keep others out. An answer is made as a whole before it is written, so nobody waits for who doesn't read.
func inTurn(h http.Handler) http.Handler {
	turns := make(chan struct{}, maxScrapes)
	return http.TimeoutHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case turns <- struct{}{}:
			defer func() { <-turns }()
			h.ServeHTTP(w, r)
		case <-r.Context().Done(): // the answer is there already
		}
	}), scrapePatience, "too many scrapes at once: try again in a moment\n")
}
