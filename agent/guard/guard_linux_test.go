package guard

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/netns/netnstest"
	"tsoagent/routes"
)

func TestMain(m *testing.M) {
	if os.Getenv("GUARD_TEST_SERVE") != "" { // the process of a guard
		if err := Serve(os.NewFile(FD, "agent"), slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func ip(t *testing.T, lines string) {
	t.Helper()
	for line := range strings.Lines(lines) {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v\n%s", strings.TrimSpace(line), err, out)
		}
	}
}

// ours are rules of an agent, and theirs are not, by a little.
const (
	ours = `rule add from 10.1.0.0/16 to 10.3.0.0/16 lookup 5450 pref 32765 protocol 84
rule add from 0.0.0.0/32 to 10.3.0.0/16 lookup 5450 pref 32764 protocol 84
rule add fwmark 0x7/0xf to 10.4.0.0/16 ipproto udp dport 500-600 lookup 5513 pref 219 protocol 84
-6 rule add iif lo to fd10::/32 lookup 5450 pref 32765 protocol 84
-6 rule add from fd00:1::/64 to fd10::/32 lookup 5451 pref 32764 protocol 84`
	theirs = `rule add from 10.1.0.0/16 to 10.3.0.0/16 lookup 5450 pref 100 protocol 99
rule add from 10.1.0.0/16 to 10.3.0.0/16 lookup 77 pref 101 protocol 84
rule add from 10.1.0.0/16 to 10.3.0.0/16 lookup 5514 pref 102 protocol 84
rule add from 10.1.0.0/16 to 10.3.0.0/16 blackhole pref 103 protocol 84
-6 rule add from fd00:1::/64 to fd10::/32 lookup 5450 pref 100`
)

// rules are those of both families, as ip shows them.
func rules(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", "ip -d -4 rule; ip -d -6 rule").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// files are what an agent gives its guard: a routing socket of this namespace, and a lock that it holds, and its own copy of that.
func files(t *testing.T) (table, lock, own *os.File) {
	t.Helper()
	tb, err := routes.OpenTable()
	if err != nil {
		t.Fatal(err)
	}
	defer tb.Close()
	if table, err = tb.File(); err != nil {
		t.Fatal(err)
	}
	if own, err = os.Create(filepath.Join(t.TempDir(), "lock")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(own.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(own.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = own.Close() })
	return table, os.NewFile(uintptr(fd), "lock"), own
}

// A lab is a guard whose process is one of this program.
type lab struct {
	*Guard
	t   *testing.T
	out *output
}

type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write is for the guard's log.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

func newLab(t *testing.T) *lab {
	t.Helper()
	netnstest.Enter(t, "ip")
	ip(t, ours+"\n"+theirs)
	out := &output{}
	l := &lab{t: t, out: out}
	l.Guard = New(slog.New(slog.NewTextHandler(out, nil)), func() *exec.Cmd {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "GUARD_TEST_SERVE=1")
		cmd.Stderr = out
		return cmd
	})
	t.Cleanup(func() {
		if err := l.End(); err != nil {
			t.Error(err)
		}
	})
	return l
}

var numbers = Watch{Table: 5450, Protocol: 84, Name: "blue"}

// die is the end of the agent as the guard sees it: its side of the socket is closed, and nothing was said. It returns when the guard has ended.
func (l *lab) die() {
	l.t.Helper()
	l.mu.Lock()
	if err := unix.Shutdown(int(l.conn.Fd()), unix.SHUT_RDWR); err != nil {
		l.t.Error(err)
	}
	l.mu.Unlock()
	l.ended(1)
}

// ended waits until so many processes have ended.
func (l *lab) ended(n int) {
	l.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); strings.Count(l.out.String(), "the agent's guard has ended") < n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Fatalf("it does not end:\n%s", l.out)
		}
	}
}

func TestRulesGoWithTheAgent(t *testing.T) {
	l := newLab(t)
	table, lock, _ := files(t)
	l.Watch(numbers, table, lock)
	before := rules(t)
	l.die()
	ip(t, strings.ReplaceAll(theirs, "add", "del"))
	left := rules(t)
	if strings.Contains(left, "proto 84") || strings.Contains(left, "lookup 5") {
		t.Errorf("left, of\n%s:\n%s", before, left)
	}
	if got := l.out.String(); !strings.Contains(got, "its rules are taken away") || !strings.Contains(got, "netns=blue rules=5") {
		t.Errorf("log:\n%s", got)
	}
}

// TestRulesOfOthersStay deletes those that are not ours by hand, each of which fails where it is gone.
func TestRulesOfOthersStay(t *testing.T) {
	l := newLab(t)
	table, lock, _ := files(t)
	l.Watch(numbers, table, lock)
	l.die()
	ip(t, strings.ReplaceAll(theirs, "add", "del"))
}

func TestNothingGoesWithAnAgentThatSaysBye(t *testing.T) {
	l := newLab(t)
	table, lock, _ := files(t)
	l.Watch(numbers, table, lock)
	before := rules(t)
	if err := l.End(); err != nil {
		t.Error(err)
	}
	if got := rules(t); got != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, got)
	}
	if got := l.out.String(); got != "" {
		t.Errorf("log:\n%s", got)
	}
}

func TestNamespaceThatWasDroppedIsLeftAlone(t *testing.T) {
	l := newLab(t)
	table, lock, _ := files(t)
	drop := l.Watch(numbers, table, lock)
	before := rules(t)
	if err := errors.Join(drop(), drop()); err != nil {
		t.Error(err)
	}
	l.die()
	if got := rules(t); got != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, got)
	}
}

// TestWhatAnotherAgentHasAdoptedStays gives the lock up, as an agent does that closes its journal, and has another one take it.
func TestWhatAnotherAgentHasAdoptedStays(t *testing.T) {
	l := newLab(t)
	table, lock, own := files(t)
	l.Watch(numbers, table, lock)
	if err := unix.Flock(int(own.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	other, err := os.Open(own.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	before := rules(t)
	l.die()
	if got := rules(t); got != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, got)
	}
}

// TestLockIsTheGuardsUntilItIsDone: an agent's lock outlives it by what its guard does.
func TestLockIsTheGuardsUntilItIsDone(t *testing.T) {
	l := newLab(t)
	table, lock, own := files(t)
	l.Watch(numbers, table, lock)
	l.mu.Lock()
	for id, w := range l.watches { // as the kernel closes them for one that is killed
		_ = w.lock.Close()
		delete(l.watches, id)
	}
	l.mu.Unlock()
	name := own.Name()
	if err := own.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("while the guard has it, another one gets the lock: %v", err)
	}
	l.die()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("when the guard has ended: %v", err)
	}
	if got := rules(t); strings.Contains(got, "lookup 5451") {
		t.Errorf("left:\n%s", got)
	}
}

// TestGuardThatWasKilledIsStartedAgain has the next process know all that the first one knew.
func TestGuardThatWasKilledIsStartedAgain(t *testing.T) {
	l := newLab(t)
	table, lock, _ := files(t)
	l.Watch(numbers, table, lock)
	before := rules(t)
	l.mu.Lock()
	first := l.process.Pid
	err := l.process.Kill()
	l.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	l.ended(1)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		again := l.conn != nil && l.process.Pid != first
		l.mu.Unlock()
		if again {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it is not started again:\n%s", l.out)
		}
	}
	if got := rules(t); got != before {
		t.Errorf("the end of a guard has changed\n%s\nto\n%s", before, got)
	}
	l.mu.Lock()
	err = unix.Shutdown(int(l.conn.Fd()), unix.SHUT_RDWR)
	l.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	l.ended(2)
	if got := rules(t); strings.Contains(got, "lookup 5451") {
		t.Errorf("left:\n%s", got)
	}
}

// TestNoGuardWhileAnotherProgramTakesOver: what is done then leaves the rules alone, and if it comes to nothing, they are guarded as before.
func TestNoGuardWhileAnotherProgramTakesOver(t *testing.T) {
	l := newLab(t)
	table, lock, _ := files(t)
	l.Watch(numbers, table, lock)
	before, first := rules(t), l.process.Pid
	want := errors.New("it can't be executed")
	if err := l.Without(func() error {
		if err := unix.Kill(first, 0); !errors.Is(err, unix.ESRCH) {
			t.Errorf("the guard's process is there: %v", err)
		}
		if l.conn != nil {
			t.Error("there is a process")
		}
		return want
	}); !errors.Is(err, want) {
		t.Error(err)
	}
	if got := rules(t); got != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, got)
	}
	for deadline := time.Now().Add(30 * time.Second); !l.runs(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it is not started again:\n%s", l.out)
		}
	}
	if got := l.out.String(); got != "" {
		t.Errorf("log:\n%s", got)
	}
	l.die()
	if got := rules(t); strings.Contains(got, "lookup 5451") {
		t.Errorf("left:\n%s", got)
	}
}

// runs reports whether there is a process.
func (l *lab) runs() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn != nil
}

// TestGuardThatIsStoppedDoesNotKeepTheAgent stops the guard's process as SIGSTOP does.
func TestGuardThatIsStoppedDoesNotKeepTheAgent(t *testing.T) {
	l := newLab(t)
	table, lock, _ := files(t)
	l.Watch(numbers, table, lock)
	if err := l.process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	before := rules(t)
	if err := l.End(); err != nil {
		t.Error(err)
	}
	if got := rules(t); got != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, got)
	}
}

// TestGarbageIsNothingThatWasSaid sends what makes no sense, and files where there can be none.
func TestGarbageIsNothingThatWasSaid(t *testing.T) {
	l := newLab(t)
	table, lock, _ := files(t)
	l.Watch(numbers, table, lock)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	l.mu.Lock()
	for _, text := range []string{"{", "[]", "{}", `{"drop":true,"bye":true}`, `{"id":1,"watch":{}}`, `{"id":1,"watch":{"table":5450,"protocol":84}}`, strings.Repeat(" ", maxMessage) + `{"bye":true}`} {
		for _, rights := range [][]byte{nil, unix.UnixRights(int(null.Fd())), unix.UnixRights(int(null.Fd()), int(null.Fd()), int(null.Fd()))} {
			if err := unix.Sendmsg(int(l.conn.Fd()), []byte(text), rights, nil, 0); err != nil {
				t.Errorf("%.20s: %v", text, err)
			}
		}
	}
	l.mu.Unlock()
	l.die()
	if got := rules(t); strings.Contains(got, "lookup 5451") {
		t.Errorf("left:\n%s\nlog:\n%s", got, l.out)
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{`{"id":1,"watch":{"table":5450,"protocol":84,"name":"blue"}}`, `{"id":1,"drop":true}`, `{"bye":true}`, `{}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parse(b)
		if err != nil {
			return
		}
		if m.Watch == nil && !m.Drop && !m.Bye {
			t.Errorf("%q says nothing", b)
		}
		if m.Watch != nil && m.Watch.own(&routes.Rule{Action: routes.RuleToTable, Table: routes.TableMain, Protocol: m.Watch.Protocol}) && m.Watch.Table > routes.TableMain {
			t.Errorf("%q: a rule to table main is ours", b)
		}
	})
}
