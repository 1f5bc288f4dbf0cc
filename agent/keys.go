package agent

import (
	"fmt"
	"net/netip"

	"tsoagent/agent/plan"
	"tsoagent/sockopt"
)

// keyFindings are what a person should know of keys that are not seen.
func (a *Agent) keyFindings(set sockopt.KeysSet) []string {
	var out []string
	if a.sources != nil {
		out = a.sources.missing()
	}
	if set.Hidden > 0 {
		out = append(out, fmt.Sprintf("%d of the sockets hold more TCP-MD5 keys than the kernel can show (655): their peers are not known; "+
			"keys for prefixes (TCP_MD5SIG_EXT), or several listeners, need fewer on each", set.Hidden))
	}
	if set.Cut > 0 {
		out = append(out, fmt.Sprintf("%d of the sockets hold more TCP-AO keys than are listed of one (300): the other peers are not known; "+
			"keys for prefixes, or several listeners, need fewer on each", set.Cut))
	}
	if set.Over {
		out = append(out, fmt.Sprintf("there are more than %d TCP keys of root and of users in tcp_keys_trust: the others are left out; "+
			"keys for prefixes need fewer", sockopt.MaxTrusted))
	}
	if set.OverOthers {
		out = append(out, fmt.Sprintf("there are more than %d TCP keys of users who are not trusted (tcp_keys_trust): the others are left out; "+
			"`ss -tane` shows whose the sockets are", sockopt.MaxOthers))
	}
	_, unknown := a.trust.look()
	return append(out, unknown...)
}

// keysMissing reports whether there is anything that a person should know of keys. Names of users are not looked up for it.
func (a *Agent) keysMissing() bool {
	set := &a.st.keys
	return set.Hidden > 0 || set.Cut > 0 || set.Over || set.OverOthers || a.trust.wrong() || a.sources != nil && len(a.sources.missing()) > 0
}

// explainKeys says whose TCP connections to a destination are signed.
func (a *Agent) explainKeys(e *Explanation, q Question) {
	if q.Proto != 0 && q.Proto != protoTCP {
		return
	}
	for _, v := range a.lastP.Complete().Verdicts {
		k := v.Key
		if k == nil || !k.Peer.Contains(q.Dst) || q.From.IsValid() && k.Local.IsValid() && k.Local != q.From {
			continue
		}
		switch {
		case k.PeerPort != 0 && (q.Port == 0 || q.Port == k.PeerPort):
			e.AddNote(fmt.Sprintf("TCP to port %d there is signed (%s): %s", k.PeerPort, k, signedText(v)))
		case k.PeerPort == 0:
			e.AddNote(fmt.Sprintf("TCP from port %d is signed (%s): %s", k.Port, k, signedText(v)))
		}
	}
}

const protoTCP = 6

// keyName is sockopt.Key.String of the key that a report is about.
func keyName(c *CoverageReport) string {
	k := sockopt.Key{Kind: sockopt.MD5, Port: c.Sport, PeerPort: c.PeerPort}
	if c.Key == sockopt.AO.String() {
		k.Kind = sockopt.AO
	}
	// Both were written by the report; what is no address is any.
	k.Peer, _ = netip.ParsePrefix(c.Dst)
	k.Local, _ = netip.ParseAddr(c.Src)
	return k.String()
}

func signedText(v plan.Verdict) string {
	switch v.Cut {
	case plan.CutLane:
		return "it takes a lane"
	case plan.CutNIC:
		return "TSO is off for it on the NIC, and for everybody else who leaves there"
	}
	return "its segments are cut at the socket"
}
