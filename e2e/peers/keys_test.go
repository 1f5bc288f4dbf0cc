package peers

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// socket is a TCP socket as ss shows it.
type socket struct {
	state  string
	local  string         // address and port
	remote string         // address and port, * for none
	v6only bool           // of a listener: IPv4 has another
	keys   []netip.Prefix // the peers whose MD5 keys it holds; never the keys
}

var (
	ssLine    = regexp.MustCompile(`^(?:.*?)(LISTEN|ESTAB)\s+\d+\s+\d+\s+(\S+)\s+(\S+)(.*)$`)
	ssKeys    = regexp.MustCompile(`\bmd5keys:(\S*)`)
	ssKeyPeer = regexp.MustCompile(`([0-9a-f.:]+)/(\d+)=`)
)

// sockets returns the listeners and connections of a namespace, sorted, with the program's name if it is not empty. ss prints the keys
// themselves, too: its output never leaves this function.
func (l *lab) sockets(ns, program string) ([]socket, error) {
	out, err := output(l.in(ns, "ss", "-H", "-t", "-a", "-n", "-p", "-i", "-e"))
	if err != nil {
		return nil, err
	}
	var all []socket
	wanted := false
	for line := range strings.Lines(string(out)) {
		// The keys come ahead of everything, as iproute2 6.1 writes them past its own buffer.
		if m := ssLine.FindStringSubmatch(strings.TrimRight(line, "\n")); m != nil {
			wanted = program == "" || strings.Contains(m[4], fmt.Sprintf("((%q,", program))
			if wanted {
				all = append(all, socket{state: m[1], local: m[2], remote: m[3], v6only: strings.Contains(m[4], "v6only:1")})
			}
			continue
		}
		if m := ssKeys.FindStringSubmatch(line); m != nil && wanted {
			for _, k := range ssKeyPeer.FindAllStringSubmatch(m[1], -1) {
				p, err := netip.ParsePrefix(k[1] + "/" + k[2])
				if err != nil {
					return nil, fmt.Errorf("ss shows a key for something that is no prefix")
				}
				last := &all[len(all)-1]
				last.keys = append(last.keys, p)
			}
		}
		if !strings.HasPrefix(line, "\t") {
			wanted = false // another state
		}
	}
	for _, s := range all {
		slices.SortFunc(s.keys, netip.Prefix.Compare)
	}
	slices.SortFunc(all, func(a, b socket) int { return strings.Compare(a.state+a.local+a.remote, b.state+b.local+b.remote) })
	return all, nil
}

// listenerKeys returns the peers whose keys each of a program's listeners for BGP holds, by the listener's address.
func (l *lab) listenerKeys(ns, program string) (map[string][]netip.Prefix, error) {
	all, err := l.sockets(ns, program)
	if err != nil {
		return nil, err
	}
	keys := map[string][]netip.Prefix{}
	for _, s := range all {
		if local, ok := strings.CutSuffix(s.local, ":179"); ok && s.state == "LISTEN" {
			keys[local] = s.keys
		}
	}
	return keys, nil
}
