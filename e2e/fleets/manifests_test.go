package fleets

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const kubernetes = "../../packaging/kubernetes/"

// object is what the tests look at of any kind.
type object struct {
	Kind     string
	Metadata struct {
		Name        string
		Annotations map[string]string
	}
	Data map[string]string
	Spec struct {
		Template struct {
			Metadata struct{ Annotations map[string]string }
			Spec     podSpec
		}
		JobLabel            string
		PodMetricsEndpoints []struct{ Port, Path string }
	}
}

type podSpec struct {
	HostNetwork                   bool
	TerminationGracePeriodSeconds int
	Containers                    []container
	Volumes                       []struct {
		Name      string
		ConfigMap struct{ Name string }
		HostPath  struct{ Path, Type string }
	}
}

type container struct {
	Args []string
	Env  []struct {
		Name, Value string
		ValueFrom   struct{ FieldRef struct{ FieldPath string } }
	}
	Ports []struct {
		Name          string
		ContainerPort int
	}
	SecurityContext struct {
		RunAsUser                                                    *int
		Privileged, AllowPrivilegeEscalation, ReadOnlyRootFilesystem *bool
		Capabilities                                                 struct{ Add, Drop []string }
	}
	StartupProbe, LivenessProbe, ReadinessProbe probe
	VolumeMounts                                []struct {
		Name, MountPath, SubPath string
		ReadOnly                 bool
	}
}

type probe struct {
	HTTPGet                                         struct{ Path, Port string }
	PeriodSeconds, TimeoutSeconds, FailureThreshold int
}

// needModules skips the test where what tools/packaging is made of is not in the module cache: there is no way out of the test's network
// namespace.
func needModules(t *testing.T) {
	t.Helper()
	host.Need(t, nil)
	if out, err := exec.Command("go", "-C", "../../tools/packaging", "list", "-deps", "./manifests").CombinedOutput(); err != nil {
		t.Skipf("needs the Go modules of tools/packaging (go -C tools/packaging mod download): %v: %s", err, out)
	}
}

// built are the objects of a directory of packaging/kubernetes, as the API's types have them.
func built(t *testing.T, name string) []object {
	t.Helper()
	needModules(t)
	dir, err := filepath.Abs(kubernetes + name)
	if err != nil {
		t.Fatal(err)
	}
	var errs strings.Builder
	cmd := exec.Command("go", "-C", "../../tools/packaging", "run", "-buildvcs=false", "./manifests", dir)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("manifests %s: %v: %s", name, err, errs.String())
	}
	var all map[string][]object
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatal(err)
	}
	return all[dir]
}

// one is the only object of a kind.
func one(t *testing.T, objects []object, kind string) *object {
	t.Helper()
	i := slices.IndexFunc(objects, func(o object) bool { return o.Kind == kind })
	if i < 0 || slices.ContainsFunc(objects[i+1:], func(o object) bool { return o.Kind == kind }) {
		t.Fatalf("not one %s", kind)
	}
	return &objects[i]
}

// unitCapabilities are those of the systemd unit, as Kubernetes calls them.
func unitCapabilities(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("../../packaging/systemd/tsoagent.service")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(b), "\nCapabilityBoundingSet=")
	line, _, _ = strings.Cut(line, "\n")
	return strings.Fields(strings.ReplaceAll(line, "CAP_", ""))
}

// TestManifestsAreValid builds each overlay offline, and wants in each a DaemonSet that may do what the unit may and no more, and a
// configuration that the agent takes.
func TestManifestsAreValid(t *testing.T) {
	for name, mode := range map[string]string{"base": "enforce", "overlays/observe": "observe", "overlays/annotations": "enforce", "overlays/prometheus-operator": "enforce"} {
		t.Run(name, func(t *testing.T) {
			objects := built(t, name)
			set, config := one(t, objects, "DaemonSet"), one(t, objects, "ConfigMap")
			pod := &set.Spec.Template.Spec
			if !pod.HostNetwork || pod.TerminationGracePeriodSeconds < 90 || len(pod.Containers) != 1 {
				t.Fatalf("the pod is %+v", pod)
			}
			c := &pod.Containers[0]
			s := &c.SecurityContext
			if diff := cmp.Diff(unitCapabilities(t), s.Capabilities.Add); diff != "" || !slices.Equal(s.Capabilities.Drop, []string{"ALL"}) {
				t.Errorf("capabilities, dropped %v (-unit +container)\n%s", s.Capabilities.Drop, diff)
			}
			if s.Privileged == nil || *s.Privileged || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
				s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem || s.RunAsUser == nil || *s.RunAsUser != 0 {
				t.Errorf("the container may do %+v", s)
			}
			if l := c.LivenessProbe; l.TimeoutSeconds < 9 || l.PeriodSeconds*l.FailureThreshold < 60 {
				t.Errorf("a loop that is busy is taken for one that hangs: %+v", l)
			}
			if got := pod.Volumes[0].ConfigMap.Name; got != config.Metadata.Name {
				t.Errorf("the pod has the configuration %s, not %s", got, config.Metadata.Name)
			}
			text := config.Data["tsoagent.yaml"]
			if !strings.Contains(text, "mode: "+mode+"\n") {
				t.Errorf("the configuration is %s", text)
			}
			file := filepath.Join(t.TempDir(), "tsoagent.yaml")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, mustPrograms(t)+"/tsoagent", "check", file)
		})
	}
}

// TestPrometheusFindsThePods by annotations or by the operator's object, on the port that the agent has.
func TestPrometheusFindsThePods(t *testing.T) {
	set := one(t, built(t, "overlays/annotations"), "DaemonSet")
	want := map[string]string{"prometheus.io/scrape": "true", "prometheus.io/port": "15450", "prometheus.io/path": "/metrics"}
	if diff := cmp.Diff(want, set.Spec.Template.Metadata.Annotations); diff != "" || set.Spec.Template.Spec.Containers[0].Ports[0].ContainerPort != 15450 {
		t.Errorf("annotations (-want +got)\n%s", diff)
	}
	monitor := one(t, built(t, "overlays/prometheus-operator"), "PodMonitor")
	if e := monitor.Spec.PodMetricsEndpoints; len(e) != 1 || e[0].Port != "metrics" || e[0].Path != "/metrics" || monitor.Spec.JobLabel != "app.kubernetes.io/name" {
		t.Errorf("the monitor is %+v", monitor.Spec)
	}
}

// TestUnknownFieldsAreFound proves that the check can fail: a manifest with a misspelt field is refused.
func TestUnknownFieldsAreFound(t *testing.T) {
	needModules(t)
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(kubernetes+"base")); err != nil {
		t.Fatal(err)
	}
	file := dir + "/daemonset.yaml"
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(b), "hostNetwork:", "hostNetworks:", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "-C", "../../tools/packaging", "run", "-buildvcs=false", "./manifests", dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), `unknown field "hostNetworks"`) {
		t.Errorf("%v: %s", err, out)
	}
}
