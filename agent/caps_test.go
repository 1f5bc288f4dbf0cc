package agent

import (
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// asNobody runs one test of this binary again, without any privilege, and returns its output.
func asNobody(t *testing.T, test, env string) string {
	t.Helper()
	return child(t, test, env, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
}

func child(t *testing.T, test, env string, attr *syscall.SysProcAttr) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give it up in a child")
	}
	// The binary of `go test` lies in a directory that only root may read.
	dir := runDir(t)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "test")
	if err := errors.Join(os.WriteFile(exe, self, 0o755), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run", "^"+test+"$", "-test.v")
	cmd.Dir, cmd.Env, cmd.SysProcAttr = dir, append(os.Environ(), env), attr
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func TestMissingCapabilityIsNamed(t *testing.T) {
	if os.Getenv("TSO_TEST_CAPS") != "" {
		if checkCapabilities() == nil {
			t.Fatal("the capability is still there") // and the host's namespace is not to be touched
		}
		log := slog.New(slog.DiscardHandler)
		dir := filepath.Join(t.TempDir(), "run")
		_, err := New(Config{RunDir: dir}, log, "test")
		t.Logf("New: %v; ErrPermission %v", err, errors.Is(err, ErrPermission))
		_, err = Look(t.Context(), Config{RunDir: dir}, log, "test", nil)
		t.Logf("Look: %v; ErrPermission %v", err, errors.Is(err, ErrPermission))
		_, err = Restore(t.Context(), Config{RunDir: dir}, log, "test", false)
		t.Logf("Restore: %v; ErrPermission %v", err, errors.Is(err, ErrPermission))
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("something was written: %v", err)
		}
		return
	}
	for name, c := range map[string]struct {
		attr *syscall.SysProcAttr
		want string
	}{
		"not root": {
			&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}},
			"CAP_NET_ADMIN is missing and you are not root: run it as root (sudo)",
		},
		// In a user namespace of its own without a capability: root that a container has cut.
		"root without the capability": {nil, "CAP_NET_ADMIN is missing although you are root"},
	} {
		t.Run(name, func(t *testing.T) {
			var out string
			if c.attr != nil {
				out = child(t, "TestMissingCapabilityIsNamed", "TSO_TEST_CAPS=1", c.attr)
			} else {
				out = withoutNetAdmin(t, "TestMissingCapabilityIsNamed", "TSO_TEST_CAPS=1")
			}
			for _, who := range []string{"New: ", "Look: ", "Restore: "} {
				if !strings.Contains(out, who+c.want) {
					t.Errorf("no %q in:\n%s", who+c.want, out)
				}
			}
			if n := strings.Count(out, "ErrPermission true"); n != 3 {
				t.Errorf("ErrPermission matches %d of 3:\n%s", n, out)
			}
		})
	}
}

// withoutNetAdmin runs a test of this binary as root with CAP_NET_ADMIN dropped from the bounding
// set, by setpriv(1).
func withoutNetAdmin(t *testing.T, test, env string) string {
	t.Helper()
	setpriv, err := exec.LookPath("setpriv")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and setpriv(1), to drop CAP_NET_ADMIN in a child")
	}
	cmd := exec.Command(setpriv, "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--", "/proc/self/exe", "-test.run", "^"+test+"$", "-test.v")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[4] = exe
	cmd.Env = append(os.Environ(), env)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}
