package service

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReloadMovesTheMetrics has another address take effect at SIGHUP, and a wrong file none of its keys.
func TestReloadMovesTheMetrics(t *testing.T) {
	host.Need(t, map[string]string{"ip": "iproute2"})
	network(t)
	cover(t, "10.3.0.0/16")
	file := filepath.Join(t.TempDir(), "tsoagent.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("metrics: 127.0.0.1:15450\n")
	a := run(t, "--config", file)
	hup := func() {
		t.Helper()
		if err := a.process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	answers := func(address, want string) func() bool {
		return func() bool {
			res, err := http.Get("http://" + address + "/metrics")
			if err != nil {
				return false
			}
			_ = res.Body.Close()
			a.address = address
			_, page := a.get("/metrics")
			return strings.Contains(page, want)
		}
	}
	write("metrics: 127.0.0.1:15451\nmtu: off\n")
	hup()
	within(t, "the other address answers", answers("127.0.0.1:15451", "tsoagent_config_last_reload_successful 1"))
	within(t, "the lock is gone", func() bool { _, page := a.get("/metrics"); return !strings.Contains(page, "tsoagent_clones{") })
	if _, err := http.Get("http://127.0.0.1:15450/metrics"); err == nil {
		t.Error("the old address answers, too")
	}
	write("metrics: 127.0.0.1:15452\nmtu: sometimes\n")
	hup()
	within(t, "it is refused", answers("127.0.0.1:15451", "tsoagent_config_last_reload_successful 0"))
	if log := a.log.String(); !strings.Contains(log, `level=ERROR msg="the configuration is not reloaded: the one before it stays in use"`) ||
		!strings.Contains(log, `tsoagent.yaml:2: mtu: \"sometimes\" is not one of`) {
		t.Error("the log doesn't say what is wrong")
	}
	// Flags go before the file also then: run has --presume-mtu 1400.
	write("metrics: 127.0.0.1:15451\npresume_mtu: 1300\n")
	hup()
	within(t, "it is taken over", answers("127.0.0.1:15451", "tsoagent_config_last_reload_successful 1"))
	within(t, "the lock is back", func() bool {
		_, page := a.get("/metrics")
		return strings.Contains(page, `tsoagent_lock_mtu_min_bytes{device="n0",netns="host"} 1400`)
	})
}
