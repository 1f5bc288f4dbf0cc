package flows

import (
	"bytes"
	"encoding/json"
	"strconv"
	"unicode/utf8"

	"tsoagent/sockopt"
)

// A machine has a million connections, and encoding/json takes longer for one than the kernel takes to
// tell of it. These two write and read exactly its form of a Flow, several times as fast, and leave to it
// what is not simple.

// AppendJSON appends the flow as json.Marshal would write it.
func AppendJSON(b []byte, f *Flow) ([]byte, error) {
	b = append(b, '{')
	b = appendText(b, "state", f.State)
	b = appendText(b, "local", f.Local)
	if f.Remote != "" {
		b = appendText(b, "remote", f.Remote)
	}
	b = appendText(b, "coverage", f.Coverage)
	if f.Policy != 0 {
		b = strconv.AppendUint(appendName(b, "policy"), uint64(f.Policy), 10)
	}
	b = appendText(b, "segmentation", string(f.Segmentation))
	if f.Device != "" {
		b = appendText(b, "device", f.Device)
	}
	if f.Lost {
		b = append(appendName(b, "lost"), "true"...)
	}
	if f.Contradiction != "" {
		b = appendText(b, "contradiction", f.Contradiction)
	}
	if f.Why != "" {
		b = appendText(b, "why", f.Why)
	}
	if f.Listener != "" {
		b = appendText(b, "listener", f.Listener)
	}
	b = strconv.AppendUint(appendName(b, "uid"), uint64(f.UID), 10)
	if f.Inode != 0 {
		b = strconv.AppendUint(appendName(b, "inode"), f.Inode, 10)
	}
	if len(f.Processes) > 0 {
		p, err := json.Marshal(f.Processes)
		if err != nil {
			return b, err
		}
		b = append(appendName(b, "processes"), p...)
	}
	return append(b, '}'), nil
}

func appendName(b []byte, name string) []byte {
	if b[len(b)-1] != '{' {
		b = append(b, ',')
	}
	b = append(append(b, '"'), name...)
	return append(b, '"', ':')
}

func appendText(b []byte, name, s string) []byte {
	b = appendName(b, name)
	if simple(s) {
		return append(append(append(b, '"'), s...), '"')
	}
	text, err := json.Marshal(s)
	if err != nil {
		return append(b, `""`...) // which no string does
	}
	return append(b, text...)
}

// simple says that a text is itself between the quotes of JSON, as encoding/json writes it.
func simple[T string | []byte](s T) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ', c >= utf8.RuneSelf-1, c == '"', c == '\\', c == '<', c == '>', c == '&':
			return false
		}
	}
	return true
}

// ParseJSON reads one flow that AppendJSON wrote, into one that may hold an earlier one: what is the same
// is not copied anew. It is false for any other line, which is for encoding/json.
func ParseJSON(line []byte, f *Flow) bool {
	line = bytes.TrimSuffix(line, []byte("\n"))
	if len(line) < 2 || line[0] != '{' || line[len(line)-1] != '}' {
		return false
	}
	old := *f
	*f = Flow{}
	rest := line[1 : len(line)-1]
	for len(rest) > 0 {
		var name, value []byte
		var text, ok bool
		if name, value, text, rest, ok = field(rest); !ok || !f.set(name, value, text, &old) {
			*f = Flow{}
			return false
		}
	}
	return f.State != ""
}

// field cuts "name":value from the rest of an object. text says that the value was quoted.
func field(b []byte) (name, value []byte, text bool, rest []byte, ok bool) {
	name, b, ok = quoted(b)
	if !ok || len(b) < 2 || b[0] != ':' {
		return nil, nil, false, nil, false
	}
	b = b[1:]
	if b[0] == '"' {
		text = true
		value, b, ok = quoted(b)
	} else {
		n := bytes.IndexByte(b, ',')
		if n < 0 {
			n = len(b)
		}
		value, b = b[:n], b[n:]
	}
	if len(b) > 0 {
		ok = ok && b[0] == ',' && len(b) > 1
		b = b[1:]
	}
	return name, value, text, b, ok
}

func quoted(b []byte) (s, rest []byte, ok bool) {
	if len(b) == 0 || b[0] != '"' {
		return nil, nil, false
	}
	n := bytes.IndexByte(b[1:], '"')
	if n < 0 {
		return nil, nil, false
	}
	s = b[1 : 1+n]
	return s, b[n+2:], simple(s)
}

// set sets one field. It is false for one that is not simple, or not known.
func (f *Flow) set(name, value []byte, text bool, old *Flow) bool {
	number := func(bits int) (uint64, bool) {
		n, err := strconv.ParseUint(string(value), 10, bits)
		return n, err == nil && !text && (len(value) == 1 || value[0] != '0')
	}
	switch string(name) {
	case "state":
		f.State = same(value, old.State)
	case "local":
		f.Local = same(value, old.Local)
	case "remote":
		f.Remote = same(value, old.Remote)
	case "coverage":
		f.Coverage = same(value, old.Coverage)
	case "segmentation":
		f.Segmentation = sockopt.Segmentation(same(value, string(old.Segmentation)))
	case "device":
		f.Device = same(value, old.Device)
	case "contradiction":
		f.Contradiction = same(value, old.Contradiction)
	case "why":
		f.Why = same(value, old.Why)
	case "listener":
		f.Listener = same(value, old.Listener)
	case "lost":
		f.Lost = string(value) == "true"
		return f.Lost && !text
	case "policy":
		n, ok := number(32)
		f.Policy = uint32(n)
		return ok
	case "uid":
		n, ok := number(32)
		f.UID = uint32(n)
		return ok
	case "inode":
		n, ok := number(64)
		f.Inode = n
		return ok
	default:
		return false
	}
	return text
}

func same(value []byte, old string) string {
	if string(value) == old {
		return old
	}
	return string(value)
}
