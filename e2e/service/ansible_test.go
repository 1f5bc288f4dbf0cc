package service

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestAnsible has the playbook install, configure, upgrade and remove, each in a machine as a controller would.
func TestAnsible(t *testing.T) {
	host.Need(t, map[string]string{"ansible-playbook": "ansible-core"})
	if _, err := os.Stat("/usr/lib/python3/dist-packages/apt"); err != nil {
		t.Skipf("needs Debian's package python3-apt (tools/install): %v", err)
	}
	stage, deb := t.TempDir(), formats[0]
	for v, made := range map[string]func() (string, error){version: packages, nextVersion: nextPackages} {
		b, err := os.ReadFile(filepath.Join(mustPackages(t, made), deb.file(v, runtime.GOARCH)))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(stage, v+".deb"), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(stage+"/ansible", os.DirFS("../../packaging/ansible")); err != nil {
		t.Fatal(err)
	}
	m := bootWith(t, stage)
	before := m.network()
	play := func(vars string) (string, error) {
		return m.try("env", "HOME=/root", "ANSIBLE_NOCOLOR=1", "ansible-playbook", "-i", "localhost,", "-c", "local", "/ansible/playbook.yml", "-e", vars)
	}
	// plays wants so many changes, and no failure.
	plays := func(what, vars, changed string) {
		t.Helper()
		out, err := play(vars)
		if err != nil || !strings.Contains(out, " changed="+changed+" ") {
			t.Fatalf("%s: want %s changed: %v\n%s", what, changed, err, out)
		}
	}
	const first = `{"tsoagent_package": "/1.2.3.deb", "tsoagent_config": {"mode": "enforce", "presume_mtu": 1400, "shared_nics": "off"}}`
	plays("the first time", first, "5") // the file, the package, the configuration with its reload, the service
	if got := m.network(); !strings.Contains(got, "mtu lock 1400") || !strings.Contains(got, "tx-tcp-segmentation: off") {
		t.Fatalf("in place:\n%s", got)
	}
	plays("once more", first, "0")
	pid := m.property("MainPID")

	plays("another configuration", strings.ReplaceAll(first, "1400", "1380"), "2")
	m.locked("1380")

	if out, err := play(strings.ReplaceAll(first, "1400", "12")); err == nil || !strings.Contains(out, "presume_mtu: 12 is less than 576") {
		t.Errorf("a wrong configuration: %v\n%s", err, out)
	}
	m.run("grep", "presume_mtu: 1380", "/etc/tsoagent/tsoagent.yaml")

	next := strings.NewReplacer("1.2.3", nextVersion, "1400", "1380").Replace(first)
	plays("an upgrade", next, "2")
	if got := m.property("MainPID") + " " + m.run("readlink", "/proc/"+pid+"/exe"); got != pid+" /usr/sbin/tsoagent" {
		t.Errorf("after the upgrade it is %s", got)
	}

	m.run("tsoctl", "pause")
	if out, err := play(next); err == nil || !strings.Contains(out, "All is as it should be") {
		t.Errorf("a paused agent is passed over: %v\n%s", err, out)
	}
	plays("a paused agent that may be", strings.Replace(next, "{", `{"tsoagent_allow_degraded": true, `, 1), "0")
	m.run("tsoctl", "resume")

	plays("the removal", `{"tsoagent_state": "absent"}`, "1")
	if got := m.network(); got != before {
		t.Errorf("left:\n%s\nwas\n%s", got, before)
	}
}
