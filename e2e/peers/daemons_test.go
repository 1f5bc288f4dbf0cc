package peers

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// speaker is what a daemon is told, whichever it is.
type speaker struct {
	as       uint32
	id       netip.Addr
	sessions []session
	ranges   []listenRange
	// packaged runs the daemon as the user that it has as Debian's package starts it, else as root.
	packaged bool
	// listen are the addresses to listen on, none for all. BIRD has that in its sessions (`strict bind`).
	listen []netip.Addr
}

// session is one neighbour.
type session struct {
	local, remote netip.Addr
	as            uint32 // the neighbour's
	password      string // empty for none
	// passive waits for the neighbour to connect; the other side is then the only one that does.
	passive bool
	// bird is more of the same in BIRD's words.
	bird string
}

// listenRange are neighbours that nobody named, in a prefix.
type listenRange struct {
	prefix   netip.Prefix
	local    netip.Addr
	as       uint32
	password string
}

// daemon is a BGP daemon that runs.
type daemon interface {
	// established returns the neighbours that the daemon itself says it has a session with.
	established() (map[netip.Addr]bool, error)
	pid() int
}

// await waits until the daemon says that it has a session with each of the neighbours.
func (l *lab) await(d daemon, neighbours ...netip.Addr) {
	l.t.Helper()
	l.eventually(fmt.Sprintf("sessions with %v", neighbours), func() error {
		up, err := d.established()
		if err != nil {
			return err
		}
		for _, n := range neighbours {
			if !up[n] {
				return fmt.Errorf("no session with %s", n)
			}
		}
		return nil
	})
}

// write writes a configuration, which only its owner may read as it holds passwords.
func (l *lab) write(path string, text string) string {
	l.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
	return path
}

// dirOf makes a directory for a daemon, which belongs to its user if it runs as that.
func (l *lab) dirOf(s speaker, name string) string {
	l.t.Helper()
	if !s.packaged {
		return l.t.TempDir()
	}
	u, err := user.Lookup(name)
	if err != nil {
		l.t.Fatal(err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		l.t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "peers-") // above the test's own only root may pass
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chown(dir, uid, -1); err != nil {
		l.t.Fatal(err)
	}
	return dir
}

// give hands a file to the owner of its directory.
func (l *lab) give(file, dir string) {
	l.t.Helper()
	var st unix.Stat_t
	err := unix.Stat(dir, &st)
	if err == nil {
		err = os.Chown(file, int(st.Uid), -1)
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// bgpd is FRR's daemon, without zebra: it changes no route.
type bgpd struct {
	lab *lab
	dir string
	as  uint32
	*process
}

// bgpdProgram is where Debian has it.
const bgpdProgram = "/usr/lib/frr/bgpd"

var frrPackage = map[string]string{bgpdProgram: "frr", "vtysh": "frr"}

func (l *lab) startFRR(ns string, s speaker) *bgpd {
	l.t.Helper()
	dir := l.dirOf(s, "frr")
	var c strings.Builder
	fmt.Fprintf(&c, "frr defaults traditional\nrouter bgp %d\n", s.as)
	fmt.Fprintf(&c, " bgp router-id %s\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n", s.id)
	activate := map[bool]string{}
	for _, n := range s.sessions {
		fmt.Fprintf(&c, " neighbor %s remote-as %d\n neighbor %[1]s timers connect 1\n neighbor %[1]s update-source %[3]s\n", n.remote, n.as, n.local)
		if n.password != "" {
			fmt.Fprintf(&c, " neighbor %s password %s\n", n.remote, n.password)
		}
		if n.passive {
			fmt.Fprintf(&c, " neighbor %s passive\n", n.remote)
		}
		activate[n.remote.Is4()] += fmt.Sprintf("  neighbor %s activate\n", n.remote)
	}
	for i, r := range s.ranges {
		fmt.Fprintf(&c, " neighbor range%d peer-group\n neighbor range%[1]d remote-as %[2]d\n neighbor range%[1]d password %[3]s\n", i, r.as, r.password)
		fmt.Fprintf(&c, " bgp listen range %s peer-group range%d\n", r.prefix, i)
		activate[r.prefix.Addr().Is4()] += fmt.Sprintf("  neighbor range%d activate\n", i)
	}
	fmt.Fprintf(&c, " address-family ipv4 unicast\n%s exit-address-family\n", activate[true])
	fmt.Fprintf(&c, " address-family ipv6 unicast\n%s exit-address-family\n", activate[false])
	config := l.write(filepath.Join(dir, "bgpd.conf"), c.String())
	l.give(config, dir)
	args := []string{bgpdProgram, "--no_zebra", "--no_kernel", "-f", config, "-i", filepath.Join(dir, "pid"),
		"--vty_socket", dir, "--vty_port", "0", "--log", "stdout"}
	if !s.packaged {
		args = append(args, "--skip_runas") // else it is the user that it was built for
	}
	for _, a := range s.listen {
		args = append(args, "--listenon", a.String())
	}
	return &bgpd{lab: l, dir: dir, as: s.as, process: l.start(ns, dir, args...)}
}

// vtysh asks the daemon. Commands with a password go through a file: no process list shows them.
func (d *bgpd) vtysh(args ...string) ([]byte, error) {
	cmd := exec.Command("vtysh", append([]string{"--vty_socket", d.dir, "-d", "bgpd"}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+d.dir) // it keeps a history
	return output(cmd)
}

// configure runs commands under `router bgp`.
func (d *bgpd) configure(commands ...string) {
	d.lab.t.Helper()
	text := fmt.Sprintf("router bgp %d\n %s\n", d.as, strings.Join(commands, "\n "))
	if out, err := d.vtysh("-f", d.lab.write(filepath.Join(d.dir, "commands"), text)); err != nil {
		d.lab.t.Fatalf("vtysh: %v: %s", err, d.lab.quiet(string(out)))
	}
}

func (d *bgpd) established() (map[netip.Addr]bool, error) {
	out, err := d.vtysh("-c", "show bgp neighbors json")
	if err != nil {
		return nil, err
	}
	var neighbours map[string]json.RawMessage
	if err := json.Unmarshal(out, &neighbours); err != nil {
		return nil, fmt.Errorf("show bgp neighbors json: %w", err)
	}
	up := map[netip.Addr]bool{}
	for name, raw := range neighbours {
		addr, err := netip.ParseAddr(name)
		if err != nil {
			continue // the name and number of the VRF
		}
		var n struct {
			State string `json:"bgpState"`
		}
		if err := json.Unmarshal(raw, &n); err != nil {
			return nil, err
		}
		up[addr] = n.State == "Established"
	}
	return up, nil
}

// bird is BIRD.
type bird struct {
	lab     *lab
	control string
	*process
}

var birdPackage = map[string]string{"bird": "bird2", "birdc": "bird2"}

func (l *lab) startBIRD(ns string, s speaker) *bird {
	l.t.Helper()
	dir := l.dirOf(s, "bird")
	var c strings.Builder
	fmt.Fprintf(&c, "log stderr all;\nrouter id %s;\nprotocol device {}\n", s.id)
	channel := func(a netip.Addr) string {
		if a.Is4() {
			return "ipv4 { import all; export none; };"
		}
		return "ipv6 { import all; export none; };"
	}
	for i, n := range s.sessions {
		fmt.Fprintf(&c, "protocol bgp s%d { local %s as %d; neighbor %s as %d; connect delay time 1; error wait time 1, 2; %s\n", i, n.local, s.as,
			n.remote, n.as, channel(n.remote))
		if n.password != "" {
			fmt.Fprintf(&c, "\tpassword %q;\n", n.password)
		}
		if n.passive {
			fmt.Fprintf(&c, "\tpassive on;\n")
		}
		fmt.Fprintf(&c, "\t%s }\n", n.bird)
	}
	for i, r := range s.ranges {
		fmt.Fprintf(&c, "protocol bgp r%d { local %s as %d; neighbor range %s as %d; password %q; %s }\n", i, r.local, s.as, r.prefix, r.as,
			r.password, channel(r.local))
	}
	b := &bird{lab: l, control: filepath.Join(dir, "bird.ctl")}
	config := l.write(filepath.Join(dir, "bird.conf"), c.String())
	l.give(config, dir)
	args := []string{"bird", "-f", "-c", config, "-s", b.control, "-P", filepath.Join(dir, "pid")}
	if s.packaged {
		args = append(args, "-u", "bird", "-g", "bird") // as bird.service has it
	}
	b.process = l.start(ns, dir, args...)
	return b
}

func (b *bird) established() (map[netip.Addr]bool, error) {
	out, err := output(exec.Command("birdc", "-s", b.control, "show protocols all"))
	if err != nil {
		return nil, err
	}
	up := map[netip.Addr]bool{}
	var addr netip.Addr
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "BGP state":
			addr = netip.Addr{}
			if value == "Established" {
				addr = netip.IPv4Unspecified() // the next lines tell whom with
			}
		case "Neighbor address":
			if addr.IsValid() {
				bare, _, _ := strings.Cut(value, "%")
				if a, err := netip.ParseAddr(bare); err == nil {
					up[a] = true
				}
			}
		}
	}
	return up, nil
}

// gobgpd is GoBGP.
type gobgpd struct {
	lab *lab
	api string
	*process
}

// gobgp builds GoBGP's commands once, from the module beside this file, and returns their directory.
var gobgp = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(host.WorkDir(), "gobgp")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", dir+"/", "tool")
	cmd.Dir, cmd.Env = "gobgp", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return dir, nil
})

// needGoBGP skips the test where GoBGP is neither in the module cache nor to be had. That it doesn't build is a failure.
func needGoBGP(t *testing.T) {
	t.Helper()
	// This fetches what is not there.
	list := exec.Command("go", "list", "-deps", "tool")
	list.Dir = "gobgp"
	if _, err := output(list); err != nil {
		t.Skipf("needs the Go module github.com/osrg/gobgp/v4 and what it imports: %v", err)
	}
	if _, err := gobgp(); err != nil {
		t.Fatalf("GoBGP: %v", err)
	}
}

func (l *lab) startGoBGP(ns string, s speaker) *gobgpd {
	l.t.Helper()
	programs, err := gobgp()
	if err != nil {
		l.t.Fatal(err)
	}
	dir := l.t.TempDir()
	var c strings.Builder
	fmt.Fprintf(&c, "[global.config]\nas = %d\nrouter-id = %q\n", s.as, s.id)
	if len(s.listen) > 0 {
		fmt.Fprintf(&c, "local-address-list = [%s]\n", quoted(s.listen))
	}
	family := func(a netip.Addr) string {
		if a.Is4() {
			return "ipv4-unicast"
		}
		return "ipv6-unicast"
	}
	for _, n := range s.sessions {
		fmt.Fprintf(&c, "[[neighbors]]\n[neighbors.config]\nneighbor-address = %q\npeer-as = %d\nauth-password = %q\n", n.remote, n.as, n.password)
		fmt.Fprintf(&c, "[neighbors.timers.config]\nconnect-retry = 1\nidle-hold-time-after-reset = 1\n")
		fmt.Fprintf(&c, "[neighbors.transport.config]\nlocal-address = %q\npassive-mode = %v\n", n.local, n.passive)
		fmt.Fprintf(&c, "[[neighbors.afi-safis]]\n[neighbors.afi-safis.config]\nafi-safi-name = %q\n", family(n.remote))
	}
	for i, r := range s.ranges {
		fmt.Fprintf(&c, "[[peer-groups]]\n[peer-groups.config]\npeer-group-name = \"range%d\"\npeer-as = %d\nauth-password = %q\n", i, r.as, r.password)
		fmt.Fprintf(&c, "[[peer-groups.afi-safis]]\n[peer-groups.afi-safis.config]\nafi-safi-name = %q\n", family(r.local))
		fmt.Fprintf(&c, "[[dynamic-neighbors]]\n[dynamic-neighbors.config]\nprefix = %q\npeer-group = \"range%d\"\n", r.prefix, i)
	}
	g := &gobgpd{lab: l, api: "unix://" + filepath.Join(dir, "api.sock")}
	g.process = l.start(ns, dir, filepath.Join(programs, "gobgpd"), "-t", "toml", "-f", l.write(filepath.Join(dir, "gobgpd.toml"), c.String()),
		"--api-hosts", g.api, "--pprof-disable", "--log-level", "warn")
	return g
}

// quoted is a list of strings in TOML.
func quoted(addrs []netip.Addr) string {
	var list []string
	for _, a := range addrs {
		list = append(list, strconv.Quote(a.String()))
	}
	return strings.Join(list, ", ")
}

func (g *gobgpd) established() (map[netip.Addr]bool, error) {
	programs, err := gobgp()
	if err != nil {
		return nil, err
	}
	out, err := output(exec.Command(filepath.Join(programs, "gobgp"), "--target", g.api, "-j", "neighbor"))
	if err != nil {
		return nil, err
	}
	const sessionEstablished = 6 // PeerState.SessionState of GoBGP's API
	var neighbours []struct {
		State struct {
			Address string `json:"neighbor_address"`
			Session int    `json:"session_state"`
		} `json:"state"`
	}
	if err := json.Unmarshal(out, &neighbours); err != nil {
		return nil, fmt.Errorf("gobgp neighbor: %w", err)
	}
	up := map[netip.Addr]bool{}
	var errs []error
	for _, n := range neighbours {
		addr, err := netip.ParseAddr(n.State.Address)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		up[addr] = n.State.Session == sessionEstablished
	}
	return up, errors.Join(errs...)
}
