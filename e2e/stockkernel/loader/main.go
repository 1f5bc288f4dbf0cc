// Command loader is the first process of a stock kernel, and later its modprobe.
//
// Debian's kernels have as modules what it takes to reach their root here. So the initramfs holds this program as its init and
// those modules in /modules, named in the order to load them. It loads them, mounts the host's root read-only through 9p,
// makes that its root and becomes the program behind `tsoagent.init=` on the kernel's command line.
//
// As any other process it is modprobe, as far as the kernel uses it (`modprobe -q -- NAME`): /proc/sys/kernel/modprobe names it.
// The modules come from /mnt/modules, where the guest's init mounts them.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tsoagent/e2e/stockkernel/modules"
)

func main() {
	if os.Getpid() == 1 {
		err := start()
		// An init that ends is a kernel panic, and with panic=-1 a reboot, which ends the machine.
		fmt.Println("loader:", err)
		os.Exit(1)
	}
	if err := modprobe(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "modprobe:", err)
		os.Exit(1)
	}
}

// start goes from the initramfs to the host's root. It returns only with an error.
func start() error {
	args, err := commandLine()
	if err != nil {
		return err
	}
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	if err := modules.Load(files); err != nil {
		return err
	}

	const root = "/root"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	// The host's files don't change while the machine runs, so the guest may keep what it read.
	if err := unix.Mount("root", root, "9p", unix.MS_RDONLY, "trans=virtio,version=9p2000.L,cache=loose,msize=512000"); err != nil {
		return fmt.Errorf("mount the host's root: %w", err)
	}
	if err := unix.Unmount("/proc", 0); err != nil {
		return fmt.Errorf("unmount /proc: %w", err)
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	init := args["tsoagent.init"]
	return fmt.Errorf("%s: %w", init, unix.Exec(init, []string{init}, os.Environ()))
}

// commandLine mounts /proc and returns the kernel's command line as a map.
func commandLine() (map[string]string, error) {
	if err := os.MkdirAll("/proc", 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return nil, fmt.Errorf("mount /proc: %w", err)
	}
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	args := map[string]string{}
	for word := range strings.FieldsSeq(string(text)) {
		key, value, _ := strings.Cut(word, "=")
		args[key] = value
	}
	return args, nil
}

// modprobe loads each module or alias that is named.
func modprobe(args []string) error {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return err
	}
	tree := modules.Tree("/mnt/modules/lib/modules/" + unix.ByteSliceToString(uname.Release[:]))
	var failed []error
	for _, name := range args {
		if strings.HasPrefix(name, "-") {
			continue // -q, --: it is quiet as it is
		}
		files, err := tree.Files(name)
		if err == nil {
			err = modules.Load(files)
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}
