// Command guest is the init of the test kernel, and of Debian's stock kernels behind e2e/stockkernel/loader. It prepares a machine out of
// the host's read-only root, runs one job (a scenario, or a compiled Go test) and powers off.
//
// What it is to do comes on the kernel's command line:
//
//	tsoagent.x=DIR        host directory, mounted read-write on /mnt/x: results
//	tsoagent.bin=DIR      host directory, mounted read-only on /mnt/bin: the binaries to test
//	tsoagent.src=DIR      host directory, mounted read-only on /mnt/src: this module's tree
//	tsoagent.deadline=DUR when to give up
//
// and for a stock kernel also what stock.go lists.
//
// The job itself is the file /mnt/x/job, one argument a line. The result is the first line of /mnt/x/result:
// "pass", "fail" or "skip: reason". What the job printed is in /mnt/x/log, the timeline of a scenario in
// /mnt/x/steps and what it has measured in /mnt/x/figures, all as it happens.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Where the host's directories appear in the guest.
const (
	exchangeDir = "/mnt/x"
	binDir      = "/mnt/bin"
	sourceDir   = "/mnt/src"
	modulesDir  = "/mnt/modules" // the stock kernels' (e2e/stockkernel/loader)
)

// The main goroutine keeps the process's first thread to itself. That one can't end: a goroutine that enters a namespace
// on it and ends (scenario.inNamespace) would keep the namespace alive for ever.
func init() { runtime.LockOSThread() }

func main() {
	if os.Getpid() != 1 {
		if len(os.Args) > 1 && os.Args[1] == "alone" {
			if err := alone(); err != nil {
				fmt.Println("guest:", err)
				writeResult("fail")
				os.Exit(1)
			}
			os.Args = os.Args[1:]
		}
		os.Exit(runJob(os.Args[1:]))
	}
	if err := initialise(); err != nil {
		fmt.Println("guest:", err)
		writeResult("fail")
	}
	// Nothing is lost: the results are in the host's files already.
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("guest: power off:", err)
	}
}

// initialise is the life of process 1: mounts, the job, and the reaping of whatever the job leaves behind.
func initialise() error {
	args, err := prepare()
	if err != nil {
		return err
	}
	logFile, err := os.Create(filepath.Join(exchangeDir, "log"))
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer logFile.Close()

	job, err := os.ReadFile(filepath.Join(exchangeDir, "job"))
	if err != nil {
		return fmt.Errorf("job: %w", err)
	}
	deadline, err := time.ParseDuration(args["tsoagent.deadline"])
	if err != nil {
		return fmt.Errorf("tsoagent.deadline: %w", err)
	}

	self := filepath.Join(binDir, "guest")
	argv := append([]string{self}, strings.Split(strings.TrimRight(string(job), "\n"), "\n")...)
	child, err := os.StartProcess(self, argv, &os.ProcAttr{
		Dir: "/",
		Env: []string{
			"PATH=" + binDir + ":" + filepath.Join(sourceDir, "e2e", "guest", "bin") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"HOME=/root", "TERM=dumb", "LC_ALL=C.UTF-8", "GOTRACEBACK=all",
			"TSOAGENT_TEST_KERNEL=1",
			"TSOAGENT_DEADLINE=" + time.Now().Add(deadline).Format(time.RFC3339Nano),
			"TSOAGENT_NICS=" + args["tsoagent.nics"],
			"TSOAGENT_DRIVERS=" + args["tsoagent.drivers"],
			"TSOAGENT_PATIENCE=" + args["tsoagent.patience"],
			"TSOAGENT_CARDS=" + strings.ReplaceAll(args["tsoagent.cards"], ",", " "),
		},
		Files: []*os.File{os.Stdin, logFile, logFile},
	})
	if err != nil {
		return fmt.Errorf("job: %w", err)
	}

	// A job that outlives its deadline loses its children first: a scenario then says where it stood.
	// If that doesn't end it either, the machine goes.
	time.AfterFunc(deadline, func() {
		fmt.Fprintln(logFile, "guest: deadline of", deadline, "passed, killing what runs")
		killOthers(child.Pid)
	})
	time.AfterFunc(deadline+3*time.Second, func() {
		fmt.Fprintln(logFile, "guest: deadline passed, power off")
		writeResult("fail")
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	})

	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case pid == child.Pid:
			if _, err := os.Stat(filepath.Join(exchangeDir, "result")); err != nil {
				fmt.Fprintf(logFile, "guest: the job ended without a result (status %d, signal %d)\n", status.ExitStatus(), status.Signal())
				writeResult("fail")
			}
			return nil
		}
	}
}

// killOthers kills every process but 1 and those that are named.
func killOthers(but ...int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, entry := range entries {
		var p int
		if _, err := fmt.Sscan(entry.Name(), &p); err != nil || p == 1 || slices.Contains(but, p) {
			continue
		}
		_ = unix.Kill(p, unix.SIGKILL) // kernel threads don't mind
	}
}

// prepare mounts what a machine has and returns the kernel's command line as a map.
func prepare() (map[string]string, error) {
	if err := mount("proc", "/proc", "proc", ""); err != nil {
		return nil, err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("command line: %w", err)
	}
	args := map[string]string{}
	for word := range strings.FieldsSeq(string(cmdline)) {
		key, value, _ := strings.Cut(word, "=")
		args[key] = value
	}

	// The tmpfs on /mnt comes first: the directories of the host that are mounted below it may themselves
	// lie under /tmp or /run, which are hidden afterwards.
	for _, m := range []fileSystem{
		{"sysfs", "/sys", "sysfs", ""},
		{"devtmpfs", "/dev", "devtmpfs", ""},
		{"tmpfs", "/mnt", "tmpfs", ""},
		hostDir(args, "tsoagent.x", exchangeDir),
		hostDir(args, "tsoagent.bin", binDir),
		hostDir(args, "tsoagent.src", sourceDir),
		hostDir(args, "tsoagent.modules", modulesDir),
		{"tmpfs", "/run", "tmpfs", ""},
		{"tmpfs", "/tmp", "tmpfs", ""},
		{"tmpfs", "/var/lib", "tmpfs", ""},
		{"tmpfs", "/dev/shm", "tmpfs", ""},
		{"devpts", "/dev/pts", "devpts", ""},
		{"debugfs", "/sys/kernel/debug", "debugfs", ""},
		{"bpf", "/sys/fs/bpf", "bpf", ""},
	} {
		if m.target == "" {
			continue
		}
		if err := os.MkdirAll(m.target, 0o755); err != nil && !errors.Is(err, syscall.EROFS) && !errors.Is(err, syscall.EPERM) {
			return nil, fmt.Errorf("mount point: %w", err)
		}
		// The kernel may have mounted its devtmpfs already (CONFIG_DEVTMPFS_MOUNT).
		if err := mount(m.source, m.target, m.fstype, m.data); err != nil && !errors.Is(err, syscall.EBUSY) {
			return nil, err
		}
	}
	for _, dir := range []string{binDir, sourceDir} {
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
			return nil, fmt.Errorf("remount %s read-only: %w", dir, err)
		}
	}
	for _, dir := range []string{"/run/netns", "/run/lock"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	// Else every namespace is born with tunl0, gre0, sit0 and seven more, because the drivers are built in.
	if err := os.WriteFile("/proc/sys/net/core/fb_tunnels_only_for_init_net", []byte("1"), 0o644); err != nil {
		return nil, fmt.Errorf("fallback tunnels: %w", err)
	}
	if err := unix.Sethostname([]byte("testkernel")); err != nil {
		return nil, fmt.Errorf("hostname: %w", err)
	}
	if out, err := exec.Command("/sbin/ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	if args["tsoagent.root"] == "9p" {
		if err := prepareStock(args); err != nil {
			return nil, err
		}
	}
	return args, nil
}

// fileSystem is something to mount.
type fileSystem struct{ source, target, fstype, data string }

// hostDir says how the host's directory behind a key gets to target. The zero value means that there is none.
func hostDir(args map[string]string, key, target string) fileSystem {
	dir := args[key]
	switch {
	case args["tsoagent.root"] != "9p" && dir != "":
		return fileSystem{"none", target, "hostfs", dir}
	case key == "tsoagent.x" && dir != "":
		// The one that is written to: nothing of it is kept in the guest, so that the host sees it at once. dir is its mount tag.
		return fileSystem{dir, target, "9p", "trans=virtio,version=9p2000.L,cache=none,msize=512000"}
	case dir != "":
		return fileSystem{dir, target, "bind", ""}
	}
	return fileSystem{}
}

func mount(source, target, fstype, data string) error {
	flags := uintptr(unix.MS_NOSUID)
	if fstype == "bind" {
		flags |= unix.MS_BIND
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s (%q): %w", fstype, target, data, err)
	}
	return nil
}

// resultDir is where the results of a job go.
func resultDir() string {
	if dir := os.Getenv(resultVariable); dir != "" {
		return dir
	}
	return exchangeDir
}

// resultVariable says where else than in exchangeDir the results of a job go, if it is one of several.
const resultVariable = "TSOAGENT_RESULT"

func writeResult(text string) {
	if err := os.WriteFile(filepath.Join(resultDir(), "result"), []byte(text+"\n"), 0o644); err != nil {
		fmt.Println("guest: result:", err)
	}
}
