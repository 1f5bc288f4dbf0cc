// Package metrics tells Prometheus what the agent's reports say. It reads them and nothing else, so a
// scrape costs the agent's loop nothing, and the kernel neither.
package metrics

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The names of all metrics. docs/metrics.md, the rules and the dashboard are held to them by tests.
const (
	BuildInfo       = "tsoagent_build_info"
	StartTimestamp  = "tsoagent_start_timestamp_seconds"
	ReloadSuccess   = "tsoagent_config_last_reload_successful"
	ReloadTimestamp = "tsoagent_config_last_reload_success_timestamp_seconds"
	Namespaces      = "tsoagent_namespaces"

	Enforcing  = "tsoagent_enforcing"
	Paused     = "tsoagent_paused"
	Degraded   = "tsoagent_degraded"
	Findings   = "tsoagent_findings"
	LinksSeen  = "tsoagent_links"
	RoutesSeen = "tsoagent_routes"
	Policies   = "tsoagent_policies"
	SAs        = "tsoagent_sas"

	SourceStale       = "tsoagent_source_stale"
	SourceEvents      = "tsoagent_source_events_total"
	SourceResyncs     = "tsoagent_source_resyncs_total"
	SourceOverruns    = "tsoagent_source_overruns_total"
	SourceUndecodable = "tsoagent_source_undecodable_total"

	Coverages    = "tsoagent_coverages"
	CoverageMTUs = "tsoagent_coverages_by_mtu"

	Holds         = "tsoagent_holds"
	FeatureActive = "tsoagent_feature_active"
	Locks         = "tsoagent_locks"
	Clones        = "tsoagent_clones"
	Rules         = "tsoagent_rules"
	LockMTUMin    = "tsoagent_lock_mtu_min_bytes"
	LockMTUMax    = "tsoagent_lock_mtu_max_bytes"
	Lanes         = "tsoagent_lanes"
	Clamps        = "tsoagent_clamps"
	DeviceMTUs    = "tsoagent_device_mtus"

	Contested       = "tsoagent_contested"
	RestoresPending = "tsoagent_restores_pending"
	JournalEntries  = "tsoagent_journal_entries"

	Actions  = "tsoagent_actions_total"
	Repairs  = "tsoagent_route_repairs_total"
	Reaction = "tsoagent_reaction_seconds"
	Rounds   = "tsoagent_rounds_total"

	ConnectionsReadable    = "tsoagent_connections_readable"
	Connections            = "tsoagent_connections"
	ConnectionsLostOffload = "tsoagent_connections_lost_offload"
	DiagnosisTimestamp     = "tsoagent_connections_diagnosis_timestamp_seconds"
	KeyLooks               = "tsoagent_tcp_key_looks_total"
	KeyLookSeconds         = "tsoagent_tcp_key_look_cpu_seconds_total"
)

// Names are all of them.
var Names = []string{
	BuildInfo, StartTimestamp, ReloadSuccess, ReloadTimestamp, Namespaces,
	Enforcing, Paused, Degraded, Findings, LinksSeen, RoutesSeen, Policies, SAs,
	SourceStale, SourceEvents, SourceResyncs, SourceOverruns, SourceUndecodable,
	Coverages, CoverageMTUs, Holds, FeatureActive, Locks, Clones, Rules, LockMTUMin, LockMTUMax, Lanes, Clamps, DeviceMTUs,
	Contested, RestoresPending, JournalEntries, Actions, Repairs, Reaction, Rounds,
	ConnectionsReadable, Connections, ConnectionsLostOffload, DiagnosisTimestamp, KeyLooks, KeyLookSeconds,
}

// The bounds of labels that the machine's own state decides about.
const (
	// MaxDevices is how many devices a metric tells apart in a namespace. What the others have is counted
	// under Other.
	MaxDevices = 64
	// MaxMTUs is the same for inner MTUs.
	MaxMTUs = 32
	// Other is the label of what is beyond a bound.
	Other = "other"
	// None is the label of what has none: a listener that is gone, a coverage without an MTU.
	None = "none"
)

// text is a device's name as a label: the kernel takes any byte for one (dev_valid_name, net/core/dev.c), a label is UTF-8, and a single one
// that isn't would cost the whole page. A byte that is none is written as \xff, and what can't be printed, which the terminal of who
// looks at the page would obey, as \x1b or \u009b.
func text(name string) string {
	var b strings.Builder
	for len(name) > 0 {
		r, size := utf8.DecodeRuneInString(name)
		switch {
		case strconv.IsPrint(r) && (r != utf8.RuneError || size > 1):
			b.WriteString(name[:size])
		case size == 1:
			fmt.Fprintf(&b, `\x%02x`, name[0])
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		name = name[size:]
	}
	return b.String()
}
