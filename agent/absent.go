package agent

// AbsentError says that what a caller named isn't there: it is the question that has to be changed, and asking again doesn't help.
type AbsentError struct {
	// Of is what the name was given for: "dev" or "netns", as tsoctl's flags and the control API's parameters are called.
	Of string
	// Text says it in a line.
	Text string

	err error // what it was found out by, if that was an error
}

// Error is the text.
func (e *AbsentError) Error() string { return e.Text }

// Unwrap is the error that it was found out by.
func (e *AbsentError) Unwrap() error { return e.err }

// The names that AbsentError has.
const (
	ofDevice = "dev"
	ofNetns  = "netns"
)
