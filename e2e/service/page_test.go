package service

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"tsoagent/e2e/harness"
)

// browser is a page in a headless Chromium, spoken to by its DevTools protocol.
type browser struct {
	t       *testing.T
	ws      *websocket.Conn
	session string
	id      int
}

// open starts a browser, which ends with the test, with a page that is as wide as a phone's or a desktop's.
func open(t *testing.T, width, height int) *browser {
	t.Helper()
	said := new(harness.Log)
	cmd := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--user-data-dir="+t.TempDir(), "--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank")
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	cmd.Stdout, cmd.Stderr = said, said
	// All of its processes end with the group.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("Chromium:\n%s", said)
		}
	})
	var url string
	within(t, "Chromium listens", func() bool {
		if m := regexp.MustCompile(`DevTools listening on (ws://\S+)`).FindStringSubmatch(said.String()); m != nil {
			url = m[1]
		}
		return url != ""
	})
	ws, err := websocket.Dial(url, "", "http://127.0.0.1/")
	if err != nil {
		t.Fatal(err)
	}
	ws.MaxPayloadBytes = 64 << 20
	t.Cleanup(func() { _ = ws.Close() })
	b := &browser{t: t, ws: ws}
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	b.call("Page.enable", nil, nil)
	return b
}

// call calls a method of the protocol.
func (b *browser) call(method string, params, into any) {
	b.t.Helper()
	b.id++
	request := map[string]any{"id": b.id, "method": method, "params": params}
	if params == nil {
		request["params"] = map[string]any{}
	}
	if b.session != "" {
		request["sessionId"] = b.session
	}
	if err := b.ws.SetDeadline(time.Now().Add(patience)); err != nil {
		b.t.Fatal(err)
	}
	if err := websocket.JSON.Send(b.ws, request); err != nil {
		b.t.Fatal(err)
	}
	for {
		var answer struct {
			ID     int
			Error  *struct{ Message string }
			Result json.RawMessage
		}
		if err := websocket.JSON.Receive(b.ws, &answer); err != nil {
			b.t.Fatalf("%s: %v", method, err)
		}
		if answer.ID != b.id {
			continue // an event
		}
		if answer.Error != nil {
			b.t.Fatalf("%s: %s", method, answer.Error.Message)
		}
		if into != nil {
			if err := json.Unmarshal(answer.Result, into); err != nil {
				b.t.Fatal(err)
			}
		}
		return
	}
}

// eval is what an expression is on the page, as text.
func (b *browser) eval(expr string) string {
	b.t.Helper()
	var out struct{ Result struct{ Value any } }
	b.call("Runtime.evaluate", map[string]any{"expression": expr, "returnByValue": true}, &out)
	return fmt.Sprint(out.Result.Value)
}

// text is all that a person reads on the page.
func (b *browser) text() string { return b.eval("document.body.innerText") }

// screenshot writes a picture where TSOAGENT_SCREENSHOTS says, for a person to look at.
func (b *browser) screenshot(name string) {
	b.t.Helper()
	var shot struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": true}, &shot)
	png, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil || len(png) < 1000 {
		b.t.Errorf("a picture of %d bytes, %v", len(png), err)
	}
	if dir := os.Getenv("TSOAGENT_SCREENSHOTS"); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, name), png, 0o644); err != nil {
			b.t.Error(err)
		}
	}
}

// TestStatusPage has a real browser show a real agent, on a phone and on a desktop.
func TestStatusPage(t *testing.T) {
	host.Need(t, map[string]string{"chromium": "chromium", "ip": "iproute2"})
	network(t)
	// What a device is called can be anything but a space or a slash.
	ip(t, "link add <b>x type veth peer name n3\nlink set <b>x up\nlink set n3 up\nroute add 10.5.0.0/16 dev <b>x")
	t.Cleanup(func() { ip(t, "link del n3") })
	cover(t, "10.3.0.0/16")
	cover(t, "2001:db8:3::/48")
	cover(t, "10.5.0.0/16")
	a := run(t)
	for name, size := range map[string][2]int{"phone": {390, 844}, "desktop": {1280, 900}} {
		t.Run(name, func(t *testing.T) {
			b := open(t, size[0], size[1])
			b.call("Page.navigate", map[string]any{"url": "http://" + a.address + "/"}, nil)
			within(t, "the page has read the metrics", func() bool { return strings.Contains(b.text(), "all is well") })
			text := b.text()
			for _, want := range []string{
				"tsoagent", "Mode enforce", "3 policy", "3 at 1400", "<b>x", "n0", "up for ", "\nContested\n0\n", "shows what the metrics show",
			} {
				if !strings.Contains(text, want) {
					t.Errorf("%q is not on the page:\n%s", want, text)
				}
			}
			for _, secret := range []string{"10.3.0.0", "2001:db8", "192.0.2", "policy 1"} {
				if strings.Contains(text, secret) {
					t.Errorf("%q is on the page", secret)
				}
			}
			if n := b.eval("document.querySelectorAll('td b').length"); n != "0" {
				t.Error("the name of a device became markup")
			}
			if wide := b.eval("document.querySelector('.wide').scrollWidth - document.querySelector('.wide').clientWidth"); wide != "0" {
				t.Errorf("the table is %s pixels too wide", wide)
			}
			if wide := b.eval("document.documentElement.scrollWidth + ' of ' + innerWidth"); wide != fmt.Sprintf("%d of %d", size[0], size[0]) {
				t.Errorf("one has to scroll sideways: %s", wide)
			}
			b.screenshot(name + ".png")
			// It is live.
			cover(t, "10.4.0.0/16")
			within(t, "the page has the new policy", func() bool { return strings.Contains(b.text(), "4 policy") })
			ip(t, "xfrm policy delete src 10.1.0.0/16 dst 10.4.0.0/16 dir out")
			within(t, "the page is without it", func() bool { return strings.Contains(b.text(), "3 policy") })
		})
	}
	// Nothing of the page can be had from elsewhere, and nothing else from here.
	res, _ := a.get("/")
	if got := res.Header.Get("Content-Security-Policy"); !strings.HasPrefix(got, "default-src 'none'; ") {
		t.Errorf("Content-Security-Policy: %q", got)
	}
}

// TestStatusPageOfAnAgentThatIsGone says so, and keeps what it has read.
func TestStatusPageOfAnAgentThatIsGone(t *testing.T) {
	host.Need(t, map[string]string{"chromium": "chromium", "ip": "iproute2"})
	network(t)
	cover(t, "10.3.0.0/16")
	b := open(t, 390, 844)
	t.Run("while it runs", func(t *testing.T) {
		a := run(t, "--mode", "observe")
		b.call("Page.navigate", map[string]any{"url": "http://" + a.address + "/"}, nil)
		within(t, "the page has read the metrics", func() bool { return strings.Contains(b.text(), "only observes") })
	})
	within(t, "it is gone", func() bool { return strings.Contains(b.text(), "does not answer") })
	if text := b.text(); !strings.Contains(text, "1 policy") || !strings.Contains(text, "since then") {
		t.Errorf("the page:\n%s", text)
	}
}
