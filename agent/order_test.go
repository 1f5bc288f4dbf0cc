package agent

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

func TestJournalGoesAheadOfTheKernelAndTheKernelAheadOfTheRemoval(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
	want := []string{
		"journal put tables",
		"put 10.3.0.0/16 table 5450 metric 1446 via 192.0.2.254 dev 2 mtu lock 1446",
		"add rule 32765 from 10.1.0.0/16 to 10.3.0.0/16 lookup 5450",
		"journal put route/2/254/10.2.0.0/16/invalid Prefix/0/0",
		"replace 10.2.0.0/16 dev 7 mtu lock 1446",
		"journal put feature/7/tx-tcp-ecn-segmentation",
		"journal put feature/7/tx-tcp-segmentation",
		"journal put feature/7/tx-tcp6-segmentation",
		"set ipsec1 tx-tcp-ecn-segmentation false",
		"set ipsec1 tx-tcp-segmentation false",
		"set ipsec1 tx-tcp6-segmentation false",
	}
	if d := cmp.Diff(want, w.tookButMTUs()); d != "" {
		t.Errorf("protect (-want +got):\n%s", d)
	}
	w.dumpXFRM()
	w.settle()
	w.advance(time.Second)
	want = []string{
		"delete rule 32765 from 10.1.0.0/16 to 10.3.0.0/16 lookup 5450",
		"delete 10.3.0.0/16 table 5450 metric 1446",
		"replace 10.2.0.0/16 dev 7",
		"journal remove route/2/254/10.2.0.0/16/invalid Prefix/0/0",
		"set ipsec1 tx-tcp-ecn-segmentation true",
		"journal remove feature/7/tx-tcp-ecn-segmentation",
		"set ipsec1 tx-tcp-segmentation true",
		"journal remove feature/7/tx-tcp-segmentation",
		"set ipsec1 tx-tcp6-segmentation true",
		"journal remove feature/7/tx-tcp6-segmentation",
	}
	if d := cmp.Diff(want, w.tookButMTUs()); d != "" {
		t.Errorf("restore (-want +got):\n%s", d)
	}
}

// When everything moves at once, clones whose route moved go first.
func TestClonesMoveAheadOfLocksAndHolds(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.addRoute("10.3.0.0/16", hop{oif: 2, gw: "192.0.2.10"})
	w.queue = nil
	w.start(partPolicy, partSA)
	w.took()
	w.xfrm(tunnelPolicy, tunnelSA, policy(49, "10.1.0.0/16", "10.4.0.0/16", 0))
	w.replaceRoute("10.3.0.0/16", hop{oif: 2, gw: "192.0.2.11"})
	w.settle()
	ops := w.tookButMTUs()
	at := func(prefix string) int {
		i := slices.IndexFunc(ops, func(op string) bool { return strings.HasPrefix(op, prefix) })
		if i < 0 {
			t.Fatalf("no %q in:\n%s", prefix, strings.Join(ops, "\n"))
		}
		return i
	}
	order := []string{
		"put 10.3.0.0/16 table 5450 metric 1446 via 192.0.2.11", "put 10.4.0.0/16 table 5450", "add rule",
		"replace 10.2.0.0/16", "set ipsec1", "delete rule",
	}
	for i := range order[1:] {
		if at(order[i]) > at(order[i+1]) {
			t.Errorf("%q comes after %q:\n%s", order[i], order[i+1], strings.Join(ops, "\n"))
		}
	}
}

func TestMoreSpecificRouteIsThrownAtOnce(t *testing.T) {
	w := partWorld(t, Config{})
	w.mustLead()
	w.took()
	w.addLink(&routes.Link{Index: 3, Name: "small", Type: 1, MTU: 1400, Up: true})
	w.addRoute("10.3.7.0/24", hop{oif: 3})
	w.settle()
	want := []string{"put 10.3.7.0/24 table 5450 metric 1 throw"}
	if d := cmp.Diff(want, w.tookButMTUs()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	w.deleteRoute("10.3.7.0/24")
	w.settle()
	if d := cmp.Diff([]string{"delete 10.3.7.0/24 table 5450 metric 1"}, w.tookButMTUs()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	w.mustLead()
	bypass := policy(57, "10.1.0.0/16", "10.3.8.0/24", 0)
	p := *bypass.Policy
	p.Templates, p.Priority = nil, 50
	w.xfrm(xfrmwatch.PolicySet{Policy: &p})
	w.settle()
	if got := w.table(5450); !strings.Contains(got, "10.3.8.0/24 throw") {
		t.Errorf("a bypass is not thrown: %s", got)
	}
}

func TestFailingJournalKeepsTheKernelUntouched(t *testing.T) {
	w := tunnelWorld(t, dedicatedOff())
	w.putErr = errors.New("no space left on device")
	w.start(tunnelPolicy, tunnelSA, partPolicy, partSA)
	for range 30 {
		w.advance(100 * time.Millisecond)
		w.addRoute("10.9.0.0/16", hop{oif: 2}) // any event
		w.settle()
		w.deleteRoute("10.9.0.0/16")
		w.settle()
	}
	if ops := w.took(); len(ops) > 0 {
		t.Errorf("written without a journal:\n%s", strings.Join(ops, "\n"))
	}
	for _, text := range []string{"nothing is locked", "nothing is held", "no lock in a table of our own"} {
		if !strings.Contains(w.logs.String(), "level=WARN msg=\"journal can't be written, "+text) {
			t.Errorf("no warning that %s", text)
		}
	}
	for _, f := range w.a.Report().Findings {
		if strings.Contains(f, "by its owner") {
			t.Errorf("the owner is blamed: %s", f)
		}
	}
	w.putErr = nil
	w.addRoute("10.9.0.0/16", hop{oif: 2})
	w.settle()
	w.mustProtect()
	w.mustLead()
}

// otherWay has the kernel answer another gateway for a destination when our rule is there.
func (w *world) otherWay(dst string) {
	addr := netip.MustParsePrefix(dst)
	w.lookup = func(q routes.Query) *routes.Answer {
		if !addr.Contains(q.Dst) || w.ownRules() == "" {
			return nil
		}
		return &routes.Answer{Type: routes.Unicast, Table: 5450, Oif: 2, Gateway: netip.MustParseAddr("192.0.2.99")}
	}
}

func TestLockThatWouldMoveAPacketIsWithdrawn(t *testing.T) {
	w := newWorld(t, Config{})
	w.otherWay("10.3.0.0/16")
	w.start(partPolicy, partSA)
	withdrawn := func(what string) {
		t.Helper()
		if got := w.ownRules() + w.table(5450); got != "" {
			t.Errorf("%s: still there: %s", what, got)
		}
		c := w.a.Report().Coverages[0]
		if !slices.ContainsFunc(c.Notes, func(n string) bool { return strings.Contains(n, "would go another way") }) {
			t.Errorf("%s: the verdict says %q", what, c.Notes)
		}
		if f := w.a.Report().Findings; len(f) != 1 || !strings.HasPrefix(f[0], "lock for from 10.1.0.0/16 ahead of rule 32766 withdrawn: with it 10.3.0.1 would go another way") {
			t.Errorf("%s: findings %q", what, f)
		}
	}
	withdrawn("at once")
	if !strings.Contains(w.logs.String(), "lock withdrawn") {
		t.Error("no warning")
	}
	w.took()
	w.addRoute("10.3.4.0/24", hop{oif: 2})
	w.settle()
	w.queue = append(w.queue, batch{routes: w.dumpRoutes()}) // a resync tells nothing new
	w.settle()
	w.advance(59 * time.Second)
	if n := w.count("add rule"); n > 0 {
		t.Errorf("tried again within a minute:\n%s", strings.Join(w.ops, "\n"))
	}
	withdrawn("a minute is not over")
	w.advance(time.Second)
	if n := w.count("add rule"); n != 1 {
		t.Errorf("tried %d times after a minute, want once", n)
	}
	withdrawn("it is no better")
	w.took()

	w.lookup = nil
	rule := &routes.Rule{Family: routes.IPv4, Priority: 100, Action: routes.RuleToTable, Table: 77, Mark: 1, Mask: 1, SuppressPrefixLen: -1, SuppressIfgroup: -1}
	w.routing(routes.RuleSet{Rule: rule})
	w.settle()
	if n := w.count("add rule"); n != 1 {
		t.Errorf("a foreign rule changed: tried %d times, want once", n)
	}
	if f := w.a.Report().Findings; len(f) > 0 {
		t.Errorf("findings stay: %q", f)
	}
}

func TestCloneThatMovesIsLookedAtAgain(t *testing.T) {
	w := partWorld(t, Config{})
	w.mustLead()
	w.took()
	w.lookup = func(q routes.Query) *routes.Answer {
		if q.Dst != netip.MustParseAddr("10.3.0.1") {
			return nil
		}
		return &routes.Answer{Type: routes.Unicast, Table: 5450, Oif: 2, Gateway: netip.MustParseAddr("192.0.2.99")}
	}
	w.replaceRoute("0.0.0.0/0", hop{oif: 2, gw: "192.0.2.250"})
	w.settle()
	if got := w.ownRules() + w.table(5450); got != "" {
		t.Errorf("still there: %s", got)
	}
	if f := w.a.Report().Findings; len(f) != 1 || !strings.Contains(f[0], "does not send 10.3.0.1 where the plan foresaw") {
		t.Errorf("findings %q", f)
	}
}

func TestRuleThatCannotBeAddedWithdrawsTheLock(t *testing.T) {
	w := newWorld(t, Config{})
	w.ruleErr = unix.EPERM
	w.start(partPolicy, partSA)
	if got := w.table(5450); got != "" {
		t.Errorf("clones without a rule: %s", got)
	}
	if f := w.a.Report().Findings; len(f) != 1 || !strings.Contains(f[0], "its rule can't be added: operation not permitted") {
		t.Errorf("findings %q", f)
	}
}
