package probe

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"

	vnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	reqid = 1
	ifID  = 1 // of an xfrmi
)

// keys are those of one direction's SA. They protect nothing, but they are random so that
// nobody can take them for an example.
type keys struct{ enc, auth, aead []byte }

func newKeys(u suite) keys {
	bytes := func(n int) []byte {
		b := make([]byte, n)
		_, _ = rand.Read(b) // never fails
		return b
	}
	return keys{bytes(u.enc.key), bytes(u.auth.key), bytes(u.aead.key)}
}

// addESP adds the SAs of both directions and their policies at end i.
func (l *lab) addESP(i int) error {
	for from := range l.ends {
		for _, sa := range l.sas(from) {
			if err := vnl.XfrmStateAdd(sa); err != nil {
				return l.noSA(fmt.Errorf("SA %s %s %s: %w", l.shape.outer, l.mode, l.suite.name(), err))
			}
		}
	}
	for _, dir := range []vnl.Dir{vnl.XFRM_DIR_OUT, vnl.XFRM_DIR_IN, vnl.XFRM_DIR_FWD} {
		from := i
		if dir != vnl.XFRM_DIR_OUT {
			from = 1 - i
		}
		for _, p := range l.policies(from, dir) {
			if err := vnl.XfrmPolicyAdd(p); err != nil {
				return missing(fmt.Errorf("XFRM policy: %w", err), "XFRM policies (CONFIG_XFRM_USER, module xfrm_user)")
			}
		}
	}
	return nil
}

func (l *lab) xfrmMode() vnl.Mode {
	if l.mode == Tunnel {
		return vnl.XFRM_MODE_TUNNEL
	}
	return vnl.XFRM_MODE_TRANSPORT
}

// sas are the SAs for what end from sends. An SA takes packets of its own outer family only,
// unless it has a selector (copy_from_user_state, net/xfrm/xfrm_user.c), so an xfrmi has one
// for each inner family.
func (l *lab) sas(from int) []*vnl.XfrmState {
	if l.shape.kind != "xfrm" {
		return []*vnl.XfrmState{l.sa(from)}
	}
	var list []*vnl.XfrmState
	for n, f := range l.shape.inner {
		s := l.sa(from)
		s.Ifid = ifID
		s.Spi += len(l.ends) * n
		s.Selector = &vnl.XfrmPolicy{Src: all(f), Dst: all(f)}
		list = append(list, s)
	}
	return list
}

// sa is an SA for what end from sends.
func (l *lab) sa(from int) *vnl.XfrmState {
	src, dst := l.outer(from)
	s := &vnl.XfrmState{
		Src: src, Dst: dst, Proto: vnl.XFRM_PROTO_ESP, Mode: l.xfrmMode(),
		Spi: 0x1001 + from, Reqid: reqid, ReplayWindow: 32,
	}
	u, k := l.suite, l.keys[from]
	if u.aead.name != "" {
		s.Aead = &vnl.XfrmStateAlgo{Name: u.aead.name, Key: k.aead, ICVLen: u.aead.icv}
		return s
	}
	s.Crypt = &vnl.XfrmStateAlgo{Name: u.enc.name, Key: k.enc}
	s.Auth = &vnl.XfrmStateAlgo{Name: u.auth.name, Key: k.auth, TruncateLen: u.auth.icv}
	return s
}

// policies are those for what end from sends: the tunnel's packets to the peer, or all that is
// routed into an xfrmi.
func (l *lab) policies(from int, dir vnl.Dir) []*vnl.XfrmPolicy {
	src, dst := l.outer(from)
	tmpl := vnl.XfrmPolicyTmpl{Src: src, Dst: dst, Proto: vnl.XFRM_PROTO_ESP, Mode: l.xfrmMode(), Reqid: reqid}
	if l.shape.kind != "xfrm" {
		return []*vnl.XfrmPolicy{{
			Src: host(src), Dst: host(dst), Proto: vnl.Proto(l.shape.proto), Dir: dir, Tmpls: []vnl.XfrmPolicyTmpl{tmpl},
		}}
	}
	var list []*vnl.XfrmPolicy
	for _, f := range l.shape.inner {
		list = append(list, &vnl.XfrmPolicy{Src: all(f), Dst: all(f), Dir: dir, Ifid: ifID, Tmpls: []vnl.XfrmPolicyTmpl{tmpl}})
	}
	return list
}

func host(ip net.IP) *net.IPNet {
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))}
}

func all(f Family) *net.IPNet {
	n := len(innerAddrs[f][0].Addr().AsSlice())
	return &net.IPNet{IP: make(net.IP, n), Mask: net.CIDRMask(0, 8*n)}
}

// espModules are the modules of ESP and the options that they are compiled with.
var espModules = map[Family]struct{ module, option string }{
	IPv4: {"esp4", "CONFIG_INET_ESP"},
	IPv6: {"esp6", "CONFIG_INET6_ESP"},
}

// noSA tells why an SA could not be made.
func (l *lab) noSA(err error) error {
	m := espModules[l.shape.outer]
	noESP := fmt.Sprintf("no ESP for %s (%s, module %s)", l.shape.outer, m.option, m.module)
	noCipher := fmt.Sprintf("no cipher %s", l.suite.name())
	switch {
	case errors.Is(err, unix.EPROTONOSUPPORT):
		return &impossibleError{"this kernel has " + noESP, err}
	case !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.ENOENT):
		return err
	case l.kernel.Modules[m.module] == Absent:
		// The kernel looks for the cipher first (xfrm_state_construct), and says no more.
		return &impossibleError{"this kernel has " + noESP + " and " + noCipher, err}
	}
	return &impossibleError{"this kernel has " + noCipher, err}
}

// missing makes err an *impossibleError if it is the kernel's way to say that it lacks what is
// named: it does not know the kind of device, or the socket.
func missing(err error, what string) error {
	for _, errno := range []error{unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT} {
		if errors.Is(err, errno) {
			return &impossibleError{"this kernel has no " + what, err}
		}
	}
	return err
}
