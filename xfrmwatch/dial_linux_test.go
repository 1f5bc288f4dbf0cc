package xfrmwatch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Messages that another process sends to the group are not the kernel's.
func TestForeignSenderIsIgnored(t *testing.T) {
	newNetns(t)
	m := newMirror(t, Options{})
	m.fresh()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_XFRM)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	msg := append(make([]byte, unix.NLMSG_HDRLEN), wirePolicy(tunnelPolicy(7, IPv4))...)
	put32(msg, uint32(len(msg)))
	put16(msg[4:], msgNewPolicy)
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (groups["policy"] - 1)}); err != nil &&
		!errors.Is(err, unix.ECONNREFUSED) { // the request part has no type that the kernel takes
		t.Logf("send: %v", err)
	}
	newRequester(t).addPolicy(tunnelPolicy(1, IPv4))
	m.wait("the kernel's own message", func(db *DB) bool { return db.PolicyCount() > 0 })
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := range m.db.Policies() {
		if p.Templates[0].Reqid == 7 {
			// The kernel may have taken the same bytes as a request; then its own event has an index.
			if p.Index == 0 {
				t.Error("a foreign message was believed")
			}
		}
	}
}

func TestDialInAnotherNamespace(t *testing.T) {
	newNetns(t)
	newRequester(t).addPolicy(tunnelPolicy(1, IPv4))
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	result := make(chan error)
	go func() { // on a thread of the test's own namespace
		w, err := Dial(Options{NetNS: int(ns.Fd())})
		if err == nil {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			policies := 0
			err = w.Run(ctx, func(events []Event) {
				for _, ev := range events {
					switch ev.(type) {
					case PolicySet:
						policies++
					case ResyncEnd:
						cancel()
					}
				}
			})
			if policies != 1 {
				err = fmt.Errorf("%d policies, want 1", policies)
			}
		}
		result <- err
	}()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
