package netns_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/agent/netns"
	"tsoagent/agent/netns/netnstest"
)

func open(t *testing.T, path string) *netns.Namespace {
	t.Helper()
	ns, err := netns.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	return ns
}

func here(t *testing.T) netns.ID {
	t.Helper()
	id, err := netns.Stat("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestDoKeepsTheNamespaceOfTheProcess: whoever looks where the process is, by /proc/PID/ns/net, does not come upon a namespace that it visits.
func TestDoKeepsTheNamespaceOfTheProcess(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, "netns add a")
	a := open(t, netns.Path("a"))
	const visits = 200 // at once, so that all the threads that the runtime has are asked for, the first one among them
	var inside, done sync.WaitGroup
	inside.Add(visits)
	leave := make(chan struct{})
	for range visits {
		done.Go(func() {
			arrived := sync.OnceFunc(inside.Done)
			defer arrived()
			if err := a.Do(func() error {
				if unix.Gettid() == os.Getpid() {
					t.Error("the process's first thread is in the namespace")
				}
				arrived()
				<-leave
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	inside.Wait()
	if id, err := netns.Stat(fmt.Sprintf("/proc/%d/ns/net", os.Getpid())); err != nil || id == a.ID() {
		t.Errorf("the process is in %v, %v", id, err)
	}
	close(leave)
	done.Wait()
}

func TestDoEntersAndComesBack(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, "netns add a\nnetns add b\nlink add n0 type veth peer name n1 netns a")
	home := here(t)
	a, b := open(t, netns.Path("a")), open(t, netns.Path("b"))
	if a.ID() == b.ID() || a.ID() == home {
		t.Fatal("namespaces can't be told apart")
	}
	if again := open(t, netns.Path("a")); again.ID() != a.ID() {
		t.Error("one namespace has two IDs")
	}
	// Many at once and nested, while others look where they are.
	var wg sync.WaitGroup
	for range 50 {
		for _, ns := range []*netns.Namespace{a, b} {
			wg.Go(func() {
				err := ns.Do(func() error {
					if here(t) != ns.ID() {
						return errors.New("fn is elsewhere")
					}
					return b.Do(func() error {
						if here(t) != b.ID() {
							return errors.New("the inner fn is elsewhere")
						}
						return nil
					})
				})
				if err != nil {
					t.Error(err)
				}
				if here(t) != home {
					t.Error("Do changed its caller's namespace")
				}
			})
		}
	}
	wg.Wait()
	// No thread was left elsewhere.
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if id, err := netns.Stat("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && id != home {
			t.Errorf("thread %s is in %s, not at home in %s", task.Name(), id, home)
		}
	}
	want := errors.New("own error")
	if err := a.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("Do = %v", err)
	}
}

// What is opened in a namespace stays there, also when it is used elsewhere: that is what the
// package's users build on.
func TestSysctlFilesStayInTheirNamespace(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	const path = "/proc/sys/net/ipv4/ip_forward"
	netnstest.IP(t, "netns add a")
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		t.Skipf("can't write sysctls here: %v", err)
	}
	a := open(t, netns.Path("a"))
	var f *os.File
	err := a.Do(func() (err error) {
		if err = os.WriteFile(path, []byte("1"), 0); err != nil {
			return err
		}
		f, err = os.Open(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := func() string {
		var b [8]byte
		n, _ := f.ReadAt(b[:], 0)
		return strings.TrimSpace(string(b[:n]))
	}
	if got := read(); got != "1" {
		t.Errorf("read at home: %q, want that of the namespace", got)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "0\n" {
		t.Errorf("at home it is %q, %v", b, err)
	}
	if err := a.Do(func() error { return os.WriteFile(path, []byte("0"), 0) }); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != "0" {
		t.Errorf("after a change: %q", got)
	}
	// The open file does not keep the namespace: the veth in it goes with it.
	netnstest.IP(t, "link add n0 type veth peer name n1 netns a")
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	netnstest.IP(t, "netns del a")
	netnstest.Within(t, "the namespace is gone", func() bool { return !strings.Contains(netnstest.Show(t, "-o link"), "n0") })
	// Devices go before sysctls do.
	netnstest.Within(t, "the open file leads nowhere", func() bool { return read() == "" })
}

func TestNamespaceLivesUntilItIsClosed(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, "netns add a\nlink add n0 type veth peer name n1 netns a")
	a := open(t, netns.Path("a"))
	netnstest.IP(t, "netns del a")
	if err := a.Do(func() error {
		if out := netnstest.Show(t, "-o link"); !strings.Contains(out, "n1") {
			return fmt.Errorf("n1 is not there: %s", out)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	netnstest.Within(t, "the namespace is gone", func() bool { return !strings.Contains(netnstest.Show(t, "-o link"), "n0") })
}

func TestOpenRefusesWhatIsNoNamespace(t *testing.T) {
	dir := t.TempDir()
	file, fifo := dir+"/file", dir+"/fifo"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{
		file: netns.ErrNotNetns, fifo: netns.ErrNotNetns, dir: netns.ErrNotNetns, "/proc/self/ns/mnt": netns.ErrNotNetns,
		dir + "/none": fs.ErrNotExist, "/proc/2147483647/ns/net": fs.ErrNotExist,
	} {
		if ns, err := netns.Open(path); !errors.Is(err, want) {
			t.Errorf("Open(%s) = %v, %v, want %v", path, ns, err, want)
		}
		if id, err := netns.Stat(path); path != "/proc/self/ns/mnt" && !errors.Is(err, want) {
			t.Errorf("Stat(%s) = %v, %v, want %v", path, id, err, want)
		}
	}
}

func TestEnteringWithoutTheCapability(t *testing.T) {
	const step = "TSOAGENT_NETNS_NOCAP"
	if os.Getenv(step) == "" {
		if !netnstest.Private(t) {
			return
		}
		setpriv, err := exec.LookPath("setpriv")
		if err != nil {
			t.Skip("needs setpriv (util-linux)")
		}
		netnstest.IP(t, "netns add a")
		cmd := exec.Command(setpriv, "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), step+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	a := open(t, netns.Path("a"))
	err := a.Do(func() error { return errors.New("entered") })
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
		t.Errorf("Do = %v", err)
	}
	own, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	ran := false
	if err := own.Do(func() error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("in the own namespace: %v", err)
	}
}

func TestProcesses(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, "netns add a\nnetns add b")
	pid, _ := netnstest.Live(t, "a")
	a, b := open(t, netns.Path("a")).ID(), open(t, netns.Path("b")).ID()
	seen := map[netns.ID]int{}
	if err := netns.Processes(func(pid int, ns *netns.Namespace) bool {
		if seen[ns.ID()] != 0 {
			t.Errorf("%s comes twice", ns.ID())
		}
		seen[ns.ID()] = pid
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if seen[a] != pid || seen[b] != 0 || seen[here(t)] == 0 {
		t.Errorf("a has process %d, want %d; b %d; own %d", seen[a], pid, seen[b], seen[here(t)])
	}
	n := 0
	if err := netns.Processes(func(int, *netns.Namespace) bool { n++; return false }); err != nil || n != 1 {
		t.Errorf("went on after the end: %d, %v", n, err)
	}
}

// watching runs a Watcher, and waits for conditions with nothing but what it tells.
type watching struct {
	*netns.Watcher
	t    *testing.T
	told chan struct{}
}

func watch(t *testing.T, dirs []string, pids []int) *watching {
	t.Helper()
	w := &watching{t: t, told: make(chan struct{}, 1)}
	var err error
	w.Watcher, err = netns.NewWatcher(func() {
		select {
		case w.told <- struct{}{}:
		default:
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Watch(dirs, pids)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

// after does something, and fails if the condition does not hold when the Watcher tells of it.
func (w *watching) after(what string, do func(), cond func() bool) {
	w.t.Helper()
	select {
	case <-w.told: // of what was before
	default:
	}
	do()
	for deadline := time.After(30 * time.Second); ; {
		select {
		case <-w.told:
			if cond() {
				return
			}
		case <-deadline:
			w.t.Fatalf("%s: the watcher does not tell of it; the condition holds: %v", what, cond())
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func leads(name string) func() bool {
	return func() bool { _, err := netns.Stat(netns.Path(name)); return err == nil }
}

func nowhere(name string) func() bool { return func() bool { return !leads(name)() } }

func TestWatcherTellsOfNames(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	w := watch(t, []string{netns.Dir}, nil)
	names := func(want ...string) func() bool {
		return func() bool {
			got, err := netns.Names()
			return err == nil && strings.Join(got, " ") == strings.Join(want, " ")
		}
	}
	ip := func(args string) func() { return func() { netnstest.IP(t, args) } }
	for range 3 {
		w.after("a is added", ip("netns add a"), leads("a")) // there is no /run/netns the first time
		first := open(t, netns.Path("a"))                    // so that its inode is not given again
		w.after("a is another one", ip("netns del a\nnetns add a"), func() bool {
			id, err := netns.Stat(netns.Path("a"))
			return err == nil && id != first.ID()
		})
		w.after("b is a file", func() { must(t, os.WriteFile(netns.Path("b"), nil, 0o600)) }, names("a", "b"))
		w.after("b is a mount", func() { must(t, unix.Mount(netns.Path("a"), netns.Path("b"), "", unix.MS_BIND, "")) }, leads("b"))
		w.after("a is gone", ip("netns del a"), names("b"))
		w.after("b is gone", ip("netns del b"), names())
		w.after("the directory is gone", func() {
			_ = unix.Unmount(netns.Dir, unix.MNT_DETACH) // `ip netns` mounts it on itself
			must(t, os.Remove(netns.Dir))
		}, func() bool { _, err := os.Stat(netns.Dir); return err != nil })
	}
}

func TestWatcherTellsOfProcessesAndLinks(t *testing.T) {
	if !netnstest.Private(t) {
		return
	}
	netnstest.IP(t, "netns add a")
	pid, end := netnstest.Live(t, "a")
	spec := fmt.Sprintf("pid:%d", pid)
	w := watch(t, nil, nil)
	w.after("what to watch", func() { w.Watch([]string{netns.Dir}, []int{pid, 1<<22 - 1}) }, leads(spec))
	w.after("a link", func() { must(t, os.Symlink(netns.Path(spec), netns.Path("link"))) }, leads("link"))
	w.after("the process ends", end, nowhere(spec))
	if leads("link")() {
		t.Error("the link still leads there")
	}
	dir := "/run/deep/er/still"
	exists := func(path string) func() bool {
		return func() bool { _, err := os.Stat(path); return err == nil }
	}
	w.after("what to watch", func() { w.Watch([]string{dir}, nil) }, func() bool { return true })
	w.after("a deep directory", func() { must(t, os.MkdirAll(dir, 0o700)) }, exists(dir))
	w.after("a file in it", func() { must(t, os.WriteFile(dir+"/x", nil, 0o600)) }, exists(dir+"/x"))
	w.after("it goes", func() { must(t, os.RemoveAll("/run/deep")) }, func() bool { return !exists("/run/deep")() })
	w.after("and comes again", func() { must(t, os.MkdirAll(dir, 0o700)) }, exists(dir))
}
