package xfrmwatch

import (
	"net/netip"

	"pgregory.net/rapid"
)

// Generators draw from small pools, so that values collide, nest and overlap often.

func genAddr(f Family) *rapid.Generator[netip.Addr] {
	return rapid.Custom(func(t *rapid.T) netip.Addr {
		if f == IPv4 {
			return netip.AddrFrom4([4]byte{10, rapid.Byte().Draw(t, "b1") & 3, 0, rapid.Byte().Draw(t, "b3") & 3})
		}
		a := [16]byte{0xfd}
		a[7] = rapid.Byte().Draw(t, "b7") & 3
		a[15] = rapid.Byte().Draw(t, "b15") & 3
		return netip.AddrFrom16(a)
	})
}

func genFamily() *rapid.Generator[Family] { return rapid.SampledFrom([]Family{IPv4, IPv6}) }

func genPrefix(f Family) *rapid.Generator[netip.Prefix] {
	bits := []int{0, 8, 14, 15, 16, 30, 31, 32}
	if f == IPv6 {
		bits = []int{0, 48, 62, 63, 64, 126, 127, 128}
	}
	return rapid.Custom(func(t *rapid.T) netip.Prefix {
		p, _ := genAddr(f).Draw(t, "addr").Prefix(rapid.SampledFrom(bits).Draw(t, "bits"))
		return p
	})
}

func genProto() *rapid.Generator[Proto] { return rapid.SampledFrom([]Proto{0, 6, 17, 1, 50, 135}) }

func genPorts() *rapid.Generator[PortMatch] {
	return rapid.Custom(func(t *rapid.T) PortMatch {
		return PortMatch{
			Port: rapid.Uint16Range(0, 3).Draw(t, "port"),
			Mask: rapid.SampledFrom([]uint16{0, 0, 1, 2, 3, 0xffff}).Draw(t, "mask"),
		}
	})
}

func genSelector(f Family) *rapid.Generator[Selector] {
	return rapid.Custom(func(t *rapid.T) Selector {
		return Selector{
			Family:  f,
			Src:     genPrefix(f).Draw(t, "src"),
			Dst:     genPrefix(f).Draw(t, "dst"),
			Proto:   genProto().Draw(t, "proto"),
			Sport:   genPorts().Draw(t, "sport"),
			Dport:   genPorts().Draw(t, "dport"),
			Ifindex: rapid.Int32Range(0, 1).Draw(t, "ifindex"),
		}
	})
}

func genMark() *rapid.Generator[Mark] {
	return rapid.Custom(func(t *rapid.T) Mark {
		return Mark{rapid.Uint32Range(0, 3).Draw(t, "v"), rapid.Uint32Range(0, 3).Draw(t, "m")}
	})
}

func genFlow(f Family) *rapid.Generator[Flow] {
	return rapid.Custom(func(t *rapid.T) Flow {
		return Flow{
			Src:   genAddr(f).Draw(t, "src"),
			Dst:   genAddr(f).Draw(t, "dst"),
			Proto: rapid.SampledFrom([]Proto{6, 17, 1, 50, 135}).Draw(t, "proto"),
			Sport: rapid.Uint16Range(0, 3).Draw(t, "sport"),
			Dport: rapid.Uint16Range(0, 3).Draw(t, "dport"),
			Mark:  rapid.Uint32Range(0, 3).Draw(t, "mark"),
			IfID:  rapid.Uint32Range(0, 1).Draw(t, "ifid"),
			Oif:   rapid.Int32Range(0, 2).Draw(t, "oif"),
		}
	})
}

func genTemplate(f Family) *rapid.Generator[Template] {
	return rapid.Custom(func(t *rapid.T) Template {
		return Template{
			Dst:      genAddr(f).Draw(t, "dst"),
			Src:      genAddr(f).Draw(t, "src"),
			Family:   f,
			SPI:      SPI(rapid.Uint32().Draw(t, "spi")),
			Proto:    rapid.SampledFrom([]Proto{ESP, AH, Comp}).Draw(t, "proto"),
			Mode:     rapid.SampledFrom([]Mode{Transport, Tunnel, BEET}).Draw(t, "mode"),
			Reqid:    Reqid(rapid.Uint32Range(0, 3).Draw(t, "reqid")),
			Optional: rapid.Bool().Draw(t, "optional"),
		}
	})
}

func genPolicy() *rapid.Generator[*Policy] {
	return rapid.Custom(func(t *rapid.T) *Policy {
		f := genFamily().Draw(t, "family")
		p := &Policy{
			Index:    PolicyIndex(rapid.Uint32Range(1, 24).Draw(t, "index")),
			Dir:      rapid.SampledFrom([]Dir{In, Out, Out, Out, Forward, 4}).Draw(t, "dir"),
			Sub:      rapid.IntRange(0, 7).Draw(t, "sub") == 0,
			Action:   rapid.SampledFrom([]Action{Allow, Allow, Block}).Draw(t, "action"),
			Priority: rapid.Uint32Range(0, 3).Draw(t, "priority"),
			Selector: genSelector(f).Draw(t, "selector"),
			Mark:     genMark().Draw(t, "mark"),
			IfID:     rapid.Uint32Range(0, 1).Draw(t, "ifid"),
			Flags:    rapid.Uint8().Draw(t, "flags"),
		}
		if n := rapid.IntRange(0, 3).Draw(t, "templates"); n > 0 {
			p.Templates = rapid.SliceOfN(genTemplate(f), n, n).Draw(t, "template")
		}
		if rapid.Bool().Draw(t, "offload") {
			p.OffloadDev, p.OffloadFlag = 7, 4
		}
		return p
	})
}

func genSA() *rapid.Generator[*SA] {
	return rapid.Custom(func(t *rapid.T) *SA {
		f := genFamily().Draw(t, "family")
		s := &SA{
			Src:        genAddr(f).Draw(t, "src"),
			Dst:        genAddr(f).Draw(t, "dst"),
			SPI:        SPI(rapid.Uint32Range(0, 3).Draw(t, "spi")),
			Proto:      rapid.SampledFrom([]Proto{ESP, AH, Comp}).Draw(t, "proto"),
			Family:     f,
			Mode:       rapid.SampledFrom([]Mode{Transport, Tunnel, BEET}).Draw(t, "mode"),
			Reqid:      Reqid(rapid.Uint32Range(0, 3).Draw(t, "reqid")),
			Mark:       genMark().Draw(t, "mark"),
			OutputMark: genMark().Draw(t, "output_mark"),
			IfID:       rapid.Uint32Range(0, 1).Draw(t, "ifid"),
			Flags:      rapid.Uint8().Draw(t, "flags"),
			ExtraFlags: rapid.Uint32Range(0, 1).Draw(t, "extra"),
			AddTime:    rapid.Uint64Range(0, 3).Draw(t, "add_time"),
			SADir:      rapid.Uint8Range(0, 2).Draw(t, "dir"),
			CPU:        rapid.Uint32Range(0, 3).Draw(t, "cpu"),
		}
		if rapid.Bool().Draw(t, "has_selector") {
			s.HasSelector, s.Selector = true, genSelector(f).Draw(t, "selector")
		}
		switch rapid.IntRange(0, 4).Draw(t, "kind") {
		case 0:
			s.AEAD = Algorithm{"rfc4106(gcm(aes))", 128}
		case 1:
			s.Enc, s.Auth = Algorithm{Name: "cbc(aes)"}, Algorithm{"hmac(sha256)", 128}
		case 2:
			s.Auth = Algorithm{Name: "hmac(sha1)"}
		case 3:
			s.Comp = Algorithm{Name: "deflate"}
		case 4:
			s.Larval = true
		}
		if rapid.Bool().Draw(t, "encap") {
			s.Encap = Encap{2, 4500, rapid.Uint16().Draw(t, "dport")}
		}
		if rapid.Bool().Draw(t, "offload") {
			s.OffloadDev, s.OffloadFlags = 3, 2
		}
		return s.keyed()
	})
}
