package host

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/agent/doctor"
	"tsoagent/agent/netns/netnstest"
)

const ruleset = `
table inet fw {
	chain forward {
		type filter hook forward priority mangle; policy accept;
		tcp flags syn tcp option maxseg size set rt mtu
		oifname "wan0" jump small
		tcp option maxseg size 1000 counter
		tcp option window count 1 counter
	}
	chain small {
		meta nfproto ipv4 tcp flags syn / syn,rst tcp option maxseg size set 1360
	}
}
table ip6 fw {
	chain post {
		type filter hook postrouting priority 0;
		tcp flags syn tcp option maxseg size set 1300
		tcp flags syn tcp option maxseg size set ip6 daddr map { fd03::1 : 1280 }
		counter
	}
}
table bridge fw {
	chain forward {
		type filter hook forward priority 0;
		counter
	}
}
`

func TestClampsAreRead(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	if got, err := readClamps(); err != nil || got != nil {
		t.Fatalf("without rules: %v, %v", got, err)
	}
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(ruleset)
	if out, err := cmd.CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		t.Skip("nft is missing (package nftables)")
	} else if err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	got, err := readClamps()
	if err != nil {
		t.Fatal(err)
	}
	want := []doctor.Clamp{
		{Family: "inet", Table: "fw", Chain: "forward", Hook: "forward"},
		{Family: "inet", Table: "fw", Chain: "small", MSS: 1360},
		{Family: "ip6", Table: "fw", Chain: "post", MSS: 1300, Hook: "postrouting"},
		{Family: "ip6", Table: "fw", Chain: "post", MSS: doctor.UnknownMSS, Hook: "postrouting"},
	}
	if d := cmp.Diff(want, got, cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Handle" }, cmp.Ignore())); d != "" {
		t.Errorf("other clamps (-want +got):\n%s", d)
	}
	for _, c := range got {
		// The handle is the one that nft knows the rule by.
		out, err := exec.Command("nft", "-a", "list", "table", c.Family, c.Table).CombinedOutput()
		if !hasLine(string(out), "maxseg size set", " # handle "+strconv.FormatUint(c.Handle, 10)+"\n") {
			t.Errorf("%+v: nft has no such rule under its handle, %v:\n%s", c, err, out)
		}
	}
}

func hasLine(text, with, end string) bool {
	for line := range strings.Lines(text) {
		if strings.Contains(line, with) && strings.HasSuffix(line, end) {
			return true
		}
	}
	return false
}

// TestClampOfIptables reads what iptables-nft would write: the target TCPMSS in a rule of nftables.
func TestClampOfIptables(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "mangle"})
	chain := c.AddChain(&nftables.Chain{
		Table: table, Name: "FORWARD", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityMangle,
	})
	for _, mss := range []uint16{0xffff, 1400} {
		info := xt.Unknown(binary.NativeEndian.AppendUint16(nil, mss))
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Match{Name: "tcp", Info: &xt.Tcp{SrcPorts: [2]uint16{0, 65535}, DstPorts: [2]uint16{0, 65535}, FlagsMask: 6, FlagsCmp: 2}},
			&expr.Target{Name: "TCPMSS", Info: &info},
		}})
	}
	if err := c.Flush(); errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("the kernel has no nft_compat with xt_TCPMSS: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	got, err := readClamps()
	want := []doctor.Clamp{
		{Family: "ip", Table: "mangle", Chain: "FORWARD", Iptables: true, Hook: "forward"},
		{Family: "ip", Table: "mangle", Chain: "FORWARD", MSS: 1400, Iptables: true, Hook: "forward"},
	}
	if d := cmp.Diff(want, got, cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Handle" }, cmp.Ignore())); err != nil || d != "" {
		t.Errorf("%v, other clamps (-want +got):\n%s", err, d)
	}
}

// message is a rule as the kernel sends it, made of attributes.
func message(t testing.TB, family uint8, exprs ...[]netlink.Attribute) []byte {
	t.Helper()
	enc := netlink.NewAttributeEncoder()
	enc.ByteOrder = binary.BigEndian
	enc.String(unix.NFTA_RULE_TABLE, "mangle")
	enc.String(unix.NFTA_RULE_CHAIN, "FORWARD")
	enc.Uint64(unix.NFTA_RULE_HANDLE, 9)
	enc.Nested(unix.NFTA_RULE_EXPRESSIONS, func(enc *netlink.AttributeEncoder) error {
		for _, e := range exprs {
			b, err := netlink.MarshalAttributes(e)
			if err != nil {
				return err
			}
			enc.Bytes(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, b)
		}
		return nil
	})
	b, err := enc.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return append([]byte{family, 0, 0, 0}, b...)
}

func expression(t testing.TB, name string, data ...netlink.Attribute) []netlink.Attribute {
	t.Helper()
	b, err := netlink.MarshalAttributes(data)
	if err != nil {
		t.Fatal(err)
	}
	return []netlink.Attribute{{Type: unix.NFTA_EXPR_NAME, Data: []byte(name + "\x00")}, {Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: b}}
}

func number(typ uint16, n uint32) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: binary.BigEndian.AppendUint32(nil, n)}
}

// messages are rules by what is to be read of them.
func messages(t testing.TB) map[string]struct {
	data []byte
	want doctor.Clamp
	ok   bool
} {
	tcpmss := func(mss uint16) []netlink.Attribute {
		return expression(t, "target", netlink.Attribute{Type: unix.NFTA_TARGET_NAME, Data: []byte("TCPMSS\x00")}, number(unix.NFTA_TARGET_REV, 0),
			netlink.Attribute{Type: unix.NFTA_TARGET_INFO, Data: binary.NativeEndian.AppendUint16(nil, mss)})
	}
	set := expression(t, "exthdr", number(unix.NFTA_EXTHDR_SREG, 8), netlink.Attribute{Type: unix.NFTA_EXTHDR_TYPE, Data: []byte{kindMaxSeg}},
		number(unix.NFTA_EXTHDR_OP, opTCPOption))
	rule := doctor.Clamp{Family: "ip", Table: "mangle", Chain: "FORWARD", Handle: 9}
	with := func(mss int, iptables bool) doctor.Clamp {
		c := rule
		c.MSS, c.Iptables = mss, iptables
		return c
	}
	return map[string]struct {
		data []byte
		want doctor.Clamp
		ok   bool
	}{
		"iptables to the path mtu": {message(t, unix.NFPROTO_IPV4, tcpmss(0xffff)), with(0, true), true},
		"iptables to a number":     {message(t, unix.NFPROTO_IPV4, tcpmss(1400)), with(1400, true), true},
		"rt mtu":                   {message(t, unix.NFPROTO_IPV4, expression(t, "rt", number(unix.NFTA_RT_KEY, unix.NFT_RT_TCPMSS)), expression(t, "byteorder"), set), with(0, false), true},
		"a map":                    {message(t, unix.NFPROTO_IPV4, expression(t, "lookup"), set), with(doctor.UnknownMSS, false), true},
		"another target":           {message(t, unix.NFPROTO_IPV4, expression(t, "target", netlink.Attribute{Type: unix.NFTA_TARGET_NAME, Data: []byte("MARK\x00")})), rule, false},
		"a bridge's":               {message(t, unix.NFPROTO_BRIDGE, tcpmss(1400)), doctor.Clamp{}, false},
	}
}

func TestParseRule(t *testing.T) {
	for name, tt := range messages(t) {
		got, ok, err := parseRule(tt.data)
		if err != nil || ok != tt.ok || got != tt.want {
			t.Errorf("%s: %+v, %v, %v; want %+v", name, got, ok, err, tt.want)
		}
	}
	if _, _, err := parseRule([]byte{2, 0}); err == nil {
		t.Error("a message without a head is taken for a rule")
	}
}

func FuzzParseRule(f *testing.F) {
	for _, m := range messages(f) {
		f.Add(m.data)
	}
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _, _ = parseRule(b)
		_, _, _, _ = parseChain(b)
	})
}

// FuzzText reads the texts of files: a line more, which says nothing, makes no difference.
func FuzzText(f *testing.F) {
	f.Add("esp4_offload 16384 2 - Live 0x0\nesp6_offload 16384 - - Live 0x0\n")
	f.Add("[Network]\n ManageForeignRoutes = off\nManageForeignRoutingPolicyRules=no\n")
	f.Add("Name:\ttsoagent\nCapEff:\t00000000a80425fb\n")
	f.Fuzz(func(t *testing.T, text string) {
		if m := parseModules(text); !maps.Equal(m, parseModules("\n"+text+"\n\n")) || len(m) > 2 {
			t.Errorf("%v of %q", m, text)
		}
		one, other := doctor.Networkd{Routes: true}, doctor.Networkd{Routes: true}
		apply(&one, "/a", text)
		if apply(&other, "/a", "# a comment\n"+text+"\n;another\n"); one != other || one.Source != "" && one.Source != "/a" {
			t.Errorf("%+v and %+v of %q", one, other, text)
		}
		if n, err := parseStatus(text); err != nil && n != 0 {
			t.Errorf("%d and %v of %q", n, err, text)
		}
	})
}

func TestReadNetworkd(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	for name, tt := range map[string]struct {
		files fstest.MapFS
		want  doctor.Networkd
	}{
		"nothing": {fstest.MapFS{}, doctor.Networkd{Routes: true, Rules: true, Source: "the default"}},
		"in the file": {
			fstest.MapFS{"etc/systemd/networkd.conf": file("# all\n[Network]\n ManageForeignRoutes = off\n;ManageForeignRoutingPolicyRules=no\n[DHCPv4]\nManageForeignRoutingPolicyRules=no\n")},
			doctor.Networkd{Rules: true, Source: "/etc/systemd/networkd.conf"},
		},
		"only the first file counts": {
			fstest.MapFS{"run/systemd/networkd.conf": file("[Network]\nSpeedMeter=yes\n"), "usr/lib/systemd/networkd.conf": file("[Network]\nManageForeignRoutes=no\n")},
			doctor.Networkd{Routes: true, Rules: true, Source: "the default"},
		},
		"drop-ins in the order of their names": {
			fstest.MapFS{
				"etc/systemd/networkd.conf":                    file("[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n"),
				"usr/lib/systemd/networkd.conf.d/50-a.conf":    file("[Network]\nManageForeignRoutes=yes\n"),
				"run/systemd/networkd.conf.d/40-b.conf":        file("[Network]\nManageForeignRoutes=0\n"),
				"etc/systemd/networkd.conf.d/60-c.conf.backup": file("[Network]\nManageForeignRoutes=no\n"),
			},
			doctor.Networkd{Routes: true, Source: "/usr/lib/systemd/networkd.conf.d/50-a.conf"},
		},
		"a drop-in hides its namesake": {
			fstest.MapFS{
				"usr/lib/systemd/networkd.conf.d/50-a.conf":       file("[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n"),
				"usr/local/lib/systemd/networkd.conf.d/50-a.conf": file("[Network]\nManageForeignRoutingPolicyRules=maybe\n"),
			},
			doctor.Networkd{Routes: true, Rules: true, Source: "the default"},
		},
	} {
		got, err := readNetworkd(tt.files)
		if err != nil || got != tt.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, tt.want)
		}
	}
}

// TestNetworkdIsFound: a process of that name counts in its own network namespace alone, and its files are those that it sees.
func TestNetworkdIsFound(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	p := look{&doctor.Patient{}}
	if err := p.findNetworkd(); err != nil || p.Networkd != nil {
		t.Fatalf("found %+v, %v before there is any", p.Networkd, err)
	}
	write(t, "/run/systemd/networkd.conf.d/99-x.conf", "[Network]\nManageForeignRoutes=no\n")
	start := func(args ...string) int {
		// It says that it runs, and waits until its standard input ends.
		cmd := exec.CommandContext(t.Context(), args[0], append(args[1:], "sh", "-c", `printf systemd-networkd >/proc/$$/comm; echo; read -r x`)...)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = in.Close()
			_ = cmd.Wait()
		})
		if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		return cmd.Process.Pid
	}
	start("unshare", "--net")
	if err := p.findNetworkd(); err != nil || p.Networkd != nil {
		t.Fatalf("found %+v, %v, which is in another namespace", p.Networkd, err)
	}
	pid := start("env")
	if err := p.findNetworkd(); err != nil || p.Networkd == nil || p.Networkd.PID != pid || p.Networkd.Routes {
		t.Errorf("found %+v, %v; want pid %d", p.Networkd, err, pid)
	}
	asNobody(t, "TestNetworkdOfSomebodyElse")
}

// asNobody runs a test of this program where this one runs, as a user who may not look at other users' processes.
func asNobody(t *testing.T, name string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "host-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	bin := dir + "/host.test"
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(bin, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	const nobody = 65534
	cmd := exec.CommandContext(t.Context(), bin, "-test.run=^"+name+"$", "-test.v")
	cmd.Dir, cmd.Env = dir, []string{"TSOAGENT_HOST_NOBODY=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+name) {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestNetworkdOfSomebodyElse runs as nobody: whether the process is in this namespace can't be seen, which is told.
func TestNetworkdOfSomebodyElse(t *testing.T) {
	if os.Getenv("TSOAGENT_HOST_NOBODY") == "" {
		return // TestNetworkdIsFound runs it
	}
	p := look{&doctor.Patient{}}
	if err := p.findNetworkd(); !errors.Is(err, os.ErrPermission) || p.Networkd != nil {
		t.Errorf("found %+v, %v", p.Networkd, err)
	}
}

// unreadable is a file system where nothing may be read.
type unreadable struct{}

func (unreadable) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
}

// TestLegacyTablesAreTold: tables that iptables-legacy has made, and that nobody may say whether there are any.
func TestLegacyTablesAreTold(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	for name, tt := range map[string]struct {
		net  fs.FS
		want []string
	}{
		"no such kernel": {fstest.MapFS{}, nil},
		"none":           {fstest.MapFS{"ip_tables_names": file(""), "ip6_tables_names": file("")}, nil},
		"mangle":         {fstest.MapFS{"ip_tables_names": file("mangle\nfilter\n")}, []string{"rules of iptables-legacy (tables mangle, filter): iptables-legacy-save shows those with TCPMSS"}},
		"not ours to read": {unreadable{}, []string{
			"rules of iptables-legacy: open ip_tables_names: permission denied", "rules of ip6tables-legacy: open ip6_tables_names: permission denied",
		}},
	} {
		p := look{&doctor.Patient{}}
		p.legacyTables(tt.net)
		if d := cmp.Diff(tt.want, p.NotSeen); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

// TestNetworkdThatCannotBeReadIsNotJudged: what its configuration says is not known then, so it is not taken for the default.
func TestNetworkdThatCannotBeReadIsNotJudged(t *testing.T) {
	p := look{&doctor.Patient{}}
	if err := p.readNetworkd(7, unreadable{}); !errors.Is(err, fs.ErrPermission) || p.Networkd != nil {
		t.Errorf("%v, %+v", err, p.Networkd)
	}
	if err := p.readNetworkd(7, fstest.MapFS{}); err != nil || p.Networkd == nil || p.Networkd.PID != 7 || !p.Networkd.Rules {
		t.Errorf("%v, %+v", err, p.Networkd)
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func TestParseModules(t *testing.T) {
	got := parseModules("esp6_offload 12288 - - Live 0x0000000000000000\nesp4 32768 2 esp4_offload, Live 0x0000000000000000\n" +
		"esp4_offload 16384 3 - Live 0x0000000000000000\nx\n")
	if d := cmp.Diff(map[string]doctor.Module{"esp4_offload": {Refs: 3}, "esp6_offload": {Refs: -1}}, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

func TestReadProcess(t *testing.T) {
	p, err := ReadProcess("me", os.Getpid())
	if err != nil || p.PID != os.Getpid() || p.Name != "me" {
		t.Errorf("%+v, %v", p, err)
	}
	if got, err := parseStatus("Name:\tx\nCapEff:\t000000c000001000\n"); err != nil || got != 1<<39|1<<38|1<<12 {
		t.Errorf("%x, %v", got, err)
	}
	if _, err := parseStatus("Name:\tx\n"); err == nil {
		t.Error("a status without capabilities has some")
	}
}
