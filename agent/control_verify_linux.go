package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"

	"tsoagent/agent/verify"
)

// worldPiece is one piece of the answer to /v1/world: first the world without its policies and SAs, then those, and
// an end, or what went wrong in the middle.
type worldPiece struct {
	World    *verify.World   `json:"world,omitempty"`
	Policies []verify.Policy `json:"policies,omitempty"`
	SAs      []verify.SA     `json:"sas,omitempty"`
	End      bool            `json:"end,omitempty"`
}

// worldPieces is how many policies or SAs there are in a piece, so that nobody has to have all of them as text.
const worldPieces = 256

// serveWorld answers with a line of JSON for each piece.
func serveWorld(s served, w http.ResponseWriter, r *http.Request) {
	netns := r.URL.Query().Get("netns")
	a, err := s.agentOf(netns)
	if err != nil {
		answerError(w, statusOf(err), err)
		return
	}
	// A world of 100,000 policies is megabytes of text: whoever reads it takes a turn, as for a list of connections.
	if err := a.conns.turn(r.Context()); err != nil {
		answerFlowsError(w, err)
		return
	}
	defer func() { <-a.conns.slots }()
	began := a.conns.now()
	world, err := a.verifyWorld(r.Context(), a.call)
	if err != nil {
		answerFlowsError(w, err)
		return
	}
	if netns != "" && world.Netns != "" {
		world.Netns = netns
	}
	enc := json.NewEncoder(&patient{w: w, rc: http.NewResponseController(w), step: a.conns.step})
	pieces := []worldPiece{{World: world}}
	for list := range slices.Chunk(world.Policies, worldPieces) {
		pieces = append(pieces, worldPiece{Policies: list})
	}
	for list := range slices.Chunk(world.SAs, worldPieces) {
		pieces = append(pieces, worldPiece{SAs: list})
	}
	for _, p := range append(pieces, worldPiece{End: true}) {
		if a.conns.now().Sub(began) > a.conns.whole || enc.Encode(p) != nil {
			return // a client that went away, or reads a bit now and then, is its own affair
		}
	}
}

// VerifyWorldIn asks for what packets are sorted by in a namespace, by any of the names that the agent knows.
func (c *Client) VerifyWorldIn(ctx context.Context, netns string) (*verify.World, error) {
	body, err := c.open(ctx, "/v1/world", inNetns(url.Values{}, netns))
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var w *verify.World
	for dec := json.NewDecoder(body); ; {
		var p worldPiece
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
