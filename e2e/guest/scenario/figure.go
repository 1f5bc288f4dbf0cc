package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

const (
	rateUsage      = "rate case/when namespace from|- to:port server-namespace [duration]"
	speedUsage     = "speed case/when connection duration"
	flowsUsage     = "flows case/when namespace from|- to:port server-namespace count bytes deadline"
	datagramsUsage = "datagrams case/when namespace from|- to:port server-namespace count size"

	// arrivalPatience is how long a datagram that was sent may take. Between two namespaces it arrives with the system call, or never.
	arrivalPatience = time.Second
)

// Figure is one thing that a scenario has measured, for `make cures`.
type Figure struct {
	Case  string  `json:"case"`
	When  string  `json:"when"`
	Value float64 `json:"value"`
	Of    int     `json:"of,omitempty"` // of how many, of what is counted
	Unit  string  `json:"unit"`
	More  string  `json:"more,omitempty"` // what else there is to know
}

// record writes a figure for the host.
func (s *session) record(name string, f Figure) error {
	var ok bool
	if f.Case, f.When, ok = strings.Cut(name, "/"); !ok {
		return usage("a figure's name is case/when")
	}
	text, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("figure: %w", err)
	}
	if _, err := fmt.Fprintf(s.figures, "%s\n", text); err != nil {
		return fmt.Errorf("figure: %w", err)
	}
	return nil
}

// rate sends by a new connection as fast as it goes, and prints what the other end has acknowledged in that time. One that stalls has a rate, too.
func (s *session) rate(_ context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) != 5 && len(args) != 6 {
		return "", usage(rateUsage)
	}
	d := time.Second * patience()
	if len(args) == 6 {
		var err error
		if d, err = parsePatience(args[5]); err != nil {
			return "", usage(err.Error())
		}
	}
	c, err := s.dial(args[1:5], false)
	if err != nil {
		return "", err
	}
	start := time.Now()
	go func() { c.done <- c.flood() }()
	select {
	case err := <-c.done:
		return "", fmt.Errorf("the sender has ended: %w", err)
	case <-time.After(d):
	}
	info, err := c.info()
	if err != nil {
		return "", err
	}
	took := time.Since(start)
	if err := c.stop(); err != nil {
		return "", err
	}
	f := Figure{Value: float64(info.Bytes_acked) * 8 / 1e6 / took.Seconds(), Unit: "Mbit/s", More: fmt.Sprintf("retransmits=%d mss=%d", info.Total_retrans, info.Snd_mss)}
	return fmt.Sprintf("mbit=%.1f acked=%d %s\n", f.Value, info.Bytes_acked, f.More), s.record(args[0], f)
}

// speed prints how fast a connection of tcp goes. With its bursts that is not how fast it could go, but it tells one that stalls.
func (s *session) speed(_ context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) != 3 {
		return "", usage(speedUsage)
	}
	s.mu.Lock()
	c := s.connections[args[1]]
	s.mu.Unlock()
	d, err := parsePatience(args[2])
	if err != nil || c == nil {
		return "", usage(speedUsage)
	}
	before, err := c.info()
	if err != nil {
		return "", err
	}
	start := time.Now()
	time.Sleep(d)
	after, err := c.info()
	if err != nil {
		return "", err
	}
	acked := after.Bytes_acked - before.Bytes_acked
	f := Figure{Value: float64(acked) * 8 / 1e6 / time.Since(start).Seconds(), Unit: "Mbit/s", More: fmt.Sprintf("retransmits=%d mss=%d", after.Total_retrans-before.Total_retrans, after.Snd_mss)}
	return fmt.Sprintf("mbit=%.1f acked=%d %s\n", f.Value, acked, f.More), s.record(args[0], f)
}

// flows opens connections at once, and counts those by which so many bytes were acknowledged in time.
func (s *session) flows(ctx context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) != 8 {
		return "", usage(flowsUsage)
	}
	count, err := strconv.Atoi(args[5])
	if err != nil {
		return "", usage(err.Error())
	}
	want, err := strconv.ParseUint(args[6], 10, 64)
	if err != nil {
		return "", usage(err.Error())
	}
	d, err := parsePatience(args[7])
	if err != nil {
		return "", usage(err.Error())
	}
	var connections []*connection
	defer func() {
		for _, c := range connections {
			_ = c.stop() // a stalled one ends so
		}
	}()
	// All are open before one sends: what becomes of a connection is decided by its SYN, and the first packet that is lost can teach the gateway.
	for range count {
		c, err := s.dial(args[1:5], false)
		if err != nil {
			for _, c := range connections {
				close(c.done) // they never sent
			}
			return "", err
		}
		connections = append(connections, c)
	}
	var wg sync.WaitGroup
	finished := make([]bool, count)
	for i, c := range connections {
		go func() { c.done <- c.send() }()
		wg.Go(func() {
			_, err := c.progress(ctx, d, want)
			finished[i] = err == nil
		})
	}
	wg.Wait()
	f := Figure{Of: count, Unit: "connections"}
	var retransmits uint32
	for i, c := range connections {
		if finished[i] {
			f.Value++
		}
		if info, err := c.info(); err == nil {
			retransmits += info.Total_retrans
		}
	}
	f.More = fmt.Sprintf("retransmits=%d", retransmits)
	return fmt.Sprintf("finished=%.0f of=%d %s\n", f.Value, count, f.More), s.record(args[0], f)
}

// flood sends without a pause until the connection is closed.
func (c *connection) flood() error {
	buffer := make([]byte, burstSize)
	for {
		if _, err := c.conn.Write(buffer); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
}

// datagrams sends one datagram that must not be fragmented to each of so many neighbouring addresses, and counts those that were lost in silence:
// neither refused with the MTU in the answer nor arrived.
func (s *session) datagrams(_ context.Context, _ *testscript.TestScript, args []string) (string, error) {
	if len(args) != 7 {
		return "", usage(datagramsUsage)
	}
	to, err := netip.ParseAddrPort(args[3])
	if err != nil {
		return "", usage(err.Error())
	}
	count, err := strconv.Atoi(args[5])
	if err != nil {
		return "", usage(err.Error())
	}
	size, err := strconv.Atoi(args[6])
	if err != nil {
		return "", usage(err.Error())
	}
	var server net.PacketConn
	if err := inNamespace(args[4], func() (err error) {
		server, err = net.ListenPacket("udp", fmt.Sprintf(":%d", to.Port()))
		return err
	}); err != nil {
		return "", fmt.Errorf("listen in %s: %w", args[4], err)
	}
	defer server.Close()

	var sent, refused, arrived, mtu int
	for addr := to.Addr(); sent+refused < count; addr = addr.Next() {
		told, err := sendUnfragmented(args[1], args[2], netip.AddrPortFrom(addr, to.Port()), size)
		switch {
		case err != nil:
			return "", err
		case told > 0:
			refused++
			mtu = told
		default:
			sent++
		}
	}
	if err := server.SetReadDeadline(time.Now().Add(arrivalPatience * patience())); err != nil {
		return "", err
	}
	for buffer := make([]byte, size+1); arrived < sent; arrived++ {
		if _, _, err := server.ReadFrom(buffer); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				break
			}
			return "", err
		}
	}
	f := Figure{Value: float64(sent - arrived), Of: count, Unit: "datagrams lost in silence"}
	if refused > 0 {
		f.More = fmt.Sprintf("%d refused with MTU %d", refused, mtu)
	}
	return fmt.Sprintf("lost=%d refused=%d arrived=%d mtu=%d\n", sent-arrived, refused, arrived, mtu), s.record(args[0], f)
}

// sendUnfragmented sends a datagram that must not be fragmented. If it is too large, mtu is what the kernel says would not be.
func sendUnfragmented(ns, from string, to netip.AddrPort, size int) (mtu int, err error) {
	err = inNamespace(ns, func() error {
		fd, err := connectUDP(from, to)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		level, discover, do := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
		if to.Addr().Is6() {
			level, discover, do = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO
		}
		if err := unix.SetsockoptInt(fd, level, discover, do); err != nil {
			return fmt.Errorf("don't fragment: %w", err)
		}
		err = unix.Send(fd, make([]byte, size), 0)
		switch {
		case errors.Is(err, unix.EMSGSIZE):
			mtu, err = socketMTU(fd, to.Addr())
			return err
		case err != nil:
			return fmt.Errorf("send: %w", err)
		}
		return nil
	})
	return mtu, err
}

// measurements returns the commands that leave a figure.
func (s *session) measurements() map[string]command {
	return map[string]command{"rate": s.rate, "speed": s.speed, "flows": s.flows, "datagrams": s.datagrams}
}

// figuresTo is where figures go: nowhere, unless somebody wants them.
func figuresTo(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}
