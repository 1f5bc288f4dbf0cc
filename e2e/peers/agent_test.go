package peers

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-cmp/cmp"
)

// agent is a tsoagent that runs in a namespace, and its tsoctl.
type agent struct {
	lab      *lab
	ns       string
	commands string // the directory of both
	run      string
	process  *process
}

// exitDegraded is what tsoctl says if there is a finding.
const exitDegraded = 3

// startAgent starts an agent with more lines of a configuration and waits until it answers. No password may be in what it says until it ends.
func (l *lab) startAgent(ns string, more ...string) *agent {
	l.t.Helper()
	dir, err := commands()
	if err != nil {
		l.t.Fatal(err)
	}
	a := &agent{lab: l, ns: ns, commands: dir, run: l.t.TempDir()}
	l.t.Cleanup(func() {
		text, err := os.ReadFile(a.process.log)
		if err != nil {
			l.t.Error(err)
		}
		l.keepsSecrets("the agent's log", text)
	})
	// Without BPF's hook keys are looked for now and then; the tests don't wait ten seconds each time.
	config := filepath.Join(a.run, "tsoagent.yaml")
	if err := os.WriteFile(config, []byte("tcp_keys_every: 500ms\n"+strings.Join(more, "\n")), 0o644); err != nil {
		l.t.Fatal(err)
	}
	a.process = l.start(ns, a.run, filepath.Join(dir, "tsoagent"), "run", "--config", config, "--run-dir", a.run)
	l.t.Cleanup(a.keepsSecretsInMemory) // ahead of its end
	l.eventually("the agent answers", func() error { _, err := a.tsoctl("status"); return err })
	return a
}

// keepsSecrets fails the test if a password is in the text.
func (l *lab) keepsSecrets(what string, text []byte) {
	l.t.Helper()
	for _, p := range l.secrets {
		for _, form := range []string{p, fmt.Sprintf("%x", p)} {
			if strings.Contains(strings.ToLower(string(text)), strings.ToLower(form)) {
				l.t.Errorf("a password is in %s", what)
			}
		}
	}
}

// tsoctl asks the agent. Its exit code is an error but for exitDegraded.
func (a *agent) tsoctl(args ...string) ([]byte, error) {
	cmd := a.lab.in(a.ns, append([]string{filepath.Join(a.commands, "tsoctl"), "--run-dir", a.run}, args...)...)
	out, err := output(cmd)
	a.lab.keepsSecrets("tsoctl "+strings.Join(args, " "), out)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == exitDegraded {
		err = nil
	}
	return out, err
}

// ask decodes what tsoctl says as JSON into answer.
func (a *agent) ask(answer any, args ...string) error {
	out, err := a.tsoctl(append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, answer); err != nil {
		return fmt.Errorf("tsoctl %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// flow is what these tests look at of a flow in `tsoctl flows -o json`.
type flow struct {
	Local         string `json:"local"`
	Remote        string `json:"remote"`
	Coverage      string `json:"coverage"`
	Segmentation  string `json:"segmentation"`
	Lost          bool   `json:"lost"`
	Contradiction string `json:"contradiction"`
	Listener      string `json:"listener"`
}

// collateral is a listener whose connections have lost offload.
type collateral struct {
	Listener  string  `json:"listener"`
	Keys      int     `json:"md5_keys"`
	Lost      int     `json:"lost"`
	Signed    int     `json:"signed"`
	Processes []owner `json:"processes"`
}

// owner is a process that has a socket open.
type owner struct {
	PID  int    `json:"pid"`
	Name string `json:"name"`
}

// flows is `tsoctl flows -o json`.
type flows struct {
	Live    bool   `json:"live"`
	Flows   []flow `json:"flows"`
	Summary struct {
		Connections int `json:"connections"`
		Key         int `json:"key"`
		Lost        int `json:"lost"`
	} `json:"summary"`
	Collateral []collateral `json:"collateral"`
	Notes      []string     `json:"notes"`
}

// plan is what these tests look at of `tsoctl plan -o json`.
type plan struct {
	Coverages []coverage `json:"coverages"`
}

// coverage is what a key covers, of which nothing is kept but whom it is for.
type coverage struct {
	Key      string `json:"key"`
	Src      string `json:"src"`
	Dst      string `json:"dst"`
	Sport    int    `json:"sport"`
	PeerPort int    `json:"peer_port"`
	Listener bool   `json:"listener"`
	Cut      string `json:"cut"`
}

// verdict is what is said of a key.
type verdict struct {
	Key   string   `json:"key"`
	Dst   string   `json:"dst"`
	Cut   string   `json:"cut"`
	UID   *int     `json:"uid"`
	Notes []string `json:"notes"`
}

// awaitListenerKeys waits until the agent knows exactly these keys of listeners on BGP's port, each once, and that their segments are cut
// at the socket.
func (a *agent) awaitListenerKeys(what string, peers ...netip.Prefix) {
	a.lab.t.Helper()
	want := map[coverage]int{}
	for _, p := range peers {
		want[coverage{Key: "tcp-md5", Dst: p.String(), Sport: 179, Listener: true, Cut: "socket"}] = 1
	}
	a.lab.eventually(what, func() error {
		var got plan
		if err := a.ask(&got, "plan"); err != nil {
			return err
		}
		have := map[coverage]int{}
		for _, c := range got.Coverages {
			if c.Listener {
				have[c]++
			}
		}
		if diff := cmp.Diff(want, have); diff != "" {
			return errors.New("keys of listeners (-want +got):\n" + diff)
		}
		return nil
	})
}

// checkup is `tsoctl doctor -o json`.
type checkup struct {
	Findings []struct {
		Code string `json:"code"`
		Text string `json:"text"`
		Do   string `json:"do"`
	} `json:"findings"`
}
