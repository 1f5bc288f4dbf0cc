package agent

import (
	"errors"
	"fmt"
	"maps"
	"os"

	"tsoagent/agent/plan"
	tsoprobe "tsoagent/agent/probe"
	"tsoagent/routes"
	"tsoagent/xfrmwatch"
)

// readProbed takes over what `tsoctl probe` has found on this very kernel. It is read at the
// start and in each resync, so that the result of a probe that ran meanwhile counts.
func (a *Agent) readProbed() {
	probed, finding := readProbe(a.cfg.StateDir)
	if finding != "" && finding != a.probeFinding {
		a.log.Info("probe", "finding", finding)
	}
	if !maps.Equal(a.probed, probed) {
		a.st.changes.All = true
	}
	a.probed, a.probeFinding = probed, finding
}

// readProbe reads the result of a probe. The finding says why there is none to use, or is empty.
func readProbe(stateDir string) (map[plan.ProbeKey]plan.Probed, string) {
	r, err := tsoprobe.Load(tsoprobe.FileIn(stateDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, "" // nobody has probed: what is dedicated is held
	}
	if err != nil {
		return nil, fmt.Sprintf("the probe's result can't be used: %v", err)
	}
	id, err := tsoprobe.ReadIdentity()
	if err == nil {
		err = r.Valid(id)
	}
	if err != nil {
		return nil, fmt.Sprintf("the probe's result can't be used: %v; run `tsoctl probe` again", err)
	}
	out := make(map[plan.ProbeKey]plan.Probed, len(r.Cases))
	for _, c := range r.Cases {
		k := plan.ProbeKey{Kind: c.Kind, Family: routes.Family(c.Outer), Mode: xfrmwatch.Transport, SA: c.SA}
		if c.Mode == tsoprobe.Tunnel {
			k.Mode = xfrmwatch.Tunnel
		}
		out[k] = plan.Probed{KeepTSO: c.KeepTSO(), BreaksUDP: c.BreaksUDP()}
	}
	return out, ""
}

func (a *Agent) probeFindings() []string {
	if a.probeFinding == "" {
		return nil
	}
	return []string{a.probeFinding}
}
