package api

import (
	"net/http"

	"tsoagent/agent/flows"
	"tsoagent/agent/verify"
)

// NDJSON is the media type of answers that come line by line.
const NDJSON = "application/x-ndjson"

// Operation is one thing that the control API does.
type Operation struct {
	Name    string // unique
	Method  string
	Path    string
	Summary string
	Query   []Parameter
	// Body is a value of the request's type, nil for none.
	Body any
	// Answer is a value of the type that is answered as JSON, nil for none, and Line one of each line of NDJSON.
	Answer, Line any
	// Errors are the statuses that are answered with an Error.
	Errors []int
}

// Parameter is one of a query.
type Parameter struct {
	Name, Type, Text string
	Required         bool
}

// ForRoot says that only root may ask: whatever is no GET changes something.
func (o *Operation) ForRoot() bool { return o.Method != http.MethodGet }

var (
	inNetns    = Parameter{Name: "netns", Type: "string", Text: "the network namespace: host, a name in /run/netns, a path or pid:N; without it the one that the agent was started in"}
	ofNetns    = Parameter{Name: "netns", Type: "string", Text: "only this network namespace; without it all of them, and those that come to be followed"}
	readErrors = []int{http.StatusNotFound, http.StatusInternalServerError, http.StatusServiceUnavailable}
	rootErrors = []int{
		http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound,
		http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusServiceUnavailable,
	}
)

// Operations are all that there are. Whoever can open the socket may ask what is a GET; the rest is for root.
var Operations = []Operation{
	{
		Name: "report", Method: http.MethodGet, Path: "/v1/report", Answer: Report{}, Errors: readErrors,
		Summary: "The newest report of a namespace.", Query: []Parameter{inNetns},
	},
	{
		Name: "namespaces", Method: http.MethodGet, Path: "/v1/namespaces", Answer: []NamespaceReport{}, Errors: []int{http.StatusServiceUnavailable},
		Summary: "All namespaces that are followed, or are to be.",
	},
	{
		Name: "explain", Method: http.MethodGet, Path: "/v1/explain", Answer: Explanation{},
		Errors:  []int{http.StatusBadRequest, http.StatusNotFound, http.StatusInternalServerError, http.StatusServiceUnavailable},
		Summary: "What happens to the packets of a flow, and why.",
		Query: []Parameter{
			inNetns,
			{Name: "dst", Type: "string", Text: "the destination address", Required: true},
			{Name: "from", Type: "string", Text: "the source address; without it the one that the kernel picks"},
			{Name: "proto", Type: "integer", Text: "the IP protocol, 6 for TCP"},
			{Name: "port", Type: "integer", Text: "the destination port"},
			{Name: "mark", Type: "string", Text: "the fwmark, decimal or with 0x"},
		},
	},
	{
		Name: "devices", Method: http.MethodGet, Path: "/v1/devices", Answer: DeviceList{},
		Errors:  []int{http.StatusBadRequest, http.StatusNotFound, http.StatusInternalServerError, http.StatusServiceUnavailable},
		Summary: "The devices that concern the agent, with their features and who holds them off.",
		Query:   []Parameter{inNetns, {Name: "all", Type: "boolean", Text: "all devices of the namespace"}},
	},
	{
		Name: "locks", Method: http.MethodGet, Path: "/v1/locks", Answer: LockList{}, Errors: readErrors,
		Summary: "Everything that gives covered flows an MTU: the locks of the newest report.", Query: []Parameter{inNetns},
	},
	{
		Name: "events", Method: http.MethodGet, Path: "/v1/events", Answer: EventList{}, Line: EventLine{},
		Errors:  []int{http.StatusBadRequest, http.StatusNotFound, http.StatusInternalServerError, http.StatusServiceUnavailable},
		Summary: "What happened, with its cause: the newest events, or with `follow` each one as it happens, until the client goes or the agent stops.",
		Query: []Parameter{
			inNetns,
			{Name: "since", Type: "integer", Text: "only those with a higher number"},
			{Name: "follow", Type: "boolean", Text: "go on with what happens, as lines of JSON"},
		},
	},
	{
		Name: "flows", Method: http.MethodGet, Path: "/v1/flows", Line: FlowLine{},
		Errors:  []int{http.StatusBadRequest, http.StatusNotFound, http.StatusInternalServerError, http.StatusNotImplemented, http.StatusServiceUnavailable},
		Summary: "TCP connections as they come from the kernel; the last line has the result, or what went wrong in the middle.",
		Query: []Parameter{
			inNetns,
			{Name: "lost", Type: "boolean", Text: "only those that have lost offload without being covered"},
			{Name: "listener", Type: "string", Text: "only those that came from this listener: PORT, ADDRESS:PORT or [ADDRESS]:PORT"},
			{Name: "dev", Type: "string", Text: "only those that leave by this device"},
			{Name: "state", Type: "string", Text: "only those in these states, by their names in ss(8), with commas; all for any"},
			{Name: "processes", Type: "boolean", Text: "also who has each open"},
		},
	},
	{
		Name: "diagnosis", Method: http.MethodGet, Path: "/v1/diagnosis", Answer: Diagnosis{},
		Errors:  []int{http.StatusNotFound, http.StatusInternalServerError, http.StatusServiceUnavailable},
		Summary: "A diagnosis of the connections that is some seconds old at most.", Query: []Parameter{inNetns},
	},
	{
		Name: "world", Method: http.MethodGet, Path: "/v1/world", Line: WorldPiece{},
		Errors:  []int{http.StatusNotFound, http.StatusInternalServerError, http.StatusServiceUnavailable},
		Summary: "What `tsoctl verify` sorts packets by: first the devices, then policies and SAs, bit by bit; without a last line that says `end` it broke off.",
		Query:   []Parameter{inNetns},
	},
	{
		Name: "pause", Method: http.MethodPost, Path: "/v1/pause", Body: PauseRequest{}, Answer: PauseAnswer{}, Errors: rootErrors,
		Summary: "Nothing is written to the kernel from the answer on, until it is resumed; what is in place stays, or is given back first.",
		Query:   []Parameter{ofNetns},
	},
	{
		Name: "resume", Method: http.MethodPost, Path: "/v1/resume", Body: ResumeRequest{}, Answer: PauseAnswer{}, Errors: rootErrors,
		Summary: "The agent goes on, and what is missing is in place when the answer comes, or on its way.",
		Query:   []Parameter{ofNetns},
	},
	{
		Name: "reload", Method: http.MethodPost, Path: "/v1/reload", Body: ReloadRequest{}, Answer: ReloadAnswer{},
		Errors: []int{
			http.StatusBadRequest, http.StatusForbidden, http.StatusConflict, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType,
			http.StatusNotImplemented, http.StatusServiceUnavailable,
		},
		Summary: "The configuration is read again, and taken over if it is right and takes no restart; else the one before it stays in use, and the error has a line for each mistake.",
	},
}

// FlowLine is one line of the list of flows: a flow, or, as the last one, the result or what went wrong in the
// middle.
type FlowLine struct {
	flows.Flow
	Result *flows.Result `json:"result,omitempty"`
	Error  string        `json:"error,omitempty"`
}

// WorldPiece is one line of what packets are sorted by: first the world without its policies and SAs, then those, and
// an end.
type WorldPiece struct {
	World    *verify.World   `json:"world,omitempty"`
	Policies []verify.Policy `json:"policies,omitempty"`
	SAs      []verify.SA     `json:"sas,omitempty"`
	End      bool            `json:"end,omitempty"`
}
