// Package failpoint marks the places where the tests end the agent as `kill -9` would: before and after each write
// to the journal and to the kernel. With the build tag failpoint the environment says where; without it there is
// nothing of this in the program.
//
//	TSOAGENT_FAILPOINT       what happens at which points, by commas, for example lock-stale, which is killed at the first time that it
//	                         gets there, route-replace-before:3 at the third, *:40 at the 40th of all points, or, to be stopped as by
//	                         SIGSTOP and go on later, lock-journal-after:2=stop
//	TSOAGENT_FAILPOINT_FD    the number of an open file that gets a line for each point that is reached
package failpoint

// Points are all there are. One that is not among them is a mistake, which ends the program.
var Points = []string{
	// The journal (agent/journal). A line of it is whole on disk from synced on. Torn is in the middle of the line: the kernel looks for
	// SIGKILL after each page that it writes (generic_perform_write, mm/filemap.c).
	"journal-append-before", "journal-append-torn", "journal-append-written", "journal-append-synced",
	// The journal is written anew, and then takes the place of the old one.
	"journal-new-before", "journal-new-created", "journal-new-torn", "journal-new-written", "journal-new-synced", "journal-new-renamed", "journal-new-done",
	"journal-damaged-unlinked", "journal-damaged-linked",

	// The routing tables (routes). Those of a batch are written one by one here, so that there is something between them.
	"route-replace-before", "route-replace-after", // in place
	"route-put-before", "route-put-after", // a clone, or a throw
	"route-delete-before", "route-delete-after",
	"rule-add-before", "rule-add-after", "rule-delete-before", "rule-delete-after",
	"link-mtu-before", "link-mtu-after",

	"features-before", "features-after", // of a device (ethtool)

	// A lane (lane): its ifb, that one's features, clsact and the filters.
	"lane-link-before", "lane-link-after", "lane-unlink-before", "lane-unlink-after",
	"lane-features-before", "lane-features-after",
	"lane-qdisc-before", "lane-qdisc-after", "lane-filter-before", "lane-filter-after",

	"nft-before", "nft-after", // a transaction with our nftables table (clamp)

	// What the loop is about (agent). lock-stale is between an in-place replace that overwrote what the route's owner had just written
	// and its repair.
	"lock-journal-before", "lock-journal-after", "lock-written", "lock-stale", "unlock-written",
	"hold-journal-before", "hold-journal-after", "hold-written", "unhold-written",
	"clone-journal-after", "clone-written", "rule-added", "rule-dropped", "clone-dropped",
	"mtu-journal-before", "mtu-journal-after", "mtu-written", "mtu-given",
	"clamp-journal-before", "clamp-journal-after", "clamp-written", "clamp-deleted",
	"lane-journal-before", "lane-journal-after", "lane-written", "lane-removed",
}
