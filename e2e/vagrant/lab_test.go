package vagrant

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// patience is how long anything in the lab may take. Its machines may be emulated, all of them on two processors that have other things to do.
const patience = 5 * time.Minute

// isolatedVariable is set where a libvirt of its own runs (isolated).
const isolatedVariable = "TSOAGENT_VAGRANT_ISOLATED"

// lab is the machines of the Vagrantfile while they are up.
type lab struct {
	t      *testing.T
	config string // that ssh reaches them with
}

// up brings all machines up, and has them destroyed when the test ends. The namespaces of isolated end whatever that leaves.
func up(t *testing.T) *lab {
	t.Helper()
	if os.Getenv(isolatedVariable) == "" {
		t.Skip("Vagrant's machines are left out: make test-vagrant brings them up")
	}
	start := time.Now()
	t.Cleanup(func() {
		start := time.Now()
		if out, err := vagrant(t, 10*time.Minute, "destroy", "--force"); err != nil {
			t.Errorf("vagrant destroy: %v\n%s", err, out)
		}
		if names := strings.Fields(must(t, "virsh", "-q", "list", "--all", "--name")); len(names) != 0 {
			t.Errorf("machines are left after vagrant destroy: %s", names)
		}
		t.Logf("destroyed in %s", time.Since(start).Round(time.Second))
	})
	out, err := vagrant(t, 60*time.Minute, "up")
	if err != nil {
		t.Fatalf("vagrant up: %v\n%s", err, out)
	}
	t.Logf("up in %s", time.Since(start).Round(time.Second))
	config, err := vagrant(t, patience, "ssh-config")
	if err != nil {
		t.Fatalf("vagrant ssh-config: %v\n%s", err, config)
	}
	dir := t.TempDir()
	l := &lab{t: t, config: filepath.Join(dir, "ssh_config")}
	// Opening a connection takes an emulated machine seconds.
	config += "\nHost *\n  ControlMaster auto\n  ControlPersist yes\n  ControlPath " + dir + "/%n\n"
	if err := os.WriteFile(l.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return l
}

// vagrant runs a command of Vagrant's at the Vagrantfile.
func vagrant(t *testing.T, limit time.Duration, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit) // the test's own is over when it is cleaned up
	defer cancel()
	cmd := exec.CommandContext(ctx, "vagrant", args...)
	cmd.Dir = "../.."
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = fmt.Errorf("not within %s: %w", limit, err)
	}
	return string(out), err
}

// must runs a program of this machine.
func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// try runs a shell command as root on a machine.
func (l *lab) try(machine, command string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ssh", "-F", l.config, machine, "sudo sh -c "+quote(command))
	cmd.WaitDelay = 10 * time.Second
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %s: %w\n%s%s", machine, command, err, out.String(), said.String())
	}
	return out.String(), nil
}

// quote makes one word of a shell's of a text.
func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// run is try for what must succeed.
func (l *lab) run(t *testing.T, machine, command string) string {
	t.Helper()
	out, err := l.try(machine, command)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// until runs a command on a machine again and again, until it succeeds and all expressions match what it prints. One with ! ahead of it must not match.
func (l *lab) until(t *testing.T, machine, command string, expressions ...string) string {
	t.Helper()
	var out string
	var err error
	for end := time.Now().Add(patience); ; time.Sleep(500 * time.Millisecond) {
		if out, err = l.try(machine, command); err == nil {
			if err = matches(out, expressions...); err == nil {
				return out
			}
		}
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s: %s: %v\n%s", patience, machine, command, err, out)
		}
	}
}

// matches is an error that names the expressions that a text fails.
func matches(text string, expressions ...string) error {
	var wrong []error
	for _, expression := range expressions {
		pattern, not := strings.CutPrefix(expression, "!")
		if regexp.MustCompile("(?m)"+pattern).MatchString(text) == not {
			wrong = append(wrong, fmt.Errorf("want %s", expression))
		}
	}
	return errors.Join(wrong...)
}

// logs shows what the machines' daemons have said, if the test has failed.
func (l *lab) logs(t *testing.T, machines ...string) {
	if !t.Failed() {
		return
	}
	for _, machine := range machines {
		out, err := l.try(machine, "journalctl -b -o short-monotonic --no-pager -u tsoagent -u strongswan -u bird -u lab-network | tail -n 60; tsoctl events 2>&1 | tail -n 40; ip xfrm policy | head -60")
		t.Logf("%s: %v\n%s", machine, err, out)
	}
}
