package xfrmwatch

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"unique"
)

// decodeSA reads a struct xfrm_usersa_info at the start of data; the attributes begin at offset
// attrs.
func decodeSA(data []byte, attrs int) (*SA, error) {
	if len(data) < attrs {
		return nil, errShort
	}
	s := new(SA)
	if err := s.readInfo(data[:sizeSAInfo]); err != nil {
		return nil, err
	}
	if err := attributes(data[attrs:], s.readAttribute); err != nil {
		return nil, err
	}
	s.Key = SAKey{Dst: s.Dst, SPI: s.SPI, Proto: s.Proto, Mark: s.Mark}
	// The state itself is not told; an SA of these protocols without an algorithm can only be
	// one that waits for its key manager.
	bare := s.Enc.Name == "" && s.Auth.Name == "" && s.AEAD.Name == "" && s.Comp.Name == ""
	s.Larval = bare && (s.Proto == ESP || s.Proto == AH || s.Proto == Comp)
	return s, nil
}

func (s *SA) readInfo(b []byte) (err error) {
	s.Family = Family(binary.NativeEndian.Uint16(b[212:]))
	if binary.NativeEndian.Uint16(b[40:]) != 0 { // sel.family
		s.HasSelector = true
		if s.Selector, err = decodeSelector(b[:sizeSelector]); err != nil {
			return err
		}
	}
	if s.Dst, err = address(b[56:], s.Family); err != nil {
		return err
	}
	if s.Src, err = address(b[80:], s.Family); err != nil {
		return err
	}
	s.SPI = SPI(binary.BigEndian.Uint32(b[72:]))
	s.Proto = Proto(b[76])
	s.AddTime = binary.NativeEndian.Uint64(b[176:])
	s.Reqid = Reqid(u32(b[208:]))
	s.Mode, s.Flags = Mode(b[214]), b[216]
	return nil
}

func (s *SA) readAttribute(typ uint16, v []byte) (err error) {
	switch typ {
	case attrAlgCrypt:
		s.Enc, err = decodeAlgorithm(v, false)
	case attrAlgComp:
		s.Comp, err = decodeAlgorithm(v, false)
	case attrAlgAEAD:
		s.AEAD, err = decodeAlgorithm(v, true)
	case attrAlgAuthTrunc:
		s.Auth, err = decodeAlgorithm(v, true)
	case attrAlgAuth:
		// The kernel dumps both forms; the one with the ICV length says more.
		var a Algorithm
		if a, err = decodeAlgorithm(v, false); err == nil && s.Auth.Name == "" {
			s.Auth = a
		}
	case attrEncap:
		if len(v) < 8 {
			return errShort
		}
		s.Encap = Encap{
			Type:  binary.NativeEndian.Uint16(v),
			Sport: binary.BigEndian.Uint16(v[2:]),
			Dport: binary.BigEndian.Uint16(v[4:]),
		}
	case attrMark:
		s.Mark, err = decodeMark(v)
	case attrSetMark:
		s.OutputMark.Value, err = decodeU32(v)
	case attrSetMarkMask:
		s.OutputMark.Mask, err = decodeU32(v)
	case attrIfID:
		s.IfID, err = decodeU32(v)
	case attrExtraFlags:
		s.ExtraFlags, err = decodeU32(v)
	case attrOffloadDev:
		s.OffloadDev, s.OffloadFlags, err = decodeOffload(v)
	case attrSADir:
		if len(v) < 1 {
			return errShort
		}
		s.SADir = v[0]
	case attrSAPCPU:
		var cpu uint32
		cpu, err = decodeU32(v)
		s.CPU = cpu + 1 // UINT_MAX is none
	}
	return err
}

// decodeAlgorithm reads the name of a struct xfrm_algo, xfrm_algo_auth or xfrm_algo_aead, and
// the ICV length of the latter two. The key begins behind that and is not looked at.
func decodeAlgorithm(b []byte, withICV bool) (Algorithm, error) {
	const nameSize = 64 // then alg_key_len, and alg_trunc_len or alg_icv_len, all in bits
	head := nameSize + 4
	if withICV {
		head += 4
	}
	if len(b) < head {
		return Algorithm{}, errShort
	}
	name := b[:nameSize]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	// There are a few names, and as many SAs as tunnels.
	a := Algorithm{Name: unique.Make(strings.ToValidUTF8(string(name), "?")).Value()}
	if withICV {
		bits := u32(b[nameSize+4:])
		if bits > 1<<16 {
			return Algorithm{}, fmt.Errorf("%w: icv of %d bits", errInvalid, bits)
		}
		a.ICVBits = int(bits)
	}
	return a, nil
}

// decodeDelSA reads a struct xfrm_usersa_id; the mark, a part of the SA's identity, follows.
func decodeDelSA(data []byte) (Event, error) {
	if len(data) < sizeSAID {
		return nil, errShort
	}
	dst, err := address(data, Family(binary.NativeEndian.Uint16(data[20:])))
	if err != nil {
		return nil, err
	}
	key := SAKey{Dst: dst, SPI: SPI(binary.BigEndian.Uint32(data[16:])), Proto: Proto(data[22])}
	err = attributes(data[sizeSAID:], func(typ uint16, v []byte) (err error) {
		if typ == attrMark {
			key.Mark, err = decodeMark(v)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return SAGone{key}, nil
}

// decodeExpire reads a struct xfrm_user_expire.
func decodeExpire(data []byte) (Event, error) {
	const size = sizeSAInfo + 8
	s, err := decodeSA(data, size)
	if err != nil {
		return nil, err
	}
	if hard := data[sizeSAInfo] != 0; !hard {
		return SADying{s.Key}, nil
	}
	return SAGone{s.Key}, nil
}
