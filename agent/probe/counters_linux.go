package probe

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	vnl "github.com/vishvananda/netlink"
)

// counters reads the counters for errors and drops of both ends.
func (l *lab) counters() (Counters, error) {
	c := Counters{}
	for i, e := range l.ends {
		err := e.do(func() error {
			return errors.Join(
				readLink(c, e.name+" "+tunnelName, l.tunnel[i]),
				readLink(c, e.name+" "+nicName, l.nic[i]),
				readXFRM(c, e.name),
				readSNMP(c, e.name))
		})
		if err != nil {
			return nil, fmt.Errorf("counters of the %s: %w", e.name, err)
		}
	}
	return c, nil
}

// readLink adds a device's drops and errors (struct rtnl_link_stats64).
func readLink(c Counters, who string, index int) error {
	link, err := vnl.LinkByIndex(index)
	if err != nil {
		return err
	}
	if s := link.Attrs().Statistics; s != nil {
		c[who+" tx_dropped"] = s.TxDropped
		c[who+" tx_errors"] = s.TxErrors
		c[who+" rx_dropped"] = s.RxDropped
		c[who+" rx_errors"] = s.RxErrors
	}
	return nil
}

// readXFRM adds /proc/net/xfrm_stat, all of whose counters are for errors. It is missing where
// the kernel keeps no such statistics (CONFIG_XFRM_STATISTICS).
func readXFRM(c Counters, who string) error {
	// Not /proc/net: that is the namespace of the process's first thread.
	b, err := os.ReadFile("/proc/thread-self/net/xfrm_stat")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] != "XfrmAcquireError" {
			c.put(who+" xfrm "+f[0], f[1])
		}
	}
	return err
}

// bad are the counters of /proc/net/snmp and snmp6 that tell of broken packets.
var bad = map[string]bool{
	"IpFragFails": true, "IpReasmFails": true, "IpOutDiscards": true, "IpInHdrErrors": true, "TcpInErrs": true, "TcpInCsumErrors": true,
	"UdpInErrors": true, "UdpInCsumErrors": true,
	"Ip6FragFails": true, "Ip6ReasmFails": true, "Ip6OutDiscards": true, "Ip6InHdrErrors": true, "Ip6InTruncatedPkts": true,
	"Udp6InErrors": true, "Udp6InCsumErrors": true,
}

// readSNMP adds those of /proc/net/snmp and snmp6 that are bad.
func readSNMP(c Counters, who string) error {
	b, err := os.ReadFile("/proc/thread-self/net/snmp")
	if err != nil {
		return err
	}
	// A line with the names, a line with the values, both begin with "Ip:".
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(names) == 0 || len(f) != len(names) || f[0] != names[0] {
			names = f
			continue
		}
		for i := 1; i < len(f); i++ {
			if name := strings.TrimSuffix(names[0], ":") + names[i]; bad[name] {
				c.put(who+" "+name, f[i])
			}
		}
		names = nil
	}
	b, err = os.ReadFile("/proc/thread-self/net/snmp6")
	if errors.Is(err, os.ErrNotExist) { // no IPv6
		return nil
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && bad[f[0]] {
			c.put(who+" "+f[0], f[1])
		}
	}
	return err
}

// put adds a counter that the kernel printed.
func (c Counters) put(name, text string) {
	if n, err := strconv.ParseUint(text, 10, 64); err == nil {
		c[name] = n
	}
}
