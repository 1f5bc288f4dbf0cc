package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strconv"
	"unicode/utf8"
)

// The file is a text file of lines
//
//	crc32c-hex length json\n
//
// where the checksum (Castagnoli) and the length are those of the JSON. The first line is the
// header, each other one puts or removes one entry:
//
//	8ff8b2d0 44 {"format":"tsoagent-journal","version":1}
//	0f3a… 131 {"put":{"id":"feature/7/tx-tcp-segmentation","kind":"feature","scope":{…},"data":{…}}}
//	77c1… 98 {"remove":{"id":"feature/7/tx-tcp-segmentation","scope":{…}}}
const (
	formatName    = "tsoagent-journal"
	formatVersion = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A key is what makes an entry one and the same: namespaces number their devices independently,
// so the same ID can stand for two objects.
type key struct {
	ID    string `json:"id"`
	Scope Scope  `json:"scope"`
}

func (e Entry) key() key { return key{e.ID, e.Scope} }

// A record is the JSON of one line; exactly one of Format, Put and Remove is set.
type record struct {
	Format  string `json:"format,omitempty"`
	Version int    `json:"version,omitempty"`
	Put     *Entry `json:"put,omitempty"`
	Remove  *key   `json:"remove,omitempty"`
}

// encodeLine returns the line of a record, and the record as it will be read from that line.
func encodeLine(r record) ([]byte, record, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, record{}, err
	}
	line := fmt.Appendf(nil, "%08x %d %s\n", crc32.Checksum(text, castagnoli), len(text), text)
	back, err := decodeLine(line[:len(line)-1])
	return line, back, err
}

// decodeLine decodes one line, without its end. It accepts what encodeLine writes and nothing
// that merely resembles it.
func decodeLine(line []byte) (record, error) {
	sum, rest, _ := bytes.Cut(line, []byte(" "))
	length, text, ok := bytes.Cut(rest, []byte(" "))
	if !ok {
		return record{}, errors.New("not a checksum, a length and a record")
	}
	if want := strconv.Itoa(len(text)); string(length) != want {
		return record{}, fmt.Errorf("%s bytes, and the length says %q", want, length)
	}
	if want := fmt.Sprintf("%08x", crc32.Checksum(text, castagnoli)); string(sum) != want {
		return record{}, fmt.Errorf("the checksum is %s and should be %q", want, sum)
	}
	var r record
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return record{}, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return record{}, errors.New("more than one record")
	}
	kinds := 0
	for _, is := range []bool{r.Format != "", r.Put != nil, r.Remove != nil} {
		if is {
			kinds++
		}
	}
	switch {
	case kinds != 1:
		return record{}, errors.New("not one of header, put and remove")
	case r.Put != nil:
		return r, r.Put.check()
	}
	return r, nil
}

// check refuses what would not come back from the file as it went there.
func (e *Entry) check() error {
	switch {
	case e.ID == "" || e.Kind == "":
		return fmt.Errorf("entry %q of kind %q: both ID and kind are needed", e.ID, e.Kind)
	case !utf8.ValidString(e.ID) || !utf8.ValidString(string(e.Kind)) || !utf8.ValidString(e.Scope.BootID):
		return fmt.Errorf("entry %q of kind %q: not UTF-8", e.ID, e.Kind)
	}
	return nil
}

// A parsed file is what the lines add up to.
type parsed struct {
	entries map[key]stored
	// good is the length of the part that ends with a newline.
	good int
	// header says that the first line is a header of our version.
	header   bool
	torn     int
	problems []string
}

// A stored entry also knows how many bytes its line takes.
type stored struct {
	Entry
	size int
}

// ErrVersion is matched (errors.Is) by the error about a journal of a later format.
var ErrVersion = errors.New("unknown format version")

// parse reads a journal line by line. A line is believed if its checksum is right, whatever
// stands before it; a line that is not is reported and changes nothing. What follows the last
// newline is a write that was cut short. The only error is a later format.
func parse(b []byte) (parsed, error) {
	p := parsed{entries: map[key]stored{}}
	for number := 1; len(b) > 0; number++ {
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		if !whole {
			p.torn++
			break
		}
		p.good += len(line) + 1
		b = rest
		r, err := decodeLine(line)
		switch {
		case err != nil:
			p.problems = append(p.problems, fmt.Sprintf("line %d: %v", number, err))
		case r.Format != "" && (r.Format != formatName || r.Version != formatVersion):
			return p, fmt.Errorf("line %d: format %q version %d, this tsoagent knows %q version %d: %w; run `tsoctl restore` of the tsoagent that wrote it, then remove the file",
				number, r.Format, r.Version, formatName, formatVersion, ErrVersion)
		case r.Format != "":
			p.header = p.header || number == 1
		case r.Put != nil:
			p.entries[r.Put.key()] = stored{*r.Put, len(line) + 1}
		default:
			delete(p.entries, *r.Remove)
		}
	}
	if !p.header && p.good > 0 && len(p.problems) == 0 {
		p.problems = append(p.problems, "line 1: no header")
	}
	return p, nil
}
