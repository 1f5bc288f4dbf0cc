package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/api"
)

// peerKey is of the context's value that says who is at the other end of a connection.
type peerKey struct{}

// withPeer notes who is at the other end, as the kernel knows since connect(2).
func withPeer(ctx context.Context, c net.Conn) context.Context {
	if b, ok := c.(*boundConn); ok {
		return context.WithValue(ctx, peerKey{}, b.peer)
	}
	return ctx
}

// credOf is who is at the other end of a unix socket, nil if the kernel does not tell.
func credOf(c net.Conn) *unix.Ucred {
	s, ok := c.(*net.UnixConn)
	if !ok {
		return nil
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return nil
	}
	var cred *unix.Ucred
	if ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); ctlErr != nil || err != nil {
		return nil
	}
	return cred
}

// credIn is who asks, nil if the kernel does not tell.
func credIn(r *http.Request) *unix.Ucred {
	cred, _ := r.Context().Value(peerKey{}).(*unix.Ucred)
	return cred
}

// isRoot reports whether root asks, and has answered if not.
func isRoot(w http.ResponseWriter, r *http.Request) bool {
	cred := credIn(r)
	switch {
	case cred == nil:
		answerError(w, http.StatusForbidden, errors.New("only root may do this, and the kernel does not tell who asks"))
		return false
	case cred.Uid != 0:
		answerError(w, http.StatusForbidden, fmt.Errorf("only root may do this, and you are uid %d: run it with sudo", cred.Uid))
		return false
	}
	return true
}

// peerOf is who asks, with what is known of the process while it is there.
func peerOf(r *http.Request) api.Peer {
	cred := credIn(r)
	if cred == nil {
		return api.Peer{}
	}
	p := api.Peer{UID: cred.Uid, PID: cred.Pid}
	read := func(file string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", cred.Pid, file))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	p.Process = read("comm")
	const unset = 1<<32 - 1 // of a process that nobody has logged in for (kernel/audit.h)
	if uid, err := strconv.ParseUint(read("loginuid"), 10, 32); err == nil && uid != unset && uid != uint64(cred.Uid) {
		p.Login = fmt.Sprintf("uid %d", uid)
		if u, err := user.LookupId(strconv.FormatUint(uid, 10)); err == nil {
			p.Login = u.Username
		}
	}
	return p
}

// maxConns is how many connections of one user are served at a time. All together can't use up the agent's
// files, nor can others keep root out.
const maxConns = 48

// maxUsers is how many users but root are served at a time.
const maxUsers = 8

// bounded accepts no more connections than are served.
type bounded struct {
	net.Listener
	mu    sync.Mutex
	byUID map[uint32]int
}

// boundConn counts until it is closed.
type boundConn struct {
	net.Conn
	peer  *unix.Ucred
	close func()
}

// Accept refuses who has too many connections already.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer := credOf(c)
		if peer == nil {
			_ = c.Close() // it is gone already, as a rule
			continue
		}
		if !b.take(peer.Uid) {
			refuse(c)
			continue
		}
		return &boundConn{c, peer, sync.OnceFunc(func() { b.give(peer.Uid) })}, nil
	}
}

func (b *bounded) take(uid uint32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, known := b.byUID[uid]
	others := len(b.byUID)
	if _, root := b.byUID[0]; root {
		others--
	}
	if n >= maxConns || !known && uid != 0 && others >= maxUsers {
		return false
	}
	b.byUID[uid]++
	return true
}

func (b *bounded) give(uid uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.byUID[uid]--; b.byUID[uid] == 0 {
		delete(b.byUID, uid)
	}
}

// Close closes the connection, once.
func (c *boundConn) Close() error {
	c.close()
	return c.Conn.Close()
}

// refuse says in HTTP that there are too many. The socket has room for it: nobody waits.
func refuse(c net.Conn) {
	const text = `{"error":"too many connections of this user: try again in a moment"}` + "\n"
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = fmt.Fprintf(c, "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
	_ = c.Close()
}
