package agent

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v3"

	"tsoagent/agent/netns"
)

// Namespaces name network namespaces: host, which is the one that the process was started in;
// all, which is host and those in /run/netns; a name there; an absolute path; pid:N.
type Namespaces []string

// UnmarshalYAML reads the scalar all, or a list.
func (n *Namespaces) UnmarshalYAML(node *yaml.Node) error {
	// The form of yaml.TypeError, so that all mistakes of a file are told at once.
	wrong := func(line int, format string, args ...any) error {
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: ", line) + fmt.Sprintf(format, args...)}}
	}
	switch node.Kind {
	case yaml.ScalarNode:
		if node.Value != netns.All {
			return wrong(node.Line, "namespaces: %q is neither %s nor a list such as [%s, %s]", node.Value, netns.All, netns.Host, node.Value)
		}
		*n = Namespaces{netns.All}
		return nil
	case yaml.SequenceNode:
		var list []string
		if err := node.Decode(&list); err != nil {
			return err
		}
		*n = list
		return nil
	}
	return wrong(node.Line, "namespaces: not %s, and not a list", netns.All)
}

// wrong is what Validate says of the names.
func (n Namespaces) wrong() []Wrong {
	var out []Wrong
	for i, spec := range n {
		if err := netns.Check(spec); err != nil {
			out = append(out, Wrong{Key: "namespaces", Text: fmt.Sprintf("entry %d: %v", i+1, err), entry: i + 1})
		}
	}
	return out
}

// all reports whether those in /run/netns are followed.
func (n Namespaces) all() bool { return slices.Contains(n, netns.All) }

// host reports whether the namespace of the process is among them.
func (n Namespaces) host() bool { return n.all() || slices.Contains(n, netns.Host) }

// NamespaceDir is where in a run directory the journals of other namespaces than the host's are,
// each in a directory that is named by the namespace's cookie, which no other namespace gets until the
// next boot (SO_NETNS_COOKIE).
func NamespaceDir(runDir string) string { return filepath.Join(runDir, "netns") }

func cookieDir(runDir string, cookie uint64) string {
	return filepath.Join(NamespaceDir(runDir), strconv.FormatUint(cookie, 10))
}
