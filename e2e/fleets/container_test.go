package fleets

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"tsoagent/e2e/harness"
)

// image makes the root of the container as the Containerfile says it, and returns the entry point.
func image(t *testing.T, root string) string {
	t.Helper()
	b, err := os.ReadFile("../../packaging/container/Containerfile")
	if err != nil {
		t.Fatal(err)
	}
	context := map[string]string{"LICENSE": "../../LICENSE"}
	entry := ""
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || strings.HasPrefix(line, "#") || f[0] == "ENV" || f[0] == "CMD":
		case f[0] == "FROM" && slices.Equal(f[1:], []string{"scratch"}):
		case f[0] == "COPY" && len(f) == 3:
			from := context[f[1]]
			if from == "" {
				from = filepath.Join(mustPrograms(t), f[1])
			}
			run(t, "install", "-D", "-m", "755", from, root+f[2])
		case f[0] == "WORKDIR" && len(f) == 2:
			run(t, "install", "-d", "-m", "755", root+f[1])
		case f[0] == "ENTRYPOINT" && len(f) == 2:
			entry = strings.Trim(f[1], `[]"`)
		default:
			t.Fatalf("this test doesn't know %q", line)
		}
	}
	return entry
}

// start runs the DaemonSet's container, with its arguments, environment, mounts and capabilities, until the test ends.
func start(t *testing.T, address string) *harness.Log {
	t.Helper()
	host.Need(t, map[string]string{"ip": "iproute2", "capsh": "libcap2-bin", "unshare": "util-linux"})
	objects := built(t, "base")
	pod := one(t, objects, "DaemonSet").Spec.Template.Spec
	c := pod.Containers[0]
	node := t.TempDir() // what the node has
	root := filepath.Join(node, "root")
	entry := image(t, root)
	script := "set -eu\nmount --make-rprivate /\nmount --bind \"$1\" \"$1\"\n"
	for _, m := range c.VolumeMounts {
		from := filepath.Join(node, m.Name)
		if m.SubPath != "" { // what the volume has under that name
			text := one(t, objects, "ConfigMap").Data[m.SubPath] + "presume_mtu: 1400\nshared_nics: off\n"
			if err := os.WriteFile(from, []byte(text), 0o444); err != nil {
				t.Fatal(err)
			}
			run(t, "touch", root+m.MountPath) // which runtimes do
		} else if err := os.Mkdir(from, 0o755); err != nil {
			t.Fatal(err)
		}
		script += fmt.Sprintf("mount --bind %q \"$1%s\"\n", from, m.MountPath)
	}
	for _, dir := range []string{"proc", "sys"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script += `mount -t proc proc "$1/proc"
mount -t sysfs -o ro sysfs "$1/sys"
mount -o remount,bind,ro "$1"
root=$1 drop=$2 entry=$3
shift 3
exec capsh --drop="$drop" --no-new-privs --chroot="$root" --shell="$entry" -- "$@"`
	cmd := exec.Command("unshare", slices.Concat([]string{"--mount", "sh", "-c", script, "sh", root, dropped(t, c.SecurityContext.Capabilities.Add), entry}, c.Args)...)
	fields := map[string]string{"status.hostIP": address}
	values := []string{}
	for _, e := range c.Env {
		value := e.Value
		if field := e.ValueFrom.FieldRef.FieldPath; field != "" {
			value = fields[field]
			values = append(values, "$("+e.Name+")", value)
		}
		cmd.Env = append(cmd.Env, e.Name+"="+strings.NewReplacer(values...).Replace(value))
	}
	said := new(harness.Log)
	cmd.Env = append(cmd.Env, "PATH="+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the container: %v", err)
		}
		if t.Failed() {
			t.Logf("the container:\n%s", said)
		}
	})
	within(t, "the startup probe", func() bool { return get(address, c.StartupProbe.HTTPGet.Path) == "200 ready\n" })
	if got := get(address, c.LivenessProbe.HTTPGet.Path); got != "200 healthy\n" {
		t.Errorf("the liveness probe: %s", got)
	}
	if got := get(address, c.ReadinessProbe.HTTPGet.Path); got != "200 ready\n" {
		t.Errorf("the readiness probe: %s", got)
	}
	return said
}

// dropped are the numbers of all capabilities but some.
func dropped(t *testing.T, kept []string) string {
	t.Helper()
	numbers := map[string]int{"NET_ADMIN": 12, "PERFMON": 38, "BPF": 39} // linux/capability.h
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		t.Fatal(err)
	}
	last, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for n := range last + 1 {
		if !slices.ContainsFunc(kept, func(name string) bool { return numbers[name] == n }) {
			out = append(out, strconv.Itoa(n))
		}
	}
	return strings.Join(out, ",")
}

// get is the status and the text of a page, or why there is none.
func get(address, path string) string {
	if strings.Contains(address, ":") {
		address = "[" + address + "]"
	}
	res, err := http.Get("http://" + address + ":15450" + path)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d %s", res.StatusCode, b)
}

// node is the network of one: a device with default routes and two policies, until the test ends.
func node(t *testing.T) {
	t.Helper()
	host.Need(t, map[string]string{"ip": "iproute2", "ethtool": "ethtool"})
	for line := range strings.Lines(`link add n0 type veth peer name n1
link set n0 up
link set n1 up
addr add 192.0.2.1/24 dev n0
addr add 2001:db8::1/64 dev n0 nodad
route add default via 192.0.2.254
-6 route add default via 2001:db8::fe
xfrm policy add src 192.0.2.0/24 dst 10.3.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel
xfrm policy add src 2001:db8::/64 dst 2001:db8:3::/48 dir out tmpl src 2001:db8::1 dst 2001:db8::2 proto esp reqid 1 mode tunnel`) {
		run(t, append([]string{"ip"}, strings.Fields(line)...)...)
	}
	t.Cleanup(func() { run(t, "ip", "link", "del", "n0"); run(t, "ip", "xfrm", "policy", "flush") })
}

// TestContainerDoesItsWork runs the container of the DaemonSet from an empty, read-only root, with nothing but its capabilities, and its
// node called by either family.
func TestContainerDoesItsWork(t *testing.T) {
	for _, address := range []string{"192.0.2.1", "2001:db8::1"} {
		t.Run(address, func(t *testing.T) {
			node(t)
			features := run(t, "ethtool", "-k", "n0")
			t.Cleanup(func() { // after it has stopped
				if rules := run(t, "ip", "rule") + run(t, "ip", "-6", "rule"); strings.Contains(rules, "5450") || run(t, "ethtool", "-k", "n0") != features {
					t.Errorf("stopped, and still there:\n%s", rules)
				}
			})
			said := start(t, address)
			for _, table := range []string{run(t, "ip", "route", "show", "table", "5450"), run(t, "ip", "-6", "route", "show", "table", "5450")} {
				if !strings.Contains(table, "mtu lock 1400") {
					t.Errorf("in place: %s", table)
				}
			}
			if got := run(t, "ethtool", "-k", "n0"); !strings.Contains(got, "tx-tcp-segmentation: off") {
				t.Error("nothing is held off")
			}
			if got := get(address, "/metrics"); !strings.Contains(got, `tsoagent_enforcing{netns="host"} 1`) {
				t.Errorf("metrics: %.300s", got)
			}
			if strings.Contains(said.String(), `"level":"ERROR"`) || strings.Contains(said.String(), "read-only") {
				t.Errorf("it says\n%s", said)
			}
		})
	}
}
