package agent

import (
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tsoagent/agent/plan"
	"tsoagent/sockopt"
)

// usersIn makes a file of users that can be changed, and a lookup in it: NAME:UID lines.
func usersIn(t *testing.T, names ...string) (trust *keyTrust, write func(string)) {
	t.Helper()
	trust = newKeyTrust(names)
	trust.file = filepath.Join(t.TempDir(), "passwd")
	trust.lookup = func(name string) (*user.User, error) {
		text, err := os.ReadFile(trust.file)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			if n, uid, _ := strings.Cut(strings.TrimSpace(line), ":"); n == name {
				return &user.User{Username: n, Uid: uid}, nil
			}
		}
		return nil, user.UnknownUserError(name)
	}
	return trust, func(text string) {
		t.Helper()
		// As a rename, as those who edit /etc/passwd do it: the time of the file may be the same.
		next := trust.file + "+"
		if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, trust.file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTrustedUsers finds users by name and by number, those that come later, too, and says which are nobody.
func TestTrustedUsers(t *testing.T) {
	trust, write := usersIn(t, "root", "frr", "1000", "nobody")
	write("root:0\nnobody:65534\n")
	uids, unknown := trust.look()
	if !slices.Equal(uids, []uint32{0, 1000}) || len(unknown) != 2 ||
		!strings.Contains(unknown[0], `tcp_keys_trust: there is no user "frr" in `) || !strings.Contains(unknown[1], `"nobody" can't be trusted`) {
		t.Errorf("%v, %q", uids, unknown)
	}
	write("root:0\nnobody:65534\nfrr:103\n")
	if uids, unknown = trust.look(); !slices.Equal(uids, []uint32{0, 103, 1000}) || len(unknown) != 1 {
		t.Errorf("after FRR was installed: %v, %q", uids, unknown)
	}
	if f := trust.trusted(); !f(103) || f(104) || f(sockopt.OverflowUID) {
		t.Error("another is trusted than who should be")
	}
	trust.lookup = nil // is not called again: the file is as it was
	if uids, _ = trust.look(); !slices.Equal(uids, []uint32{0, 103, 1000}) {
		t.Errorf("looked up again: %v", uids)
	}
}

// TestDefaultUsersNeedNotExist has no finding where FRR and BIRD aren't installed.
func TestDefaultUsersNeedNotExist(t *testing.T) {
	trust, write := usersIn(t, Config{}.WithDefaults().TCPKeysTrust...)
	write("root:0\nfrr:103\n")
	if uids, unknown := trust.look(); !slices.Equal(uids, []uint32{0, 103}) || len(unknown) > 0 {
		t.Errorf("%v, %q", uids, unknown)
	}
}

// TestUnknownUserIsAFinding says which user that was named isn't there.
func TestUnknownUserIsAFinding(t *testing.T) {
	w := newWorld(t, Config{TCPKeysTrust: []string{"no-such-user-here"}})
	w.start()
	w.keys(keysSet())
	if r := w.a.Report(); len(r.Findings) != 1 || !strings.Contains(r.Findings[0], `tcp_keys_trust: there is no user "no-such-user-here"`) {
		t.Errorf("findings: %q", r.Findings)
	}
}

// TestKeyOfAnybodyTakesNothing holds nothing because of a key of a user who is not trusted, which is told, and what is held goes back when
// its key is such a user's only.
func TestKeyOfAnybodyTakesNothing(t *testing.T) {
	var cfg Config
	cfg.Plan.SharedNICs = plan.SharedOff
	cfg.TCPKeysTrust = []string{"103"}
	w := newWorld(t, cfg)
	w.start()
	of := func(uid uint32) sockopt.Event {
		k := bgpKey
		k.Owner = sockopt.Owner{UID: uid, Known: true}
		return keysSet(k)
	}
	verdict := func() CoverageReport {
		t.Helper()
		c := w.a.Report().Coverages
		if len(c) != 1 || c[0].UID == nil {
			t.Fatalf("%+v", c)
		}
		return c[0]
	}
	w.keys(of(1000))
	if c := verdict(); c.Cut != "socket" || *c.UID != 1000 || !strings.Contains(strings.Join(c.Notes, "\n"), "add 1000, or its name, to tcp_keys_trust") {
		t.Errorf("%+v", c)
	}
	if r := w.a.Report(); len(r.Holds) > 0 {
		t.Errorf("holds: %+v", r.Holds)
	}
	w.keys(of(103))
	if c := verdict(); c.Cut != "nic" || *c.UID != 103 {
		t.Errorf("%+v", c)
	}
	w.keys(of(1000))
	w.advance(2 * time.Duration(cfg.WithDefaults().RestoreAfter))
	if c, r := verdict(), w.a.Report(); c.Cut != "socket" || len(r.Holds) > 0 {
		t.Errorf("%+v; holds %+v", c, r.Holds)
	}
}
