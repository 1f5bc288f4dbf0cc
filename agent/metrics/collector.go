package metrics

import (
	"cmp"
	"runtime"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"tsoagent/agent"
	"tsoagent/agent/netns"
)

// The values of the label port that are no port.
const (
	portNone  = "none"  // the listener is gone
	portOther = "other" // of listeners beyond those that a diagnosis lists
)

// Collector makes metrics of the newest reports. It is safe for concurrent use if reports is.
type Collector struct {
	version string
	reports func() []*agent.Report

	build, readable, connections, lost, at, looks, lookSeconds *prometheus.Desc
}

var _ prometheus.Collector = (*Collector)(nil)

// NewCollector makes metrics of what reports returns: the newest report of each namespace.
func NewCollector(version string, reports func() []*agent.Report) *Collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return &Collector{
		version: version, reports: reports,
		build:       desc(BuildInfo, "The agent's version, and that of Go. The value is 1.", "version", "goversion"),
		readable:    desc(ConnectionsReadable, "Whether the kernel lets its TCP sockets be read (BPF): 1 or 0.", "netns"),
		connections: desc(Connections, "Open TCP connections at the last diagnosis.", "netns"),
		lost: desc(ConnectionsLostOffload, "Open TCP connections at the last diagnosis that are neither signed nor covered, "+
			"and have no segmentation offload as their listener holds, or held, a key. By the listener's port.", "netns", "port"),
		at:          desc(DiagnosisTimestamp, "When the connections were looked at last, in seconds since 1970.", "netns"),
		looks:       desc(KeyLooks, "Looks at the keys of the namespace's TCP sockets.", "netns"),
		lookSeconds: desc(KeyLookSeconds, "CPU time of all looks at the keys of the namespace's TCP sockets, the kernel's included.", "netns"),
	}
}

// Describe tells which metrics there are.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.build, c.readable, c.connections, c.lost, c.at, c.looks, c.lookSeconds} {
		ch <- d
	}
}

// Collect sends the metrics as the reports are now.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	send(c.build, 1, c.version, runtime.Version())
	for _, r := range c.reports() {
		name := cmp.Or(r.Netns, netns.Host)
		for _, s := range r.Sources {
			if s.Source == "sockopt" {
				ch <- prometheus.MustNewConstMetric(c.looks, prometheus.CounterValue, float64(s.Dumps), name)
				ch <- prometheus.MustNewConstMetric(c.lookSeconds, prometheus.CounterValue, s.Seconds, name)
			}
		}
		d := r.Diagnosis
		if d == nil {
			continue // not looked yet
		}
		send(c.at, float64(d.At.UnixMilli())/1000, name)
		if d.Unreadable != "" {
			send(c.readable, 0, name)
			continue
		}
		send(c.readable, 1, name)
		send(c.connections, float64(d.Connections), name)
		for port, n := range lostByPort(d) {
			send(c.lost, float64(n), name, port)
		}
	}
}

// lostByPort counts by the listener's port. A port has as many listeners as there are addresses.
func lostByPort(d *agent.Diagnosis) map[string]int {
	out := map[string]int{}
	for _, c := range d.Collateral {
		port := portNone
		if c.Port != 0 {
			port = strconv.Itoa(int(c.Port))
		}
		out[port] += c.Lost
	}
	if d.MoreCollateral > 0 {
		out[portOther] += d.MoreCollateral
	}
	return out
}
