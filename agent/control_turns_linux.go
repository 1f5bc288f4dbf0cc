package agent

import (
	"fmt"
	"net/http"
	"time"
)

// maxAsking is how many requests wait for loops at a time, and maxFollows how many follow events. maxAnswers is how many answers
// that can be large are written at a time, each of which is in memory as a whole until it is read; others wait for answerPatience.
const (
	maxAsking      = 8
	maxFollows     = 16
	maxAnswers     = 4
	answerPatience = 5 * time.Second
)

// turns are so many at a time for all users, and as many again for root, whom they can't keep out.
type turns struct{ root, others chan struct{} }

func newTurns(n int) turns { return turns{make(chan struct{}, n), make(chan struct{}, n)} }

// of are the turns of who asks.
func (t turns) of(r *http.Request) chan struct{} {
	if cred := credIn(r); cred != nil && cred.Uid == 0 {
		return t.root
	}
	return t.others
}

// take takes a turn for who asks, and returns what gives it back, nil if there is none.
func (t turns) take(r *http.Request) (give func()) {
	all := t.of(r)
	select {
	case all <- struct{}{}:
		return func() { <-all }
	default:
		return nil
	}
}

// wait is take, and waits for a turn for a while.
func (t turns) wait(r *http.Request, patience time.Duration) (give func()) {
	all := t.of(r)
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case all <- struct{}{}:
		return func() { <-all }
	case <-late.C:
	case <-r.Context().Done():
	}
	return nil
}

// answerLarge is answerJSON for what can be large, when it is its turn.
func (c *control) answerLarge(w http.ResponseWriter, r *http.Request, v any) {
	written := c.answers.wait(r, answerPatience)
	if written == nil {
		answerError(w, http.StatusServiceUnavailable, fmt.Errorf("%d others read their answers already: try again in a moment", maxAnswers))
		return
	}
	defer written()
	answerJSON(w, http.StatusOK, v)
}
