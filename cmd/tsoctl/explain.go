package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/netns"
)

func explainCommand() *cli.Command {
	return &cli.Command{
		Name: "explain", Usage: "what happens to packets for an address, and why; works without an agent", ArgsUsage: "DST",
		OnUsageError: usage, Action: explain,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "from", Usage: "the packets' source `ADDRESS`; else the one that the kernel picks"},
			&cli.StringFlag{Name: "proto", Usage: "the packets' IP `PROTOCOL`: a number, or tcp, udp, sctp, dccp, gre, icmp or icmpv6"},
			&cli.UintFlag{Name: "port", Usage: "the packets' destination `PORT`"},
			&cli.StringFlag{Name: "mark", Usage: "the packets' fwmark `MARK`, decimal or 0x…"},
		},
	}
}

func explain(c *cli.Context) error {
	q, err := question(c)
	if err != nil {
		return cli.Exit(err.Error(), exitUsage)
	}
	cfg, ns, err := call(c)
	if err != nil {
		return err
	}
	e, err := client.New(cfg.RunDir).ExplainIn(c.Context, ns, q)
	if errors.Is(err, client.ErrNoAgent) {
		_, err = agent.LookIn(c.Context, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version(), func(ask func(agent.Question) (*agent.Explanation, error)) error {
			e, err = ask(q)
			return err
		})
	}
	if err != nil {
		return err
	}
	return show(c, e, func(p page) { explainTable(p, e) })
}

func question(c *cli.Context) (agent.Question, error) {
	var q agent.Question
	if c.Args().Len() != 1 {
		return q, errors.New("give one destination address: tsoctl explain DST [--from ADDRESS]")
	}
	parse := func(name, s string) (netip.Addr, error) {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return a, fmt.Errorf("%s: %q is no IP address", name, s)
		}
		return a.Unmap(), nil
	}
	var err error
	if q.Dst, err = parse("DST", c.Args().First()); err != nil {
		return q, err
	}
	if s := c.String("from"); s != "" {
		if q.From, err = parse("--from", s); err != nil {
			return q, err
		}
		if q.From.Is4() != q.Dst.Is4() {
			return q, errors.New("--from and DST are of different families")
		}
	}
	if q.Proto, err = protocol(c.String("proto")); err != nil {
		return q, err
	}
	if c.Uint("port") > 65535 {
		return q, fmt.Errorf("--port: %d is no port (0 to 65535)", c.Uint("port"))
	}
	q.Port = uint16(c.Uint("port"))
	if s := c.String("mark"); s != "" {
		m, err := strconv.ParseUint(s, 0, 32)
		if err != nil {
			return q, fmt.Errorf("--mark: %q is no mark", s)
		}
		q.Mark = uint32(m)
	}
	return q, nil
}

// protocols are those that selectors and people call by their names (/etc/protocols, which not every host has).
var protocols = map[string]uint8{
	"icmp": unix.IPPROTO_ICMP, "icmpv6": unix.IPPROTO_ICMPV6, "tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP,
	"sctp": unix.IPPROTO_SCTP, "dccp": unix.IPPROTO_DCCP, "gre": unix.IPPROTO_GRE,
}

// protocol is the number of one that is given by its name or number, 0 for any.
func protocol(s string) (uint8, error) {
	if s == "" {
		return 0, nil
	}
	if n, ok := protocols[strings.ToLower(s)]; ok {
		return n, nil
	}
	n, err := strconv.ParseUint(s, 0, 8)
	if err != nil {
		return 0, fmt.Errorf("--proto: %q is no protocol: give a number up to 255, or %s", s, strings.Join(slices.Sorted(maps.Keys(protocols)), ", "))
	}
	return uint8(n), nil
}

func explainTable(p page, e *agent.Explanation) {
	line := "packets to " + e.Dst
	if e.From != "" {
		line += " from " + e.From
	}
	p.text(0, "%s", line)
	via := e.Device
	if e.Gateway != "" {
		via += " via " + e.Gateway
	}
	route := fmt.Sprintf("%s, table %s, device mtu %d", via, tableText(e.Table), e.DeviceMTU)
	if e.RouteMTU != 0 {
		route += ", route mtu " + mtuText(e.RouteMTU, e.RouteMTULocked)
	}
	p.text(2, "route: %s", route)
	if e.Route != "" {
		p.text(4, "%s", e.Route)
	}
	if e.Rule != "" {
		p.text(4, "by rule %s", e.Rule)
	}
	switch e.Action {
	case "none":
		p.text(2, "policy: none matches, they leave in the clear")
	case "bypass":
		p.text(2, "policy: %d bypasses IPsec (%s)", e.Policy, e.Selector)
	case "block":
		p.text(2, "policy: %d blocks them (%s)", e.Policy, e.Selector)
	default:
		p.text(2, "policy: %d (%s)", e.Policy, e.Selector)
	}
	for _, l := range e.Losers {
		p.text(2, "also matches, but comes later: %s", l)
	}
	for i := len(e.Costs) - 1; i >= 0; i-- {
		costTable(p, e.Costs[i])
	}
	switch c := e.Coverage; {
	case e.MTU > 0 && e.Action != "ipsec":
		p.text(2, "mtu %d, TCP MSS %d without options", e.MTU, e.MSS)
	case e.MTU > 0:
		p.text(2, "inner mtu %d, TCP MSS %d without options", e.MTU, e.MSS)
	case c != nil && c.MTU > 0:
		p.text(2, "inner mtu %d", c.MTU)
	}
	if e.Segmentation != "" {
		p.text(2, "segments are cut %s", e.Segmentation)
	}
	if c := e.Coverage; c != nil {
		if !e.Live && len(c.Held)+len(c.Locked) > 0 {
			p.text(2, "no agent runs; one would have this")
		}
		coverageActs(p, *c)
	}
	for _, n := range e.Notes {
		p.text(2, "- %s", n)
	}
	for i, w := range e.WouldChange {
		if i == 0 {
			p.text(2, "what would change this:")
		}
		p.text(2, "- %s", w)
	}
}

// costTable is a subtraction: what one transformation is given, takes and leaves, in bytes.
func costTable(p page, s agent.StepCost) {
	p.text(2, "%s to %s:", s.Template, s.SA)
	wide := len("leaves")
	for _, it := range s.Items {
		wide = max(wide, len(it.Name))
	}
	line := func(name string, bytes int) { fmt.Fprintf(p, "    %-*s  %5d\n", wide, name, bytes) }
	line("given", s.MTU)
	for _, it := range s.Items {
		line(it.Name, -it.Bytes)
	}
	line("leaves", s.Inner)
	for _, l := range s.Losers {
		p.text(4, "not used: SA %s", l)
	}
}

// tableText is a routing table as `ip` names it.
func tableText(id uint32) string {
	switch id {
	case 253:
		return "default"
	case 254:
		return "main"
	case 255:
		return "local"
	}
	return fmt.Sprint(id)
}
