package host

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"tsoagent/agent/doctor"
)

// google/nftables can't read a rule with `rt mtu` ("not yet implemented"), so rules are decoded here, and nothing of them but what sets an MSS.

// nftChain is a chain by its table.
type nftChain struct{ family, table, name string }

var nftFamilies = map[uint8]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6"}

// nftHooks are those of the three families, by their numbers (NF_INET_*, linux/netfilter.h).
var nftHooks = []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"}

// The message's head is a struct nfgenmsg: family, version, and a resource.
const nfgenmsgLen = 4

// kindMaxSeg is TCPOPT_MSS, and opTCPOption NFT_EXTHDR_OP_TCPOPT.
const (
	kindMaxSeg  = 2
	opTCPOption = 1
)

// parseChain reads an NFT_MSG_NEWCHAIN. ok is false for a family that has no MSS. The hook is empty for a chain that others jump to.
func parseChain(data []byte) (chain nftChain, hook string, ok bool, err error) {
	ad, family, err := nftAttributes(data)
	if err != nil || family == "" {
		return chain, "", false, err
	}
	chain.family = family
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_CHAIN_TABLE:
			chain.table = text(ad.Bytes())
		case unix.NFTA_CHAIN_NAME:
			chain.name = text(ad.Bytes())
		case unix.NFTA_CHAIN_HOOK:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() == unix.NFTA_HOOK_HOOKNUM {
						n := ad.Uint32()
						hook = fmt.Sprintf("hook %d", n)
						if int(n) < len(nftHooks) {
							hook = nftHooks[n]
						}
					}
				}
				return nil
			})
		}
	}
	return chain, hook, true, ad.Err()
}

// parseRule reads an NFT_MSG_NEWRULE. ok is false for one that sets no MSS.
func parseRule(data []byte) (c doctor.Clamp, ok bool, err error) {
	ad, family, err := nftAttributes(data)
	if err != nil || family == "" {
		return c, false, err
	}
	c.Family = family
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_RULE_TABLE:
			c.Table = text(ad.Bytes())
		case unix.NFTA_RULE_CHAIN:
			c.Chain = text(ad.Bytes())
		case unix.NFTA_RULE_HANDLE:
			c.Handle = ad.Uint64()
		case unix.NFTA_RULE_EXPRESSIONS:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				var sets sets
				for ad.Next() {
					ad.Nested(sets.expression)
				}
				c.MSS, c.Iptables, ok = sets.mss, sets.iptables, sets.ok
				return nil
			})
		}
	}
	return c, ok, ad.Err()
}

func nftAttributes(data []byte) (*netlink.AttributeDecoder, string, error) {
	if len(data) < nfgenmsgLen {
		return nil, "", fmt.Errorf("a message of %d bytes is too short", len(data))
	}
	ad, err := netlink.NewAttributeDecoder(data[nfgenmsgLen:])
	if err != nil {
		return nil, "", err
	}
	ad.ByteOrder = binary.BigEndian
	return ad, nftFamilies[data[0]], nil
}

// sets is what the expressions of a rule set the MSS to.
type sets struct {
	mss      int
	iptables bool
	ok       bool
	// last is what the register holds that the next expression may write into the option.
	last int
}

// expression reads one expression: its name, and its data.
func (s *sets) expression(ad *netlink.AttributeDecoder) error {
	name := ""
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_EXPR_NAME:
			name = text(ad.Bytes())
		case unix.NFTA_EXPR_DATA:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				switch name {
				case "rt":
					s.rt(ad)
				case "immediate":
					s.immediate(ad)
				case "exthdr":
					s.exthdr(ad)
				case "target":
					s.target(ad)
				case "lookup", "map", "numgen", "hash": // byteorder, which follows rt, only turns it around
					s.last = doctor.UnknownMSS
				}
				return nil
			})
		}
	}
	return nil
}

func (s *sets) rt(ad *netlink.AttributeDecoder) {
	for ad.Next() {
		if ad.Type() == unix.NFTA_RT_KEY && ad.Uint32() == unix.NFT_RT_TCPMSS {
			s.last = 0
		}
	}
}

func (s *sets) immediate(ad *netlink.AttributeDecoder) {
	for ad.Next() {
		if ad.Type() != unix.NFTA_IMMEDIATE_DATA {
			continue
		}
		ad.Nested(func(ad *netlink.AttributeDecoder) error {
			for ad.Next() {
				if b := ad.Bytes(); ad.Type() == unix.NFTA_DATA_VALUE && len(b) >= 2 {
					s.last = int(binary.BigEndian.Uint16(b))
				}
			}
			return nil
		})
	}
}

// exthdr writes an option if it has a source register (NFTA_EXTHDR_SREG); else it reads one.
func (s *sets) exthdr(ad *netlink.AttributeDecoder) {
	var kind uint8
	var op uint32
	writes := false
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_EXTHDR_TYPE:
			kind = ad.Uint8()
		case unix.NFTA_EXTHDR_OP:
			op = ad.Uint32()
		case unix.NFTA_EXTHDR_SREG:
			writes = true
		}
	}
	if writes && kind == kindMaxSeg && op == opTCPOption {
		s.mss, s.ok = s.last, true
	}
}

// target is a target of iptables: struct xt_tcpmss_info has the MSS in host byte order, and XT_TCPMSS_CLAMP_PMTU for the path MTU.
func (s *sets) target(ad *netlink.AttributeDecoder) {
	const clampPMTU = 0xffff
	name := ""
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_TARGET_NAME:
			name = text(ad.Bytes())
		case unix.NFTA_TARGET_INFO:
			if b := ad.Bytes(); name == "TCPMSS" && len(b) >= 2 {
				s.mss, s.iptables, s.ok = int(binary.NativeEndian.Uint16(b)), true, true
				if s.mss == clampPMTU {
					s.mss = 0
				}
			}
		}
	}
}

func text(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
