package vagrant

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tsoagent/e2e/harness"
)

const vagrantfile = "../../Vagrantfile"

// TestVagrantfileIsValid has Vagrant judge the Vagrantfile, in a home of its own.
func TestVagrantfileIsValid(t *testing.T) {
	harness.NeedPrograms(t, map[string]string{"vagrant": "vagrant, for which tools/install vagrant"})
	for _, test := range []struct {
		name string
		env  []string
		args []string
		ok   bool
	}{
		{"emulated", []string{"VAGRANT_DEFAULT_PROVIDER=libvirt", "TSOAGENT_VAGRANT_DRIVER=qemu", "TSOAGENT_VAGRANT_NETWORK=none", "TSOAGENT_VAGRANT_BOX=tsoagent/lab"}, nil, true},
		// VirtualBox needn't be here for its settings to be read.
		{"virtualbox", []string{"VAGRANT_DEFAULT_PROVIDER=virtualbox"}, []string{"--ignore-provider"}, true},
		{"no number", []string{"VAGRANT_DEFAULT_PROVIDER=libvirt", "TSOAGENT_VAGRANT_MEMORY=much"}, nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			home := t.TempDir()
			cmd := exec.Command("vagrant", append([]string{"validate"}, test.args...)...)
			cmd.Dir = filepath.Dir(vagrantfile)
			cmd.Env = append(os.Environ(), "HOME="+home, "VAGRANT_HOME="+home, "VAGRANT_DOTFILE_PATH="+home, "VAGRANT_CHECKPOINT_DISABLE=1")
			cmd.Env = append(cmd.Env, test.env...)
			if out, err := cmd.CombinedOutput(); (err == nil) != test.ok {
				t.Errorf("vagrant validate: %v\n%s", err, out)
			}
		})
	}
}

// TestRoutersConfigurationsAreRead has BIRD read each of the lab's configurations of its own.
func TestRoutersConfigurationsAreRead(t *testing.T) {
	bird, err := exec.LookPath("bird")
	if err != nil {
		bird = "/usr/sbin/bird"
		if _, err := os.Stat(bird); err != nil {
			t.Skip("needs bird, which Debian's package bird2 has (tools/install)")
		}
	}
	for _, machine := range []string{"left", "right", "router"} {
		if out, err := exec.Command(bird, "-p", "-c", "lab/"+machine+"/etc/bird/bird.conf").CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", machine, err, out)
		}
	}
}

// TestScriptsAreRead has a shell read each script.
func TestScriptsAreRead(t *testing.T) {
	for shell, scripts := range map[string][]string{
		"bash": {"box", "isolated", "provision", "../../tools/test-vagrant"},
		"sh":   {"lab/common/usr/local/sbin/lab-network", "lab/left/etc/lab/routes", "lab/right/etc/lab/routes", "lab/left-client/etc/lab/routes", "lab/right-client/etc/lab/routes"},
	} {
		for _, script := range scripts {
			if out, err := exec.Command(shell, "-n", script).CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", script, err, out)
			}
		}
	}
}

// TestGatewaysMirrorEachOther compares the gateways' configurations of the tunnel: what is local here is remote there, and left opens it.
func TestGatewaysMirrorEachOther(t *testing.T) {
	left, right := read(t, "lab/left/etc/swanctl/conf.d/lab.conf"), read(t, "lab/right/etc/swanctl/conf.d/lab.conf")
	opens := regexp.MustCompile(`(?m)^\s*(start_action|close_action|dpd_action) = .*\n`)
	if n := len(opens.FindAllString(left, -1)); n != 4*3 {
		t.Errorf("left has %d settings for opening tunnels, want 3 for each of its 4 pairs of policies", n)
	}
	mirror := strings.NewReplacer("local_", "remote_", "remote_", "local_", "local {", "remote {", "remote {", "local {", "id = left", "id = right", "id = right", "id = left")
	sorted := func(text string) string {
		lines := strings.Split(text, "\n")
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	}
	// id-left and id-right are the names of the secret's owners, in both alike.
	keep := strings.NewReplacer("id-left = left", "id-left = A", "id-right = right", "id-right = B")
	if diff := cmp.Diff(sorted(mirror.Replace(keep.Replace(opens.ReplaceAllString(left, "")))), sorted(keep.Replace(right))); diff != "" {
		t.Errorf("left, mirrored, and right (-left +right):\n%s", diff)
	}
}

// TestAddressesAreOfTheLab finds each address in the machines' files among those that the Vagrantfile gives them, or in the services' networks.
func TestAddressesAreOfTheLab(t *testing.T) {
	known := []netip.Prefix{netip.MustParsePrefix("10.11.0.10/24"), netip.MustParsePrefix("10.12.0.10/24"), netip.MustParsePrefix("fd00:11::10/64"), netip.MustParsePrefix("fd00:12::10/64")}
	for _, card := range regexp.MustCompile(`" => %w\[(.+?) (.+?)\]`).FindAllStringSubmatch(read(t, vagrantfile), -1) {
		known = append(known, netip.MustParsePrefix(card[1]), netip.MustParsePrefix(card[2]))
	}
	if len(known) != 4+2*8 {
		t.Fatalf("the Vagrantfile has %d addresses, want two for each of eight cards", len(known)-4)
	}
	for _, file := range files(t) {
		for _, text := range address.FindAllString(read(t, file), -1) {
			a, err := netip.ParseAddr(text)
			if err != nil {
				prefix, err := netip.ParsePrefix(text)
				if err != nil {
					continue // no address
				}
				a = prefix.Addr()
			}
			if !slices.ContainsFunc(known, func(k netip.Prefix) bool { return k.Addr() == a || k.Masked().Addr() == a }) {
				t.Errorf("%s has %s, which is nobody's", file, text)
			}
		}
	}
}

// address is anything that could be one.
var address = regexp.MustCompile(`\b(?:\d+\.\d+\.\d+\.\d+|[0-9a-f]+:[0-9a-f:]*:[0-9a-f]*)(?:/\d+)?`)

// TestVariablesAreDocumented compares the variables that are read with those of the page.
func TestVariablesAreDocumented(t *testing.T) {
	text := read(t, vagrantfile)
	page := read(t, "../../docs/vagrant.md")
	var used []string
	for _, found := range regexp.MustCompile(`setting\("(\w+)"`).FindAllStringSubmatch(text, -1) {
		used = append(used, "TSOAGENT_VAGRANT_"+found[1])
	}
	slices.Sort(used)
	used = slices.Compact(used)
	for _, where := range []struct {
		name, text string
		row        *regexp.Regexp
	}{
		{"the Vagrantfile's head", text, regexp.MustCompile(`(?m)^#   (TSOAGENT_VAGRANT_\w+) `)},
		{"docs/vagrant.md", page, regexp.MustCompile("(?m)^\\| `(TSOAGENT_VAGRANT_\\w+)` ")},
	} {
		var named []string
		for _, found := range where.row.FindAllStringSubmatch(where.text, -1) {
			named = append(named, found[1])
		}
		slices.Sort(named)
		if diff := cmp.Diff(used, named); diff != "" {
			t.Errorf("variables in use and in %s (-use +named):\n%s", where.name, diff)
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// files are all of the machines' files.
func files(t *testing.T) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir("lab", func(path string, entry os.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			all = append(all, path)
		}
		return err
	})
	if err != nil || len(all) == 0 {
		t.Fatalf("no files of the lab: %v", err)
	}
	return all
}
