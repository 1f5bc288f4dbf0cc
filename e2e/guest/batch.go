package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// runBatch runs several jobs one after the other, each behind a word "+" but the first, and each with a mount namespace, /run, /tmp and /var/lib of its
// own. A word DEADLINE=… ahead of all says how long each may take, and one CARDS=… ahead of a job is its TSOAGENT_CARDS. The log, result and steps of
// the nth job, and how long it took, are in the directory N of exchangeDir.
//
// After each, all processes are gone, and with them the namespaces, and the cards have come back. If then the machine is not what it was the batch ends: the
// rest of it is for another machine.
func runBatch(args []string) string {
	text, _ := strings.CutPrefix(args[0], "DEADLINE=")
	deadline, err := time.ParseDuration(text)
	if err != nil {
		fmt.Println("guest: batch:", err)
		return "fail"
	}
	before, err := machineState()
	if err != nil {
		fmt.Println("guest: batch:", err)
		return "fail"
	}
	loaded := modules()
	for n, job := range splitJobs(args[1:]) {
		if n > 0 {
			if err := cleanUp(loaded, before); err != nil {
				fmt.Println("guest: the batch ends here:", err)
				return "pass"
			}
		}
		if err := runOne(strconv.Itoa(n), job, deadline); err != nil {
			fmt.Println("guest:", strings.Join(job, " ")+":", err)
		}
	}
	return "pass"
}

// splitJobs splits the words of a batch at each "+".
func splitJobs(words []string) [][]string {
	jobs := [][]string{nil}
	for _, w := range words {
		if w == "+" {
			jobs = append(jobs, nil)
			continue
		}
		jobs[len(jobs)-1] = append(jobs[len(jobs)-1], w)
	}
	return jobs
}

// runOne runs one job of a batch as a process of its own, until it ends or its deadline is over.
func runOne(name string, job []string, deadline time.Duration) error {
	dir := filepath.Join(exchangeDir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	start := time.Now()
	defer func() {
		_ = os.WriteFile(filepath.Join(dir, "took"), []byte(time.Since(start).String()), 0o644)
	}()
	env := append(os.Environ(), resultVariable+"="+dir, "TSOAGENT_DEADLINE="+time.Now().Add(deadline).Format(time.RFC3339Nano))
	if cards, ok := strings.CutPrefix(job[0], "CARDS="); ok {
		env = append(env, "TSOAGENT_CARDS="+strings.ReplaceAll(cards, ",", " "))
		job = job[1:]
	}
	cmd := exec.Command(filepath.Join(binDir, "guest"), append([]string{"alone"}, job...)...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		return err
	}
	// As in initialise: first what it has started, so that it can say where it stood.
	soon := time.AfterFunc(deadline, func() {
		fmt.Fprintln(log, "guest: deadline of", deadline, "passed, killing what runs")
		killOthers(os.Getpid(), cmd.Process.Pid)
	})
	defer soon.Stop()
	end := time.AfterFunc(deadline+3*time.Second, func() { _ = cmd.Process.Kill() })
	defer end.Stop()
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		err = nil // it has failed, and said so
	}
	return err
}

// alone gives this process, which has a mount namespace of its own, what the machine has once: directories for what is temporary.
func alone() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	for _, dir := range []string{"/run", "/tmp", "/var/lib", "/dev/shm"} {
		if err := mount("tmpfs", dir, "tmpfs", ""); err != nil {
			return err
		}
	}
	return errors.Join(os.Mkdir("/run/netns", 0o755), os.Mkdir("/run/lock", 0o755))
}

// How long the kernel may take to let go of namespaces and modules, which it does by and by: of all that matters, and of what doesn't.
const (
	cleanUpTime = 2 * time.Minute
	unloadTime  = 20 * time.Second
)

// cleanUp makes the machine what it was. The error says what can't be had back.
func cleanUp(loaded []string, before string) error {
	start := time.Now()
	killOthers(os.Getpid())
	drivers := strings.FieldsFunc(os.Getenv("TSOAGENT_DRIVERS"), func(r rune) bool { return r == ',' })
	// The cards' drivers go, too: what was set on a card goes with them.
	var left []string
	for ; ; time.Sleep(200 * time.Millisecond) {
		left = unload(func(name string) bool { return slices.Contains(loaded, name) && !slices.Contains(drivers, name) })
		if len(left) == 0 || time.Since(start) > unloadTime {
			break
		}
	}
	for _, name := range left {
		// With the first two, the kernel cuts elsewhere (KERNEL.md 3).
		if name == "esp4_offload" || name == "esp6_offload" || slices.Contains(drivers, name) {
			return fmt.Errorf("module %s stays", name)
		}
	}
	if err := loadDrivers(strings.Join(drivers, ",")); err != nil {
		return err
	}
	for ; ; time.Sleep(200 * time.Millisecond) {
		err := nameNICs(os.Getenv("TSOAGENT_NICS"))
		after := ""
		if err == nil {
			after, err = machineState()
		}
		if err == nil && before != after {
			err = fmt.Errorf("the machine is not what it was:\n%s\nand was:\n%s", after, before)
		}
		if err == nil || time.Since(start) > cleanUpTime {
			return err
		}
	}
}

// unload unloads the modules but those to keep, as far as nothing uses them, and returns those that are left.
func unload(keep func(string) bool) []string {
	var left []string
	for _, name := range modules() {
		if !keep(name) && unix.DeleteModule(name, unix.O_NONBLOCK) != nil {
			left = append(left, name)
		}
	}
	return left
}

// modules are the names of the modules that are loaded.
func modules() []string {
	text, err := os.ReadFile("/proc/modules")
	if err != nil {
		return nil // a kernel without modules
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		names = append(names, line[:strings.IndexByte(line, ' ')])
	}
	return names
}

// machineState is what there is in the machine's own namespace, and whose settings are everybody's.
func machineState() (string, error) {
	out, err := exec.Command("sh", "-ec", `
		ip -o link | awk '{ print $2, $4, $5 }' | sort
		ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip xfrm policy; ip xfrm state
		for c in $(ls /sys/class/net); do ethtool -k $c 2>/dev/null | grep segmentation || true; done
		nft list ruleset 2>/dev/null || true
		cat /proc/sys/user/max_net_namespaces
		ls /sys/bus/netdevsim/devices 2>/dev/null || true`).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("state of the machine: %w: %s", err, out)
	}
	return string(out), nil
}
