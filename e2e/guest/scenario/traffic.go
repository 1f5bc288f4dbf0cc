package scenario

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// The guest has one CPU for both ends, the ciphers and the agent, so a sender that sends as fast as it can would starve what
// it is to observe. A burst is large enough for several full super-packets (64 KiB), the pause short enough
// to stay below the retransmission timeout of at least 200 ms, after which TCP would begin anew with a small window.
const (
	burstSize    = 256 << 10
	burstPause   = 40 * time.Millisecond
	longestPause = 160 * time.Millisecond
	totalLimit   = 8 << 30
	timeLimit    = 10 * time.Minute
	progressSize = 256 << 10 // what `tcp progress` asks for unless told
	dialTimeout  = 10 * time.Second
)

// connection is one long-lived TCP connection that sends bursts. Its methods are safe for concurrent use.
type connection struct {
	conn *net.TCPConn
	quit chan struct{}
	once sync.Once
	done chan error
}

// server is a discard server for any number of connections.
type server struct {
	listener net.Listener
}

const tcpUsage = `tcp name start namespace from|- to:port [server-namespace] [--md5]
tcp name progress deadline [bytes]
tcp name stats
tcp name stop`

// tcp is the command for long-lived connections.
func (s *session) tcp(ctx context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) < 2 {
		return "", usage(tcpUsage)
	}
	name, verb, rest := args[0], args[1], args[2:]

	if verb == "start" {
		signed := len(rest) > 0 && rest[len(rest)-1] == "--md5"
		if signed {
			rest = rest[:len(rest)-1]
		}
		if len(rest) != 3 && len(rest) != 4 {
			return "", usage(tcpUsage)
		}
		return "", s.tcpStart(name, rest, signed)
	}
	s.mu.Lock()
	c := s.connections[name]
	s.mu.Unlock()
	if c == nil {
		return "", usage("no connection " + name)
	}
	switch {
	case verb == "progress" && (len(rest) == 1 || len(rest) == 2):
		deadline, err := parsePatience(rest[0])
		if err != nil {
			return "", usage(err.Error())
		}
		want := uint64(progressSize)
		if len(rest) == 2 {
			if want, err = strconv.ParseUint(rest[1], 10, 64); err != nil {
				return "", usage(err.Error())
			}
		}
		return c.progress(ctx, deadline, want)
	case verb == "stats" && len(rest) == 0:
		info, err := c.info()
		if err != nil {
			return "", err
		}
		return describe(info) + "\n", nil
	case verb == "stop" && len(rest) == 0:
		s.mu.Lock()
		delete(s.connections, name)
		s.mu.Unlock()
		return "", c.stop()
	}
	return "", usage(tcpUsage)
}

// tcpStart opens a connection that sends bursts: namespace, source or "-", destination, and perhaps the server's namespace. Both ends sign it
// if that is asked for, which needs a source.
func (s *session) tcpStart(name string, args []string, signed bool) error {
	s.mu.Lock()
	_, taken := s.connections[name]
	s.mu.Unlock()
	if taken {
		return usage("there is a connection " + name + " already")
	}
	c, err := s.dial(args, signed)
	if err != nil {
		return err
	}
	go func() { c.done <- c.send() }()
	s.mu.Lock()
	s.connections[name] = c
	s.mu.Unlock()
	return nil
}

// dial opens a connection as tcpStart does, which does not send yet.
func (s *session) dial(args []string, signed bool) (*connection, error) {
	to, err := netip.ParseAddrPort(args[2])
	if err != nil {
		return nil, usage(err.Error())
	}
	dialer := net.Dialer{Timeout: dialTimeout * patience()}
	var listen net.ListenConfig
	if args[1] != "-" {
		from, err := netip.ParseAddr(args[1])
		if err != nil {
			return nil, usage(err.Error())
		}
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		if signed {
			dialer.Control = signFor(to.Addr())
			listen.Control = signFor(from)
		}
	} else if signed {
		return nil, usage("--md5 needs a source address")
	}
	where := args[3:]
	if len(where) == 0 {
		if where, err = namespaces(); err != nil {
			return nil, err
		}
	}
	if err := s.serve(where, to, &listen); err != nil {
		return nil, err
	}
	var conn net.Conn
	if err := inNamespace(args[0], func() (err error) {
		conn, err = dialer.Dial("tcp", to.String())
		return err
	}); err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return &connection{conn: conn.(*net.TCPConn), quit: make(chan struct{}), done: make(chan error, 1)}, nil
}

// serve sees to it that a discard server listens on addr, in the first of the namespaces that has the address.
func (s *session) serve(where []string, addr netip.AddrPort, config *net.ListenConfig) error {
	var errs []error
	for _, ns := range where {
		key := ns + " " + addr.String()
		s.mu.Lock()
		_, running := s.servers[key]
		s.mu.Unlock()
		if running {
			return nil
		}
		var listener net.Listener
		err := inNamespace(ns, func() (err error) {
			listener, err = config.Listen(context.Background(), "tcp", addr.String())
			return err
		})
		if errors.Is(err, syscall.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("%s: %w", ns, err))
			continue
		}
		if err != nil {
			return fmt.Errorf("listen in %s: %w", ns, err)
		}
		s.mu.Lock()
		s.servers[key] = &server{listener: listener}
		s.mu.Unlock()
		go discard(listener)
		return nil
	}
	return fmt.Errorf("no namespace to listen on %s in: %w", addr, errors.Join(errs...))
}

// signFor gives a socket a TCP-MD5 key for a peer, before it binds or connects.
func signFor(peer netip.Addr) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var sig unix.TCPMD5Sig
		if peer.Is4() {
			sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&sig.Addr))
			sa.Family, sa.Addr = unix.AF_INET, peer.As4()
		} else {
			sa := (*unix.RawSockaddrInet6)(unsafe.Pointer(&sig.Addr))
			sa.Family, sa.Addr = unix.AF_INET6, peer.As16()
		}
		sig.Keylen = uint16(copy(sig.Key[:], "the scenario's secret"))
		var sockErr error
		err := c.Control(func(fd uintptr) {
			sockErr = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, &sig)
		})
		if err := errors.Join(err, sockErr); err != nil {
			return fmt.Errorf("set a TCP-MD5 key: %w", err)
		}
		return nil
	}
}

// discard reads all that comes until the listener is closed.
func discard(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			buffer := make([]byte, burstSize)
			for {
				if _, err := conn.Read(buffer); err != nil {
					return
				}
			}
		}()
	}
}

// send sends bursts until the connection is stopped, breaks, or a limit is reached.
func (c *connection) send() error {
	buffer := make([]byte, burstSize)
	pause := time.NewTicker(min(burstPause*patience(), longestPause))
	defer pause.Stop()
	limit := time.After(timeLimit)
	for sent := 0; sent < totalLimit; {
		n, err := c.conn.Write(buffer)
		sent += n
		if err != nil {
			return fmt.Errorf("send: %w", err)
		}
		select {
		case <-pause.C:
		case <-c.quit:
			return nil
		case <-limit:
			return errors.New("sent long enough")
		}
	}
	return errors.New("sent enough")
}

// stop ends the connection. The error is the sender's own, if it had ended before.
func (c *connection) stop() error {
	select {
	case err := <-c.done:
		_ = c.conn.Close()
		return err
	default:
	}
	c.once.Do(func() { close(c.quit) })
	// A write that is stuck on a broken path ends with the socket. SetLinger(0) spares the guest
	// the FIN's retransmissions.
	_ = c.conn.SetLinger(0)
	_ = c.conn.Close()
	if err := <-c.done; err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// progress waits until the peer has acknowledged want more bytes than now.
func (c *connection) progress(ctx context.Context, deadline time.Duration, want uint64) (string, error) {
	before, err := c.info()
	if err != nil {
		return "", err
	}
	start := time.Now()
	for {
		now, err := c.info()
		if err != nil {
			return "", err
		}
		got := now.Bytes_acked - before.Bytes_acked
		took := time.Since(start)
		if got >= want {
			return fmt.Sprintf("acked=%d after=%v retransmits=%d\n", got, took.Round(time.Millisecond), now.Total_retrans-before.Total_retrans), nil
		}
		if took > deadline || ctx.Err() != nil {
			return describe(now) + "\n", fmt.Errorf("only %d of %d bytes acknowledged within %v: %s", got, want, took.Round(time.Millisecond), describe(now))
		}
		select {
		case err := <-c.done:
			c.done <- err
			return "", fmt.Errorf("the sender has ended: %w", err)
		case <-time.After(pollInterval):
		}
	}
}

// info asks the kernel about the connection.
func (c *connection) info() (*unix.TCPInfo, error) {
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("tcp info: %w", err)
	}
	var info *unix.TCPInfo
	var sockErr error
	if err := raw.Control(func(fd uintptr) {
		info, sockErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); err != nil {
		sockErr = err
	}
	if sockErr != nil {
		return nil, fmt.Errorf("tcp info: %w", sockErr)
	}
	return info, nil
}

func describe(info *unix.TCPInfo) string {
	return fmt.Sprintf("acked=%d retransmits=%d mss=%d pmtu=%d advmss=%d cwnd=%d rto_us=%d",
		info.Bytes_acked, info.Total_retrans, info.Snd_mss, info.Pmtu, info.Advmss, info.Snd_cwnd, info.Rto)
}
