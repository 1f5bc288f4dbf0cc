// Package host looks at what the doctor judges besides the agent's own state: rules that set an MSS, systemd-networkd, modules, capabilities.
package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/agent"
	"tsoagent/agent/doctor"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// maxSourceLess bounds for how many coverages the kernel is asked.
const maxSourceLess = 1000

// look is under way.
type look struct{ *doctor.Patient }

// Look takes what one look at a namespace found into the patient, and looks at the rest: rules that set an MSS, systemd-networkd, modules. What
// can't be looked at is told (NotSeen).
func Look(ctx context.Context, e *agent.Examination, p *doctor.Patient) error {
	l := look{p}
	p.Looked, p.Input, p.Plan = true, e.Input, e.Plan
	var err error
	if p.LostBy, err = e.LostBy(ctx); err != nil {
		return err
	}
	l.notSeen("modules", func() error {
		b, err := os.ReadFile("/proc/modules")
		if errors.Is(err, os.ErrNotExist) {
			return nil // a kernel without modules
		}
		p.Modules = parseModules(string(b))
		return err
	})
	err = e.InNamespace(func() error {
		l.notSeen("rules of nftables", func() (err error) {
			p.Clamps, err = readClamps()
			return err
		})
		l.legacyTables(os.DirFS("/proc/thread-self/net"))
		l.notSeen("systemd-networkd", l.findNetworkd)
		return nil
	})
	l.askSourceLess(e)
	return err
}

func (p look) notSeen(what string, look func() error) {
	if err := look(); err != nil {
		p.NotSeen = append(p.NotSeen, fmt.Sprintf("%s: %s", what, strings.ReplaceAll(err.Error(), "\n", "; ")))
	}
}

// askSourceLess asks the kernel for the routes that a clamp to the path MTU looks at.
func (p look) askSourceLess(e *agent.Examination) {
	p.SourceLess = map[xfrmwatch.CoverageID]int{}
	for id, dst := range p.Destinations() {
		if len(p.SourceLess) == maxSourceLess {
			return
		}
		f := routes.FamilyOf(dst)
		ans, err := e.Lookup(routes.Query{Family: f, Dst: dst})
		if err != nil {
			continue // no route: nothing is forwarded there
		}
		mtu := 0
		if l := p.Input.FIB.Link(ans.Oif); l != nil {
			mtu = l.MTUFor(f)
		}
		for _, m := range []uint32{ans.MTU, ans.PMTU} {
			if m != 0 && (mtu == 0 || int(m) < mtu) {
				mtu = int(m)
			}
		}
		p.SourceLess[id] = mtu
	}
}

// readClamps reads the rules that set an MSS in the namespace of the calling thread. It is empty where the kernel has no nftables.
func readClamps() ([]doctor.Clamp, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var out []doctor.Clamp
	msgs, err := dumpNFT(c, unix.NFT_MSG_GETRULE)
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		clamp, ok, err := parseRule(m.Data)
		if err != nil {
			return nil, fmt.Errorf("a rule can't be decoded: %w", err)
		}
		if ok {
			out = append(out, clamp)
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	if msgs, err = dumpNFT(c, unix.NFT_MSG_GETCHAIN); err != nil {
		return nil, err
	}
	hooks := map[nftChain]string{}
	for _, m := range msgs {
		chain, hook, ok, err := parseChain(m.Data)
		if err != nil {
			return nil, fmt.Errorf("a chain can't be decoded: %w", err)
		}
		if ok {
			hooks[chain] = hook
		}
	}
	for i, cl := range out {
		out[i].Hook = hooks[nftChain{cl.Family, cl.Table, cl.Chain}]
	}
	return out, nil
}

// dumpNFT lists all objects of a kind, of all families. Somebody who writes meanwhile breaks the dump off (NLM_F_DUMP_INTR), and so it is read
// again, for as long as that can be meant well.
func dumpNFT(c *netlink.Conn, msg uint16) ([]netlink.Message, error) {
	req := netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | msg), Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, nfgenmsgLen), // NFPROTO_UNSPEC
	}
	const tries = 10
	for n := 1; ; n++ {
		msgs, err := c.Execute(req)
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP): // the kernel has no nf_tables
			return nil, nil
		case err == nil, !errors.Is(err, unix.EINTR) || n == tries:
			return msgs, err
		}
	}
}

// legacyTables says which tables of iptables-legacy there are: their rules can't be read by netlink.
func (p look) legacyTables(net fs.FS) {
	for _, f := range []struct{ file, tool string }{{"ip_tables_names", "iptables-legacy"}, {"ip6_tables_names", "ip6tables-legacy"}} {
		b, err := fs.ReadFile(net, f.file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without them
		}
		p.notSeen("rules of "+f.tool, func() error { return err })
		if names := strings.Fields(string(b)); err == nil && len(names) > 0 {
			p.NotSeen = append(p.NotSeen, fmt.Sprintf("rules of %s (tables %s): %[1]s-save shows those with TCPMSS", f.tool, strings.Join(names, ", ")))
		}
	}
}

// findNetworkd finds a systemd-networkd in the namespace of the calling thread, and reads its configuration as it sees it.
func (p look) findNetworkd() error {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	var hidden error
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		comm, err := os.ReadFile("/proc/" + e.Name() + "/comm")
		if err != nil || strings.TrimSpace(string(comm)) != "systemd-network" { // cut to 15 bytes (TASK_COMM_LEN)
			continue
		}
		ns, err := os.Readlink("/proc/" + e.Name() + "/ns/net")
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) { // it has not just ended
			hidden = fmt.Errorf("whether pid %d is in this namespace: %w", pid, err)
		}
		if err == nil && ns == own {
			return p.readNetworkd(pid, os.DirFS("/proc/"+e.Name()+"/root"))
		}
	}
	return hidden
}

// readNetworkd reads the configuration of a process as that sees it. One that can't be read is not judged.
func (p look) readNetworkd(pid int, root fs.FS) error {
	n, err := readNetworkd(root)
	if err != nil {
		return fmt.Errorf("the configuration of pid %d: %w", pid, err)
	}
	n.PID = pid
	p.Networkd = &n
	return nil
}

// ReadProcess reads the effective capabilities of a process (CapEff in /proc/PID/status).
func ReadProcess(name string, pid int) (doctor.Process, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return doctor.Process{}, err
	}
	caps, err := parseStatus(string(b))
	return doctor.Process{Name: name, PID: pid, Caps: caps}, err
}

func parseStatus(text string) (uint64, error) {
	for line := range strings.Lines(text) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	return 0, errors.New("there is no CapEff in /proc/PID/status")
}
