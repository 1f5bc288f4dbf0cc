package sockopt

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// ownerEnv tells a test that it is the child, and at which address it is to listen.
const ownerEnv = "TSOAGENT_KEYS_OWNER"

// somebody is a user without any privilege.
const somebody = 12345

// TestKernelOwners tells whose sockets hold a key: also a user's without any privilege, for all addresses.
func TestKernelOwners(t *testing.T) {
	if at := os.Getenv(ownerEnv); at != "" {
		listen(t, at, "", os.Getenv(ownerEnv+"_PEER"))
		fmt.Printf("\nuid %d listens\n", os.Getuid())
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	newNetns(t)
	needKeys(t)
	listen(t, "0.0.0.0:1790", "", "192.0.2.9")
	listen(t, "[::]:1791", "", "2001:db8::9")
	startOwner(t, "0.0.0.0:1792", "0.0.0.0/0", somebody, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: somebody, Gid: somebody}})
	startOwner(t, "[::]:1793", "::/0", somebody, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: somebody, Gid: somebody}})
	wantOwners(t, map[string]Owner{
		"tcp-md5 key for 192.0.2.9 on port 1790":   Root,
		"tcp-md5 key for 2001:db8::9 on port 1791": Root,
		"tcp-md5 key for 0.0.0.0/0 on port 1792":   user(somebody),
		"tcp-md5 key for ::/0 on port 1793":        user(somebody),
	})
}

// TestKernelOwnerInAUserNamespace takes the root of a user's own user namespace for that user.
func TestKernelOwnerInAUserNamespace(t *testing.T) {
	newNetns(t)
	needKeys(t)
	one := []syscall.SysProcIDMap{{ContainerID: 0, HostID: somebody, Size: 1}}
	startOwner(t, "[::]:1793", "::/0", 0, &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: one, GidMappings: one,
		Credential: &syscall.Credential{Uid: 0, Gid: 0, NoSetGroups: true},
	})
	wantOwners(t, map[string]Owner{"tcp-md5 key for ::/0 on port 1793": user(somebody)})
}

func wantOwners(t *testing.T, want map[string]Owner) {
	t.Helper()
	got := map[string]Owner{}
	for _, k := range look(t).Keys {
		got[k.String()] = k.Owner
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// startOwner runs the test's binary as another user, in the thread's network namespace, until the test ends. There it is the user uid.
func startOwner(t *testing.T, at, peer string, uid int, attr *syscall.SysProcAttr) {
	t.Helper()
	// The binary of `go test` lies in a directory that only root may read.
	dir, err := os.MkdirTemp("", "keys-owner-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "test")
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run", "^TestKernelOwners$", "-test.v")
	cmd.Dir, cmd.Env, cmd.SysProcAttr, cmd.Stderr = dir, append(os.Environ(), ownerEnv+"="+at, ownerEnv+"_PEER="+peer), attr, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil { // from this thread, so that it is in its namespace
		if attr.Cloneflags&syscall.CLONE_NEWUSER != 0 {
			t.Skipf("needs user namespaces in the kernel: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	var said []string
	for lines := bufio.NewScanner(out); lines.Scan(); said = append(said, lines.Text()) {
		if lines.Text() == fmt.Sprintf("uid %d listens", uid) {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return
		}
	}
	t.Fatalf("the child says %q", said)
}

// TestKernelOwnerOfWhatNobodyAccepted has a connection of a user's listener that has the listener's key and no file yet: it isn't root's,
// which kernels before 6.17 say.
func TestKernelOwnerOfWhatNobodyAccepted(t *testing.T) {
	newNetns(t)
	needKeys(t)
	var l int
	as(t, somebody, func() { l = listen(t, "127.0.0.2:1790", "", "127.0.0.1") })
	connect(t, "127.0.0.1:0", "127.0.0.2:1790", "127.0.0.2")
	setKey(t, l, "127.0.0.1", "")
	var found bool
	for _, k := range look(t).Keys {
		if k.Port != 1790 {
			continue
		}
		found = true
		if k.Owner == Root {
			t.Errorf("%s: %+v", k, k.Owner)
		}
	}
	if !found {
		t.Error("the connection isn't seen")
	}
	// Who accepts it has it.
	conn, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(conn)
	for _, k := range look(t).Keys {
		if k.Port == 1790 && k.Owner != Root {
			t.Errorf("%s: %+v after root has accepted it", k, k.Owner)
		}
	}
}

// as runs a function whose sockets are a user's.
func as(t *testing.T, uid int, fn func()) {
	t.Helper()
	if err := unix.Setfsuid(uid); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setfsuid(0); err != nil {
			t.Fatal(err)
		}
	}()
	fn()
}

// TestKernelOthersLeaveRoom has a user who sets as many keys as there is room for, and more: root's are all seen.
func TestKernelOthersLeaveRoom(t *testing.T) {
	newNetns(t)
	needKeys(t)
	peer := func(net, n int) string {
		return netip.AddrFrom4([4]byte{10, byte(net), byte(n >> 8), byte(n)}).String()
	}
	as(t, somebody, func() {
		for n := range MaxOthers/300 + 2 {
			l := listen(t, fmt.Sprintf("127.0.0.1:%d", 2000+n), "")
			for i := range 300 {
				setKey(t, l, peer(1, i), secret)
			}
		}
	})
	l := listen(t, "127.0.0.1:179", "")
	for i := range 300 {
		setKey(t, l, peer(2, i), secret)
	}
	set := look(t)
	count := map[Owner]int{}
	for _, k := range set.Keys {
		count[k.Owner]++
	}
	if count[Root] != 300 || count[user(somebody)] != MaxOthers || set.Over || !set.OverOthers {
		t.Errorf("%v keys by owner, want 300 of root's and %d; over: %t, others %t", count, MaxOthers, set.Over, set.OverOthers)
	}
}
