package xfrmwatch

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKernelRekey replaces an SA by one with a larger and then by one with a smaller overhead.
func TestKernelRekey(t *testing.T) {
	l := newLab(t, true)
	gcm := SA{Proto: ESP, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}}
	cbc := SA{Proto: ESP, Enc: Algorithm{Name: "cbc(aes)"}, Auth: Algorithm{"hmac(sha256)", 128}}
	p, first := l.single(gcm, Tunnel, IPv4, IPv4)
	_, second := l.single(cbc, Tunnel, IPv4, IPv4)
	_, third := l.single(gcm, Tunnel, IPv4, IPv4)
	l.addPolicy(p)
	check := func(step string, sas int, coverage int, kernel ...int) {
		t.Helper()
		c := l.covered(p, sas)
		got, why := c.MTU(l.path, l.mtu)
		if why != MTUKnown || got != coverage {
			t.Errorf("%s: computed %d (%v), want %d", step, got, why, coverage)
		}
		says := l.flowMTU(inner[IPv4])
		t.Logf("%s: computed %d, the kernel says %d", step, got, says)
		if !slices.Contains(kernel, says) {
			t.Errorf("%s: the kernel says %d, want one of %v", step, says, kernel)
		}
	}
	if c := l.covered(p, 0); !c.Larval {
		t.Error("a policy without an SA is not larval")
	}
	l.must(l.trySA(first))
	check("first", 1, 1446, 1446)
	time.Sleep(1100 * time.Millisecond) // add_time counts seconds
	l.must(l.trySA(second))
	// 6.12.117 takes the younger one at once; a kernel whose policies remember their SAs would not.
	check("both", 2, 1438, 1438, 1446)
	l.deleteSA(first)
	check("second", 1, 1438, 1438)
	l.must(l.trySA(third))
	check("both again", 2, 1438, 1438, 1446)
	l.deleteSA(second)
	check("third", 1, 1446, 1446)
	l.deleteSA(third)
	if c := l.covered(p, 0); !c.Larval {
		t.Error("a policy whose SA is gone is not larval")
	}
}

// TestKernelPrefersTheYounger asks policies that have not used an SA yet.
func TestKernelPrefersTheYounger(t *testing.T) {
	l := newLab(t, true)
	p, young := l.single(SA{Proto: ESP, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}}, Tunnel, IPv4, IPv4)
	_, old := l.single(SA{Proto: ESP, Enc: Algorithm{Name: "cbc(aes)"}, Auth: Algorithm{"hmac(sha256)", 128}}, Tunnel, IPv4, IPv4)
	for _, wait := range []time.Duration{1100 * time.Millisecond, 0} { // another second, the same one
		l.must(l.trySA(old))
		time.Sleep(wait)
		l.must(l.trySA(young))
		l.addPolicy(p)
		c := l.covered(p, 2)
		in, _ := c.Steps[0].SAs[0].InnerMTU(l.mtu)
		if says := l.flowMTU(inner[IPv4]); says != in {
			t.Errorf("after %v: the first SA leaves %d, the kernel says %d", wait, in, says)
		}
		l.deletePolicy(p, false)
		l.deleteSA(old)
		l.deleteSA(young)
		l.wait("nothing", func(db *DB) bool { return db.SACount() == 0 && db.PolicyCount() == 0 })
	}
}

// TestKernelSAEvents compares what the events made of the SAs with a fresh dump.
func TestKernelSAEvents(t *testing.T) {
	l := newLab(t, true)
	same := func(step string) {
		t.Helper()
		var diff string
		other := newMirror(t, Options{})
		other.fresh()
		l.wait(step, func(db *DB) bool {
			got, want := slices.Collect(db.SAs()), slices.Collect(other.db.SAs())
			diff = fmt.Sprintf("events %+v\ndump %+v", got, want)
			return slices.EqualFunc(got, want, func(a, b *SA) bool {
				x := *a
				x.Dying = b.Dying // a dump does not tell
				return x == *b
			})
		})
		_ = diff
	}
	p, sa := l.single(SA{Proto: ESP, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}}, Tunnel, IPv4, IPv4)
	sa.Encap = Encap{Type: 2, Sport: 4500, Dport: 4500}
	sa.Mark, sa.OutputMark, sa.SADir = Mark{1, 0xff}, Mark{2, 0xff}, 2
	sa.keyed()
	l.addPolicy(p)
	l.must(l.trySA(sa))
	same("added")
	asked := *sa
	asked.Encap.Dport, asked.Reqid, asked.OutputMark, asked.IfID = 1024, 99, Mark{3, 0xff}, 5
	l.do(msgUpdSA, wireSA(&asked, saKeys{aead: testKey(asked.AEAD.Name)}))
	l.wait("the update", func(db *DB) bool { s, ok := db.SA(sa.Key); return ok && s.Encap.Dport == 1024 })
	same("updated")
	if s, _ := l.db.SA(sa.Key); s.Reqid != 7 || s.IfID != 5 || s.OutputMark.Value != 3 {
		t.Errorf("after an update: %+v", s)
	}
	l.deleteSA(sa)
	l.wait("the delete", func(db *DB) bool { return db.SACount() == 0 })

	// Soft expiry after one second, hard expiry after three.
	_, mortal := l.single(SA{Proto: ESP, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}}, Tunnel, IPv6, IPv6)
	msg := wireSA(mortal, saKeys{aead: testKey(mortal.AEAD.Name)})
	put64(msg[96+32:], 1)
	put64(msg[96+40:], 3)
	l.do(msgNewSA, msg)
	l.wait("soft expiry", func(db *DB) bool { s, ok := db.SA(mortal.Key); return ok && s.Dying })
	l.w.Resync()
	l.wait("soft expiry kept over a dump", func(db *DB) bool {
		s, ok := db.SA(mortal.Key)
		return ok && s.Dying && l.w.Stats().Dumps >= 2 && db.next == nil
	})
	l.wait("hard expiry", func(db *DB) bool { return db.SACount() == 0 })

	// A flush of many.
	for range 50 {
		_, s := l.single(SA{Proto: ESP, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}}, Tunnel, IPv4, IPv4)
		l.must(l.trySA(s))
	}
	l.wait("50 SAs", func(db *DB) bool { return db.SACount() == 50 })
	same("50 SAs")
	l.do(msgFlushSA, []byte{0, 0, 0, 0})
	l.wait("the flush", func(db *DB) bool { return db.SACount() == 0 && !db.Stale() })
	if n := l.w.Stats().Undecodable; n != 0 {
		t.Errorf("%d undecodable messages", n)
	}
}

// TestKernelLarval lets the kernel make a larval SA: a flow without one, and a key manager that
// listens for acquires.
func TestKernelLarval(t *testing.T) {
	l := newLab(t, true)
	l.must(l.c.JoinGroup(1)) // XFRMNLGRP_ACQUIRE: a key manager is there
	p, sa := l.single(SA{Proto: ESP, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}}, Tunnel, IPv4, IPv4)
	l.addPolicy(p)
	if fd, err := connected(inner[IPv4]); err == nil {
		_, _ = unix.Write(fd, []byte("x"))
		unix.Close(fd)
	}
	l.must(l.c.LeaveGroup(1))
	l.w.Resync()
	l.wait("a larval SA", func(db *DB) bool {
		for s := range db.SAs() {
			return s.Larval
		}
		return false
	})
	if c := l.covered(p, 1); !c.Larval || len(c.Steps) != 0 {
		t.Errorf("coverage %+v, want larval", c)
	}
	r := newRequester(t) // the old one has an acquire in its queue
	r.do(msgNewSA, wireSA(sa, saKeys{aead: testKey(sa.AEAD.Name)}))
	l.wait("the valid SA", func(db *DB) bool { s, ok := db.SA(sa.Key); return ok && !s.Larval })
	if c := l.covered(p, 1); c.Larval {
		t.Errorf("coverage %+v, want the SA", c)
	}
}

// TestKernelOverrunOfSAsEndsInTheExactState drops events of SAs while nobody reads.
func TestKernelOverrunOfSAsEndsInTheExactState(t *testing.T) {
	newLab(t, true)
	m := newMirror(t, Options{ReadBuffer: 4096})
	m.fresh()
	m.take()
	m.gate.Lock()
	const n = 500
	var lines strings.Builder
	for i := range n {
		fmt.Fprintf(&lines, "xfrm state add src 192.0.2.1 dst 192.0.2.%d proto esp spi %d reqid 1 mode tunnel aead rfc4106(gcm(aes)) 0x%s 128\n", 2+i%200, 0x1000+i, strings.Repeat("11", 20))
	}
	for i := 0; i < n; i += 3 {
		fmt.Fprintf(&lines, "xfrm state delete src 192.0.2.1 dst 192.0.2.%d proto esp spi %d\n", 2+i%200, 0x1000+i)
	}
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(lines.String())
	out, err := cmd.CombinedOutput()
	m.gate.Unlock()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.wait("the exact state", func(db *DB) bool { return !db.Stale() && db.SACount() == n-(n+2)/3 })
	if m.w.Stats().Overruns == 0 {
		t.Error("nothing was dropped: the test tests nothing")
	}
}
