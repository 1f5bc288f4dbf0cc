package api

// AbsentError says that what a caller named isn't there: it is the question that has to be changed, and asking again doesn't help.
type AbsentError struct {
	// Of is what the name was given for: "dev" or "netns", as tsoctl's flags and the API's parameters are called.
	Of string
	// Text says it in a line.
	Text string
	// Err is what it was found out by, nil if that was no error.
	Err error
}

// Error is the text.
func (e *AbsentError) Error() string { return e.Text }

// Unwrap is the error that it was found out by.
func (e *AbsentError) Unwrap() error { return e.Err }

// The names that AbsentError has.
const (
	AbsentDevice = "dev"
	AbsentNetns  = "netns"
)
