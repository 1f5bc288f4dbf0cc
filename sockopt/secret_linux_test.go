package sockopt

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// childEnv tells the test that it is the child. It holds a marker in memory on purpose, so that a
// search that finds nothing proves something.
const childEnv = "TSOAGENT_KEYS_CHILD"

// TestKernelNoSecretInMemory follows keys in a child, whose memory it then searches for them. The
// parent sets the keys: the child gets them from nowhere but the kernel.
func TestKernelNoSecretInMemory(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		child(t)
		return
	}
	newNetns(t)
	needKeys(t)
	key := random(t)
	for at, mapped := range map[string]string{"0.0.0.0:179": "", "[::]:180": "::ffff:"} {
		l := listen(t, at, "")
		for n := range 400 { // more than a dump has room for, so that the listener is asked for alone
			if err := trySetKey(l, fmt.Sprintf("%s10.0.%d.%d", mapped, n/250, n%250), key); err != nil {
				t.Fatal(err)
			}
		}
	}
	l := listen(t, "127.0.0.1:181", "")
	setKey(t, l, "127.0.0.1", key)
	fd := open(t, netip.MustParseAddr("127.0.0.1"))
	setKey(t, fd, "127.0.0.1", key)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 181}); err != nil {
		t.Fatal(err)
	}
	if !answered(t, key) {
		t.Fatal("the kernel's answer has no key: the test proves nothing")
	}

	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestKernelNoSecretInMemory$", "-test.v")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil { // from this thread, so that it is in its namespace
		t.Fatal(err)
	}
	defer func() {
		_ = in.Close()
		_ = cmd.Wait()
	}()
	marker := random(t)
	fmt.Fprintln(in, marker)
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "keys ") {
	}
	if want := "keys 802"; lines.Text() != want { // 400 on each listener, and both ends of the connection, of which one is the listener's own
		t.Fatalf("the child says %q, want %q", lines.Text(), want)
	}
	if !inMemory(t, cmd.Process.Pid, marker) {
		t.Fatal("the child's marker is not found in its memory: the search proves nothing")
	}
	if inMemory(t, cmd.Process.Pid, key) {
		t.Error("a key is in the memory of a process that has watched it")
	}
}

// child looks at the keys ten times, says how many there are, and waits.
func child(t *testing.T) {
	in := bufio.NewReader(os.Stdin)
	marker, err := in.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	w, err := Dial(Options{Period: 1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	keys := 0
	go func() {
		for w.Stats().Dumps < 10 {
			w.Resync()
		}
		cancel()
	}()
	_ = w.Run(ctx, func(ev []Event) { keys = len(ev[0].(KeysSet).Keys) })
	fmt.Printf("\nkeys %d\n", keys)
	_, _ = io.Copy(io.Discard, in)
	if len(marker) == 0 {
		t.Fatal("no marker")
	}
}

func random(t *testing.T) string {
	t.Helper()
	b := make([]byte, 20)
	if _, err := unix.Getrandom(b, 0); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", b)
}

// answered reports whether the kernel's own answer has the key.
func answered(t *testing.T, key string) bool {
	t.Helper()
	d, err := dialDiag()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.close() }()
	found := false
	if _, err := d.ask(request(afInet, connected, true, nil), unix.NLM_F_DUMP, func(b []byte) {
		found = found || bytes.Contains(b, []byte(key))
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// inMemory reports whether text is in the memory that a process can write.
func inMemory(t *testing.T, pid int, text string) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Skipf("needs leave to read another process's memory (ptrace): %v", err)
	}
	defer mem.Close()
	searched := 0
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var perm string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perm); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(perm, "rw") {
			continue
		}
		b := make([]byte, min(to-from, 256<<20))
		n, _ := mem.ReadAt(b, int64(from)) // what can't be read was never touched
		searched += n
		if bytes.Contains(b[:n], []byte(text)) {
			return true
		}
	}
	if searched < 1<<20 {
		t.Fatalf("only %d bytes of memory could be read", searched)
	}
	return false
}
