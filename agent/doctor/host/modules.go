package host

import (
	"strconv"
	"strings"

	"tsoagent/agent/doctor"
)

// parseModules reads /proc/modules: a line for each module with its name, size, references, who refers to it, state and address. A module that
// can't be unloaded has no references there but "-".
func parseModules(text string) map[string]doctor.Module {
	out := map[string]doctor.Module{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "esp4_offload" && f[0] != "esp6_offload" {
			continue
		}
		refs, err := strconv.Atoi(f[2])
		if err != nil {
			refs = -1
		}
		out[f[0]] = doctor.Module{Refs: refs}
	}
	return out
}
