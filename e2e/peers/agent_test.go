package peers

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// startAgent starts an agent and waits until it answers. No password may be in what it says until it ends.
func (l *lab) startAgent(ns string) *agent {
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
	a.process = l.start(ns, a.run, filepath.Join(dir, "tsoagent"), "run", "--run-dir", a.run)
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
	Listener  string `json:"listener"`
	Keys      int    `json:"md5_keys"`
	Lost      int    `json:"lost"`
	Signed    int    `json:"signed"`
	Processes []struct {
		PID  int    `json:"pid"`
		Name string `json:"name"`
	} `json:"processes"`
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

// checkup is `tsoctl doctor -o json`.
type checkup struct {
	Findings []struct {
		Code string `json:"code"`
		Text string `json:"text"`
		Do   string `json:"do"`
	} `json:"findings"`
}
