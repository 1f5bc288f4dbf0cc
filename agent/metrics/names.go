// Package metrics tells Prometheus what the agent's reports say. It reads them and nothing else, so a
// scrape costs the agent's loop nothing, and the kernel neither.
package metrics

// The names of all metrics. docs/metrics.md and dashboards/alerts.yml are held to them by tests.
const (
	BuildInfo              = "tsoagent_build_info"
	ConnectionsReadable    = "tsoagent_connections_readable"
	Connections            = "tsoagent_connections"
	ConnectionsLostOffload = "tsoagent_connections_lost_offload"
	DiagnosisTimestamp     = "tsoagent_connections_diagnosis_timestamp_seconds"
	KeyLooks               = "tsoagent_tcp_key_looks_total"
	KeyLookSeconds         = "tsoagent_tcp_key_look_cpu_seconds_total"
)

// Names are all of them.
var Names = []string{BuildInfo, ConnectionsReadable, Connections, ConnectionsLostOffload, DiagnosisTimestamp, KeyLooks, KeyLookSeconds}
