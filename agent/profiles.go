package agent

import (
	"net/http"
	"net/http/pprof"
)

// Profiles of the agent itself, for `go tool pprof`. A profile tells nothing of what is covered, but its taking costs the agent time, and
// an execution trace a lot: root alone may ask. They are on the control socket only. That net/http/pprof registers itself with
// http.DefaultServeMux changes nothing, as nothing serves that.

// profilesPath is where they are, each under its name in runtime/pprof.
const profilesPath = "/debug/pprof/"

// profiles has mux answer for them. The profile of the CPU and the trace take `seconds`, and put the end of their answer off by as many.
func profiles(mux *http.ServeMux) {
	for path, h := range map[string]http.HandlerFunc{
		"":        pprof.Index, // the list, and those that have no handler of their own: heap, allocs, goroutine …
		"profile": pprof.Profile,
		"trace":   pprof.Trace,
	} {
		mux.HandleFunc("GET "+profilesPath+path, func(w http.ResponseWriter, r *http.Request) {
			if isRoot(w, r) {
				h(w, r)
			}
		})
	}
}
