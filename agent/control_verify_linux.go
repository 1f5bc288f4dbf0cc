package agent

import (
	"encoding/json"
	"net/http"
	"slices"

	"tsoagent/agent/api"
)

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
	pieces := []api.WorldPiece{{World: world}}
	for list := range slices.Chunk(world.Policies, worldPieces) {
		pieces = append(pieces, api.WorldPiece{Policies: list})
	}
	for list := range slices.Chunk(world.SAs, worldPieces) {
		pieces = append(pieces, api.WorldPiece{SAs: list})
	}
	for _, p := range append(pieces, api.WorldPiece{End: true}) {
		if a.conns.now().Sub(began) > a.conns.whole || enc.Encode(p) != nil {
			return // a client that went away, or reads a bit now and then, is its own affair
		}
	}
}
