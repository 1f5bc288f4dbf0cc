package netns

import (
	"os"
	"path/filepath"
	"testing"
)

func TestCheck(t *testing.T) {
	for spec, ok := range map[string]bool{
		"host": true, "all": true, "blue": true, "cni-1f2e": true, "a b": true, "pid:1": true, "pid:4194304": true,
		"/proc/1/ns/net": true, "/var/run/docker/netns/x": true,
		"": false, ".": false, "..": false, "a/b": false, "./a": false, "pid:": false, "pid:0": false, "pid:-1": false,
		"pid:+1": false, "pid:1x": false, "pid:99999999999": false, "a\nb": false, "\x1b[m": false, string(make([]byte, 300)): false,
	} {
		if err := Check(spec); (err == nil) != ok {
			t.Errorf("Check(%q) = %v", spec, err)
		}
	}
}

func TestPath(t *testing.T) {
	for spec, want := range map[string]string{
		"host": "", "all": "", "blue": "/run/netns/blue", "pid:7": "/proc/7/ns/net", "/a//b/": "/a/b",
	} {
		if got := Path(spec); got != want {
			t.Errorf("Path(%q) = %q, want %q", spec, got, want)
		}
	}
}

func TestPidOfFollowsLinks(t *testing.T) {
	dir := t.TempDir()
	link := func(name, to string) string {
		path := filepath.Join(dir, name)
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	direct := link("direct", "/proc/77/ns/net")
	again := link("again", "direct")
	loop := link("loop", "loop")
	for path, want := range map[string]int{
		"/proc/5/ns/net": 5, "/proc/5/task/6/ns/net": 5, "/proc/5/ns/mnt": 0,
		direct: 77, again: 77, loop: 0, "/run/netns/blue": 0,
	} {
		if got := PidOf(path); got != want {
			t.Errorf("PidOf(%s) = %d, want %d", path, got, want)
		}
	}
}
