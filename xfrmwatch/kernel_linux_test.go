package xfrmwatch

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// algorithms are all that the MTU formula knows, with the names that the kernel dumps.
func algorithms() map[string]SA {
	out := map[string]SA{}
	for name := range aeads {
		for _, bits := range []int{64, 96, 128} {
			if bits < 128 && (strings.HasPrefix(name, "rfc4543") || strings.HasPrefix(name, "rfc7539")) {
				continue
			}
			out[fmt.Sprintf("%s/%d", name, bits)] = SA{Proto: ESP, AEAD: Algorithm{name, bits}}
		}
	}
	auths := map[string]Algorithm{"hmac(sha256)/128": {"hmac(sha256)", 128}, "none": {}}
	for name := range authICVBits {
		if keyLengths[name] > 0 || name == "digest_null" {
			auths[name] = Algorithm{Name: name}
		}
	}
	for name := range ciphers {
		if _, canonical := keyLengths[name]; !canonical {
			continue
		}
		for authName, auth := range auths {
			if authName != "none" && authName != "hmac(sha256)/128" && name != "cbc(aes)" && name != "ecb(cipher_null)" {
				continue // all authentications with two ciphers, all ciphers with two authentications
			}
			out[name+"+"+authName] = SA{Proto: ESP, Enc: Algorithm{Name: name}, Auth: auth}
		}
	}
	for name, auth := range auths {
		if name != "none" {
			out["ah+"+name] = SA{Proto: AH, Auth: auth}
		}
	}
	return out
}

// single is a policy with one template, and the SA for it.
func (l *lab) single(alg SA, mode Mode, outerFamily, innerFamily Family) (*Policy, *SA) {
	sa := alg
	sa.Family, sa.Mode, sa.Reqid = outerFamily, mode, 7
	sa.Src, sa.Dst = own[outerFamily], peers[outerFamily]
	t := Template{Family: outerFamily, Proto: sa.Proto, Mode: mode, Reqid: 7, Src: sa.Src, Dst: sa.Dst}
	if mode == Transport {
		sa.Dst = inner[innerFamily]
		t.Src, t.Dst = anySelector(outerFamily).Src.Addr(), anySelector(outerFamily).Dst.Addr()
	}
	l.spi++
	sa.SPI = l.spi
	p := &Policy{Dir: Out, Priority: 10, Selector: anySelector(innerFamily), Templates: []Template{t}}
	p.Selector.Dst = netip.PrefixFrom(inner[innerFamily], inner[innerFamily].BitLen())
	return p, sa.keyed()
}

// TestKernelInnerMTU asks the kernel for every combination that it takes.
func TestKernelInnerMTU(t *testing.T) {
	l := newLab(t, true)
	tried, refused := 0, map[string]string{}
	algs := algorithms()
	for _, mtu := range []int{1500, 1280, 1399, 1401, 1402, 1403, 1492, 9000, 700} {
		l.setMTU(mtu)
		for _, name := range slices.Sorted(maps.Keys(algs)) {
			alg := algs[name]
			if thin := mtu != 1500 && mtu != 1280 && mtu != 1401; thin && alg.Proto == ESP &&
				alg.Auth.Name != "" && alg.Auth.ICVBits == 0 {
				continue // the rarer authentications at three sizes only
			}
			for _, mode := range []Mode{Tunnel, Transport, BEET} {
				for _, families := range [][2]Family{{IPv4, IPv4}, {IPv6, IPv6}, {IPv4, IPv6}, {IPv6, IPv4}} {
					if mode == Transport && families[0] != families[1] || mtu < 1280 && families != [2]Family{IPv4, IPv4} {
						continue
					}
					for _, variant := range []string{"", "nat-t", "esn", "align4", "af-unspec"} {
						if !applies(variant, alg.Proto, mode, mtu) {
							continue
						}
						what := fmt.Sprintf("%s mode %d %d in %d %s", name, mode, families[1], families[0], variant)
						p, sa := l.single(alg, mode, families[0], families[1])
						msg := func() []byte {
							return wireSA(sa, saKeys{testKey(sa.Enc.Name), testKey(sa.Auth.Name), testKey(sa.AEAD.Name)})
						}
						sa.HasSelector, sa.Selector = true, p.Selector
						var extra []byte
						switch variant {
						case "nat-t":
							sa.Encap = Encap{Type: encapESPInUDP, Sport: 4500, Dport: 4500}
						case "esn":
							sa.Flags |= 128
							esn := make([]byte, 28)
							put32(esn, 1)
							put32(esn[20:], 32)
							extra = wireAttr(23, esn) // XFRMA_REPLAY_ESN_VAL
						case "align4":
							sa.Flags |= 64
						case "af-unspec":
							sa.Flags |= 32
							sa.HasSelector, sa.Selector = false, Selector{}
						}
						if err := l.try(msgNewSA, append(msg(), extra...)); err != nil {
							refused[name] = err.Error()
							continue
						}
						l.addPolicy(p)
						l.compare(what, p, 1)
						l.deletePolicy(p, false)
						l.deleteSA(sa)
						l.wait("nothing", func(db *DB) bool { return db.SACount() == 0 && db.PolicyCount() == 0 })
						tried++
					}
				}
			}
		}
	}
	t.Logf("%d combinations agree with the kernel", tried)
	t.Logf("refused by this kernel: %v", refused)
	if tried < 1000 {
		t.Errorf("only %d combinations were tried", tried)
	}
}

// applies leaves out what the kernel has no use for, and thins out the rarer variants.
func applies(variant string, proto Proto, mode Mode, mtu int) bool {
	switch variant {
	case "nat-t":
		return proto == ESP
	case "esn":
		return proto == ESP && mtu == 1500
	case "align4":
		return proto == AH
	case "af-unspec":
		return mode != Transport && (mtu == 1500 || mtu == 1280)
	}
	return true
}

// TestKernelNestedMTU tries random chains of two and three templates.
func TestKernelNestedMTU(t *testing.T) {
	l := newLab(t, true)
	rng := rand.New(rand.NewPCG(1, 2))
	algs := []SA{
		{Proto: ESP, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}},
		{Proto: ESP, Enc: Algorithm{Name: "cbc(aes)"}, Auth: Algorithm{"hmac(sha256)", 128}},
		{Proto: ESP, Enc: Algorithm{Name: "ecb(cipher_null)"}, Auth: Algorithm{"hmac(sha1)", 96}},
		{Proto: AH, Auth: Algorithm{"hmac(sha256)", 128}},
		{Proto: AH, Auth: Algorithm{"hmac(sha1)", 96}},
		{Proto: Comp, Comp: Algorithm{Name: "deflate"}},
	}
	shapes, refused := map[string]int{}, 0
	for round := range 600 {
		if round%60 == 0 {
			l.setMTU([]int{1500, 1400, 1492, 9000, 2000, 1501, 1499, 1502, 1431, 1600}[round/60])
		}
		f := []Family{IPv4, IPv6}[rng.IntN(2)]
		p := &Policy{Dir: Out, Priority: 10, Selector: anySelector(f)}
		p.Selector.Dst = netip.PrefixFrom(inner[f], inner[f].BitLen())
		remote, shape := inner[f], ""
		var sas []*SA
		for i := range 2 + rng.IntN(2) {
			alg := algs[rng.IntN(len(algs))]
			if i == 1 && sas[0].Proto == Comp {
				alg = algs[rng.IntN(len(algs)-1)] // IPComp alone does not cover
			}
			mode := []Mode{Transport, Tunnel}[rng.IntN(2)]
			tm := Template{Proto: alg.Proto, Mode: mode, Reqid: Reqid(i + 1)}
			if mode == Tunnel {
				f = []Family{IPv4, IPv6}[rng.IntN(2)]
				remote = peers[f]
				tm.Src, tm.Dst = own[f], remote
			} else {
				tm.Src, tm.Dst = anySelector(f).Src.Addr(), anySelector(f).Src.Addr()
			}
			tm.Family = f
			p.Templates = append(p.Templates, tm)
			sa := alg
			l.spi++
			if sa.SPI = l.spi; sa.Proto == Comp {
				sa.SPI = 0x100 + l.spi%0x8000
			}
			sa.Src, sa.Dst, sa.Family, sa.Mode, sa.Reqid = own[f], remote, f, mode, tm.Reqid
			sa.HasSelector, sa.Selector = true, p.Selector
			sas = append(sas, sa.keyed())
			shape += fmt.Sprintf("%d/%d ", sa.Proto, sa.Mode)
		}
		added := []*SA{}
		ok := true
		for _, sa := range sas {
			if err := l.trySA(sa); err != nil {
				ok = false
				break
			}
			added = append(added, sa)
		}
		if err := l.try(msgNewPolicy, wirePolicy(p)); err != nil || !ok {
			refused++
			if err == nil {
				l.deletePolicy(p, false)
			}
		} else {
			l.wait("the SAs", func(db *DB) bool {
				for _, sa := range added {
					if _, ok := db.SA(sa.Key); !ok {
						return false
					}
				}
				return true
			})
			l.compare(shape, p, l.count())
			l.deletePolicy(p, false)
			shapes[shape]++
		}
		for _, sa := range added {
			l.deleteSA(sa)
		}
		l.wait("nothing", func(db *DB) bool { return db.PolicyCount() == 0 })
	}
	t.Logf("%d shapes agree with the kernel, %d chains refused", len(shapes), refused)
}

func (l *lab) count() int { l.mu.Lock(); defer l.mu.Unlock(); return l.db.SACount() }
