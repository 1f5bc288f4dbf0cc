package agent

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync"

	"tsoagent/sockopt"
)

// defaultKeysTrust are root and the users as which Debian runs FRR and BIRD. Each of these daemons has CAP_NET_ADMIN, so that it could switch
// features off by itself.
var defaultKeysTrust = []string{"root", "frr", "bird"}

// passwd is where users' names are (passwd(5)).
const passwd = "/etc/passwd"

// keyTrust knows the users whose TCP keys may ask for more than a verdict. Names are looked up anew when the file of users has changed: a
// daemon may be installed while the agent runs. It is safe for concurrent use.
type keyTrust struct {
	names  []string // or numbers
	file   string
	lookup func(name string) (*user.User, error)

	mu      sync.Mutex
	read    os.FileInfo // of the file when names were looked up last, nil if it could not be seen
	looked  bool
	uids    []uint32 // is not changed: there is a new one
	unknown []string // names that are nobody's, in words
}

func newKeyTrust(names []string) *keyTrust {
	return &keyTrust{names: names, file: passwd, lookup: user.Lookup}
}

// users are the users' numbers. The list is not to be changed.
func (t *keyTrust) users() []uint32 {
	uids, _ := t.look()
	return uids
}

// trusted is the function that sockopt.Options wants.
func (t *keyTrust) trusted() func(uid uint32) bool {
	uids := t.users()
	return func(uid uint32) bool { return slices.Contains(uids, uid) }
}

// wrong reports whether a name was nobody's when names were looked up last.
func (t *keyTrust) wrong() bool {
	t.mu.Lock()
	looked, n := t.looked, len(t.unknown)
	t.mu.Unlock()
	if !looked {
		_, unknown := t.look()
		n = len(unknown)
	}
	return n > 0
}

// look returns the users' numbers, and what is wrong with the names, in words.
func (t *keyTrust) look() (uids []uint32, unknown []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, err := os.Stat(t.file)
	if err != nil {
		now = nil
	}
	if t.looked && sameVersion(t.read, now) {
		return t.uids, t.unknown
	}
	t.read, t.looked, t.uids, t.unknown = now, true, nil, nil
	for _, name := range t.names {
		uid, err := t.uid(name)
		switch {
		case err == nil:
			t.uids = append(t.uids, uid)
		case !slices.Equal(t.names, defaultKeysTrust): // not everybody has FRR and BIRD
			t.unknown = append(t.unknown, fmt.Sprintf("tcp_keys_trust: %v", err))
		}
	}
	return t.uids, t.unknown
}

func sameVersion(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

func (t *keyTrust) uid(name string) (uint32, error) {
	text := name
	if !isNumber(name) {
		u, err := t.lookup(name)
		if err != nil {
			var missing user.UnknownUserError
			if errors.As(err, &missing) {
				return 0, fmt.Errorf("there is no user %q in %s, so nobody's keys count for it; a user of another directory is named by number", name, t.file)
			}
			return 0, fmt.Errorf("look up the user %q: %w", name, err)
		}
		text = u.Uid
	}
	uid, err := strconv.ParseUint(text, 10, 32)
	switch {
	case err != nil || uid == 1<<32-1:
		return 0, fmt.Errorf("%q is no user: %q is not a number below %d", name, text, uint32(1<<32-1))
	case uid == sockopt.OverflowUID:
		return 0, fmt.Errorf("%q can't be trusted: %d stands for all users of other user namespaces who are nobody here", name, uid)
	}
	return uint32(uid), nil
}

func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// wrongUsers is what Validate says of users.
func wrongUsers(list []string) []Wrong {
	var out []Wrong
	for i, name := range list {
		why := ""
		switch {
		case isNumber(name):
			if _, err := newKeyTrust(nil).uid(name); err != nil {
				why = err.Error()
			}
		case name == "" || len(name) > 256 || strings.HasPrefix(name, "-") || strings.ContainsFunc(name, func(r rune) bool { return unprintable(r) || r == ':' || r == ' ' }):
			why = fmt.Sprintf("%q is neither the name of a user nor a number", name)
		}
		if why != "" {
			out = append(out, Wrong{Key: "tcp_keys_trust", Text: fmt.Sprintf("entry %d: %s", i+1, why), entry: i + 1})
		}
	}
	return out
}
