// Package testkernel finds and boots the test kernel, user-mode Linux that the script `build` beside it makes, and runs one job
// in it. See e2e/README.md.
package testkernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ErrNotBuilt means that there is no test kernel for the present configuration fragment in the cache.
var ErrNotBuilt = errors.New("test kernel not built: make testkernel")

// Find returns the path of the kernel for the fragment in the module at tree, or ErrNotBuilt. It builds nothing.
func Find(ctx context.Context, tree string) (string, error) { return FindVersion(ctx, tree, "") }

// FindVersion is Find for the kernel that was built from the source of another version, such as 6.12.107.
func FindVersion(ctx context.Context, tree, version string) (string, error) {
	args := []string{"--path"}
	if version != "" {
		args = append(args, version)
	}
	out, err := exec.CommandContext(ctx, filepath.Join(tree, "e2e", "testkernel", "build"), args...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return "", ErrNotBuilt
	}
	if err != nil {
		return "", fmt.Errorf("find test kernel: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// BuildGuest builds the guest's init, static, into dir. Beside it stands a link to libreswan where that is in the cache (tools/libreswan).
func BuildGuest(ctx context.Context, tree, dir string) error {
	return errors.Join(BuildCommand(ctx, tree, "e2e/guest", dir), linkLibreswan(ctx, tree, dir))
}

// linkLibreswan links to libreswan, which is unpacked and not installed. The guest has the host's root, and so finds it behind the link.
func linkLibreswan(ctx context.Context, tree, dir string) error {
	out, err := exec.CommandContext(ctx, filepath.Join(tree, "tools", "libreswan"), "--path").Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return nil // the scenarios that want it say so
	}
	if err != nil {
		return fmt.Errorf("find libreswan: %w", err)
	}
	return os.Symlink(strings.TrimSpace(string(out)), filepath.Join(dir, "libreswan"))
}

// BuildCommands builds this project's commands, static, into dir. A command whose sources aren't there is left out.
func BuildCommands(ctx context.Context, tree, dir string) error {
	return errors.Join(
		BuildCommand(ctx, tree, "cmd/tsoagent", dir),
		BuildCommand(ctx, tree, "cmd/tsoctl", dir),
		// The same agent with places where it kills itself (failpoint/on.go).
		goTool(ctx, tree, "build", "-buildvcs=false", "-tags", "failpoint", "-o", filepath.Join(dir, "tsoagent-failpoint"), "./cmd/tsoagent"),
	)
}

// BuildCommand builds one command, static, into dir. One whose sources aren't there is left out.
func BuildCommand(ctx context.Context, tree, pkg, dir string) error {
	if sources, err := filepath.Glob(filepath.Join(tree, pkg, "*.go")); err != nil || len(sources) == 0 {
		return err
	}
	// No version stamp: git refuses to answer in a tree that belongs to somebody else.
	return goTool(ctx, tree, "build", "-buildvcs=false", "-o", filepath.Join(dir, filepath.Base(pkg)), "./"+pkg)
}

// BuildTest compiles the tests of a package into dir and returns the binary's name, or "" if the package has no tests.
func BuildTest(ctx context.Context, tree, pkg, dir string) (string, error) {
	if sources, err := filepath.Glob(filepath.Join(tree, pkg, "*_test.go")); err != nil || len(sources) == 0 {
		return "", err
	}
	name := strings.ReplaceAll(pkg, "/", "_") + ".test"
	return name, goTool(ctx, tree, "test", "-c", "-o", filepath.Join(dir, name), "./"+pkg)
}

// goTool runs the go command in tree. What it builds has no part of the host's C library in it, whose files the guest would
// otherwise need at the same paths.
func goTool(ctx context.Context, tree string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// Machine is one boot of a kernel. It is used once, by one goroutine.
type Machine struct {
	Kernel   string        // path of the test kernel
	Binaries string        // directory that becomes /mnt/bin, with the init `guest` in it
	Tree     string        // this module's tree, which becomes /mnt/src
	Dir      string        // an empty directory for this machine alone
	Deadline time.Duration // when the guest gives up; the host waits a little longer
	Steps    io.Writer     // gets the timeline as it happens, if not nil

	// Boot, if not nil, returns the command that is the machine, instead of the test kernel. Run starts it in a process group of its own.
	Boot func(*Machine) (*exec.Cmd, error)
}

// Result is what came of a job.
type Result struct {
	Outcome string // "pass", "fail" or "skip"
	Reason  string // why it was skipped
	Log     string // what the job printed
	Figures string // what a scenario has measured, a JSON object a line
	Console string // what the kernel printed
	Took    time.Duration
}

// A Job is one of a batch.
type Job struct {
	Args  []string
	Cards []string // of a stock kernel, those that a scenario takes for its wires, in order; nil for all
}

// RunBatch boots the machine for several jobs, each of which may take so long. The results of those that ran are in their order; there are fewer than
// jobs where the machine could not be made what it was (e2e/guest/batch.go), or ended: the log says why. The error says why there is not a single one.
func (m *Machine) RunBatch(ctx context.Context, each time.Duration, jobs []Job) (results []*Result, log string, err error) {
	words := []string{"batch", "DEADLINE=" + each.String()}
	for i, job := range jobs {
		if i > 0 {
			words = append(words, "+")
		}
		if job.Cards != nil {
			words = append(words, "CARDS="+strings.Join(job.Cards, ","))
		}
		words = append(words, job.Args...)
	}
	m.Deadline = time.Duration(len(jobs)) * (each + time.Minute)
	machine, err := m.Run(ctx, words...)
	if machine == nil {
		return nil, "", err
	}
	for i := range jobs {
		dir := filepath.Join(m.Dir, strconv.Itoa(i))
		text, failed := os.ReadFile(filepath.Join(dir, "result"))
		if failed != nil {
			if _, none := os.Stat(dir); none == nil {
				// It began, and there is nothing more of the machine: what it said last may tell why.
				results = append(results, &Result{Outcome: "fail", Log: readText(filepath.Join(dir, "log")), Console: machine.Console + machine.Log})
			}
			break
		}
		r := &Result{Log: readText(filepath.Join(dir, "log")), Console: machine.Console}
		r.Outcome, r.Reason, _ = strings.Cut(strings.TrimSpace(string(text)), ": ")
		r.Took, _ = time.ParseDuration(readText(filepath.Join(dir, "took")))
		results = append(results, r)
	}
	if results == nil {
		return nil, "", errors.Join(errors.New("the machine ran nothing"), err, errors.New(machine.Console+machine.Log))
	}
	return results, machine.Log, nil
}

const (
	memory = 768 << 20
	// hostGrace is how long the host waits behind the guest's own deadline before it kills the machine.
	hostGrace = 10 * time.Second
	// stepsInterval is the pause between two looks for new lines of the timeline.
	stepsInterval = 50 * time.Millisecond
)

// Run boots the machine, waits until the job has ended or the deadline is over, and returns its result. No process of the
// machine is left when it returns. An error means that there was no result to be had.
func (m *Machine) Run(ctx context.Context, job ...string) (*Result, error) {
	start := time.Now()
	if err := os.WriteFile(filepath.Join(m.Dir, "job"), []byte(strings.Join(job, "\n")+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("job: %w", err)
	}
	console, err := os.Create(filepath.Join(m.Dir, "console"))
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	defer console.Close()

	ctx, cancel := context.WithTimeout(ctx, m.Deadline+hostGrace)
	defer cancel()
	boot := m.Boot
	if boot == nil {
		boot = bootTestKernel
	}
	cmd, err := boot(m)
	if err != nil {
		return nil, fmt.Errorf("boot: %w", err)
	}
	cmd.Stdout, cmd.Stderr = console, console
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// The machine's processes share its process group, and die with it.
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Pdeathsig = true, syscall.SIGKILL

	ended := make(chan error, 1)
	go func() {
		// Pdeathsig goes by the thread that started the process, so that thread stays until the end.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			ended <- fmt.Errorf("start the machine: %w", err)
			return
		}
		killed := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
		err := cmd.Wait()
		killed()
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		ended <- err
	}()

	stopSteps := make(chan struct{})
	stepsDone := make(chan struct{})
	go func() {
		defer close(stepsDone)
		m.followSteps(stopSteps)
	}()
	runErr := <-ended
	close(stopSteps)
	<-stepsDone

	result := &Result{Outcome: "fail", Took: time.Since(start)}
	result.Log = readText(filepath.Join(m.Dir, "log"))
	result.Figures = readText(filepath.Join(m.Dir, "figures"))
	result.Console = readText(filepath.Join(m.Dir, "console"))
	text, err := os.ReadFile(filepath.Join(m.Dir, "result"))
	if err != nil {
		// The exit status of user-mode Linux says nothing; the lack of a result does.
		return result, fmt.Errorf("no result from the machine (%w): %w", errors.Join(runErr, ctx.Err()), err)
	}
	result.Outcome, result.Reason, _ = strings.Cut(strings.TrimSpace(string(text)), ": ")
	return result, nil
}

// bootTestKernel returns user-mode Linux, which has a host process for each address space of the guest.
func bootTestKernel(m *Machine) (*exec.Cmd, error) {
	cmd := exec.Command(m.Kernel,
		fmt.Sprintf("mem=%dM", memory>>20),
		"root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro",
		"init="+filepath.Join(m.Binaries, "guest"),
		"con=null", "con0=null,fd:1", "loglevel=5",
		"uml_dir="+m.Dir+"/", "umid=uml",
		"tsoagent.x="+m.Dir,
		"tsoagent.bin="+m.Binaries,
		"tsoagent.src="+m.Tree,
		"tsoagent.deadline="+m.Deadline.String(),
	)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + m.Dir, "TMPDIR=" + memoryDir()}
	return cmd, nil
}

// followSteps copies the timeline until stop is closed and all is copied.
func (m *Machine) followSteps(stop <-chan struct{}) {
	if m.Steps == nil {
		return
	}
	var seen int
	for last := false; !last; {
		select {
		case <-stop:
			last = true
		case <-time.After(stepsInterval):
		}
		text, err := os.ReadFile(filepath.Join(m.Dir, "steps"))
		if err != nil {
			continue // not there yet
		}
		// Whole lines only.
		if end := bytes.LastIndexByte(text, '\n') + 1; end > seen {
			_, _ = m.Steps.Write(text[seen:end])
			seen = end
		}
	}
}

// memoryDir is where the guest's memory lives: a file that is mapped executable. /dev/shm is fastest, but some hosts forbid
// execution there, and containers often have only 64 MiB of it.
func memoryDir() string {
	const shm = "/dev/shm"
	const noExec = 0x8 // ST_NOEXEC, statvfs(3)
	var fs syscall.Statfs_t
	if err := syscall.Statfs(shm, &fs); err == nil && fs.Flags&noExec == 0 && fs.Bavail*uint64(fs.Bsize) > 2*memory {
		return shm
	}
	return os.TempDir()
}

// readText returns a file's text, empty if there is none.
func readText(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(text)
}
