package xfrmwatch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// newNetns moves the test's thread into a fresh network namespace. The namespace ends with the
// test; if the way back fails, the thread ends with its goroutine instead.
func newNetns(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN) to make a network namespace")
	}
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs network namespaces in the kernel: %v", err)
	}
	t.Cleanup(func() {
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		_ = unix.Close(home)
	})
}

// requester sends requests to the kernel's XFRM.
type requester struct {
	t testing.TB
	c *netlink.Conn
}

func newRequester(t testing.TB) *requester {
	t.Helper()
	c, err := netlink.Dial(unix.NETLINK_XFRM, nil)
	if err != nil {
		t.Skipf("needs XFRM in the kernel: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return &requester{t, c}
}

func (r *requester) try(typ uint16, data []byte) error {
	_, err := r.c.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | netlink.Acknowledge},
		Data:   data,
	})
	return err
}

func (r *requester) do(typ uint16, data []byte) {
	r.t.Helper()
	if err := r.try(typ, data); err != nil {
		r.t.Fatalf("request %#x: %v", typ, err)
	}
}

func (r *requester) addPolicy(p *Policy)    { r.t.Helper(); r.do(msgNewPolicy, wirePolicy(p)) }
func (r *requester) updatePolicy(p *Policy) { r.t.Helper(); r.do(msgUpdPolicy, wirePolicy(p)) }
func (r *requester) deletePolicy(p *Policy, byIndex bool) {
	r.t.Helper()
	b := append(wirePolicyID(p, byIndex), wirePolicyAttrs(&Policy{Mark: p.Mark, IfID: p.IfID, Sub: p.Sub})...)
	r.do(msgDelPolicy, b)
}

// mirror runs a Watcher into a DB.
type mirror struct {
	t    testing.TB
	w    *Watcher
	mu   sync.Mutex
	cond *sync.Cond
	db   *DB
	seen []Event
	gate sync.Mutex // held by a test to stop the sink
}

func newMirror(t testing.TB, opts Options) *mirror {
	t.Helper()
	w, err := Dial(opts)
	if err != nil {
		t.Fatal(err)
	}
	m := &mirror{t: t, w: w, db: NewDB()}
	m.cond = sync.NewCond(&m.mu)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, m.sink) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v, want %v", err, context.Canceled)
			}
		case <-time.After(5 * time.Second):
			t.Error("Run did not return")
		}
	})
	return m
}

func (m *mirror) sink(events []Event) {
	m.gate.Lock()
	defer m.gate.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, ev := range events {
		m.db.Apply(ev)
	}
	m.seen = append(m.seen, events...)
	m.cond.Broadcast()
}

// wait blocks until the DB is as wanted; ok runs with the DB locked.
func (m *mirror) wait(what string, ok func(*DB) bool) {
	m.t.Helper()
	timeout := time.AfterFunc(10*time.Second, m.cond.Broadcast)
	defer timeout.Stop()
	deadline := time.Now().Add(10 * time.Second)
	m.mu.Lock()
	defer m.mu.Unlock()
	for !ok(m.db) {
		if time.Now().After(deadline) {
			m.t.Fatalf("timed out: %s; the DB has %d policies, %d SAs, stale %v",
				what, m.db.PolicyCount(), m.db.SACount(), m.db.Stale())
		}
		m.cond.Wait()
	}
}

func (m *mirror) fresh() {
	m.t.Helper()
	m.wait("a complete dump", func(db *DB) bool { return !db.Stale() })
}

// take returns the events so far and forgets them.
func (m *mirror) take() []Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	seen := m.seen
	m.seen = nil
	return seen
}

func tunnelPolicy(i int, f Family) *Policy {
	p := &Policy{Dir: Out, Priority: 100, Selector: Selector{Family: f}}
	tmpl := Template{Family: f, Proto: ESP, Mode: Tunnel, Reqid: Reqid(i)}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(i))
	if f == IPv4 {
		p.Selector.Src = selector("10.0.0.0/8", "10.0.0.0/8").Src
		p.Selector.Dst, _ = addr4(10, b[1], b[2], b[3]).Prefix(32)
		tmpl.Src, tmpl.Dst = addr("192.0.2.1"), addr("192.0.2.2")
	} else {
		p.Selector.Src = selector("fd00::/8", "fd00::/8").Src
		p.Selector.Dst, _ = addr6(b[2], b[3]).Prefix(128)
		tmpl.Src, tmpl.Dst = addr("2001:db8::1"), addr("2001:db8::2")
	}
	p.Templates = []Template{tmpl}
	return p
}

// capture writes the messages that this kernel sends into testdata/captured, as seeds of the
// fuzz target; CAPTURE=1 asks for it.
func capture(t testing.TB, typ uint16, name string, data []byte) {
	if os.Getenv("CAPTURE") == "" {
		return
	}
	dir := os.Getenv("CAPTURE_DIR")
	if dir == "" {
		dir = "testdata/captured"
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%02x-%s", typ, name)), data, 0o644); err != nil {
		t.Fatal(err)
	}
}
