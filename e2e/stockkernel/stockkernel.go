// Package stockkernel finds Debian's stock kernels, which the script `fetch` beside it gets, and boots them in QEMU under software
// emulation: for what the test kernel, user-mode Linux, lacks. See e2e/README.md.
package stockkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"tsoagent/e2e/stockkernel/modules"
	"tsoagent/e2e/testkernel"
)

// ErrMissing means that the machine lacks something that a stock kernel needs. The error's text names it.
var ErrMissing = errors.New("stock kernels need what is missing here")

const (
	emulator  = "qemu-system-x86_64"
	tunDevice = "/dev/net/tun"
)

// Kernel is one of Debian's kernels, unpacked. It is safe for concurrent use.
type Kernel struct {
	dir     string // what `fetch` made
	release string // as `uname -r` says it
	tree    string // of this module

	qemu     string // its path
	emulator string // its version
	nics     []nic
}

// Find returns the newest kernel in the cache whose version begins with version (6.1, 6.12, 6.12.107). It fetches nothing: the error is
// ErrMissing if there is no such kernel, no QEMU or no tap device, or if we aren't root.
func Find(ctx context.Context, tree, version string) (*Kernel, error) {
	qemu, err := exec.LookPath(emulator)
	if err != nil {
		return nil, fmt.Errorf("%w: %s (make test-kernels installs it)", ErrMissing, emulator)
	}
	if _, err := os.Stat(tunDevice); err != nil {
		return nil, fmt.Errorf("%w: %s, for the taps", ErrMissing, tunDevice)
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w: root, for the taps", ErrMissing)
	}
	out, err := exec.CommandContext(ctx, filepath.Join(tree, "e2e", "stockkernel", "fetch"), "--path", version).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return nil, fmt.Errorf("%w: a kernel %s in the cache (make test-kernels fetches it, if apt has one)", ErrMissing, version)
	}
	if err != nil {
		return nil, fmt.Errorf("find stock kernel %s: %w", version, err)
	}
	k := &Kernel{qemu: qemu, dir: strings.TrimSpace(string(out)), tree: tree}
	releases, err := filepath.Glob(filepath.Join(k.dir, "modules", "lib", "modules", "*"))
	if err != nil || len(releases) != 1 {
		return nil, fmt.Errorf("stock kernel %s: %d module trees in %s", version, len(releases), k.dir)
	}
	k.release = filepath.Base(releases[0])
	return k, k.askEmulator(ctx)
}

// askEmulator asks QEMU for its version, and which of the cards it has.
func (k *Kernel) askEmulator(ctx context.Context) error {
	version, err := exec.CommandContext(ctx, k.qemu, "--version").Output()
	if err != nil {
		return fmt.Errorf("version of %s: %w", k.qemu, err)
	}
	k.emulator, _, _ = strings.Cut(strings.Replace(string(version), "emulator version ", "", 1), "\n")
	devices, err := exec.CommandContext(ctx, k.qemu, "-device", "help").Output()
	if err != nil {
		return fmt.Errorf("devices of %s: %w", k.qemu, err)
	}
	for _, n := range nics {
		if strings.Contains(string(devices), `name "`+n.device+`"`) {
			k.nics = append(k.nics, n)
		}
	}
	return nil
}

// Release is what `uname -r` says of the kernel.
func (k *Kernel) Release() string { return k.release }

// Emulator is what QEMU says of its version.
func (k *Kernel) Emulator() string { return k.emulator }

// AllCards are the names of the cards that a machine has where QEMU has them all.
func AllCards() []string { return names(nics) }

// Cards are the names of the cards that the kernel's machines have.
func (k *Kernel) Cards() []string {
	return names(k.nics)
}

func names(nics []nic) []string {
	var list []string
	for _, n := range nics {
		list = append(list, n.name)
	}
	return list
}

// BuildLoader builds the first process of a machine, static, into dir, where Machine.Binaries looks for it.
func BuildLoader(ctx context.Context, tree, dir string) error {
	return testkernel.BuildCommand(ctx, tree, "e2e/stockkernel/loader", dir)
}

// A nic is a network card of the machine, and at the other end of its wire a second one, named NAME-peer, of virtio.
type nic struct {
	name   string // in the guest
	device string // QEMU's
	driver string // the kernel's module
}

// nics are the cards of every machine whose QEMU has them. virtio-net offers TSO only on a tap with vnet_hdr.
var nics = []nic{
	{"e1000e", "e1000e", "e1000e"},
	{"vmxnet3", "vmxnet3", "vmxnet3"},
	{"virtio", "virtio-net-pci", "virtio_net"},
	{"igb", "igb", "igb"}, // from QEMU 8.0 on
}

const (
	// memory is the machine's, in MiB.
	memory = 1024
	// patience is by how much the scenarios' deadlines grow. Emulated, a machine takes about 4 times as long as the test kernel for
	// the same, and many times that on a host whose processors others want, too.
	patience = 12
)

// rootModules are what the kernel needs before it has a root, each with its dependencies.
var rootModules = []string{"virtio_pci", "9pnet_virtio", "9p"}

// Boot returns the command that is the machine (testkernel.Machine.Boot).
func (k *Kernel) Boot(m *testkernel.Machine) (*exec.Cmd, error) {
	initramfs := filepath.Join(m.Dir, "initramfs")
	if err := k.writeInitramfs(initramfs, filepath.Join(m.Binaries, "loader")); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	var devices, addresses, drivers []string
	for i, n := range k.nics {
		for j, end := range []struct{ tap, device, name string }{
			{"near", n.device, n.name},
			{"far", "virtio-net-pci", n.name + "-peer"},
		} {
			tap := end.tap + strconv.Itoa(i+1)
			mac := fmt.Sprintf("52:54:00:00:%02x:%02x", i+1, j+1)
			devices = append(devices,
				"-netdev", "tap,script=no,downscript=no,id="+tap+",ifname="+tap,
				// No boot ROM: nothing boots from it, and Debian has them in another package.
				"-device", end.device+",romfile=,netdev="+tap+",mac="+mac)
			addresses = append(addresses, end.name+"="+mac)
		}
		drivers = append(drivers, n.driver)
	}
	// One thread emulates both processors by turns. With a thread for each, a processor can go on with an instruction that the other one has
	// replaced: when the kernel patches itself (a static key, as for each socket with SO_TIMESTAMP, which is each ping), it dies of
	// "Oops: int3" (QEMU 7.2: after 2 to 5 s of such keys beside traffic; with one thread not once in 7,900). It costs no time here.
	args := []string{filepath.Join(k.tree, "e2e", "stockkernel", "network"), strconv.Itoa(len(k.nics)), k.qemu,
		"-machine", "pc", "-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(memory),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", filepath.Join(k.dir, "vmlinux"), "-initrd", initramfs,
		"-append", strings.Join([]string{
			// A panic ends the machine, and an oops, behind which it may hang, is one. Mitigations only cost here. The HPET follows the host's clock; the TSC is measured at boot, and
			// on a busy host so wrongly that ten seconds passed in one. There, the timer has also been found not to work ("IO-APIC + timer doesn't work!").
			"console=ttyS0", "loglevel=5", "panic=-1", "oops=panic", "mitigations=off", "clocksource=hpet", "no_timer_check",
			"tsoagent.root=9p",
			"tsoagent.init=" + filepath.Join(m.Binaries, "guest"),
			"tsoagent.x=x",
			"tsoagent.bin=" + m.Binaries,
			"tsoagent.src=" + m.Tree,
			"tsoagent.modules=" + filepath.Join(k.dir, "modules"),
			"tsoagent.drivers=" + strings.Join(drivers, ","),
			"tsoagent.nics=" + strings.Join(addresses, ","),
			"tsoagent.cards=" + strings.Join(k.Cards(), ","),
			"tsoagent.patience=" + strconv.Itoa(patience),
			"tsoagent.deadline=" + m.Deadline.String(),
		}, " "),
		// Without remap, files of two file systems of the host could look like one to the guest.
		"-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
		"-device", "virtio-9p-pci,fsdev=root,mount_tag=root",
		"-fsdev", "local,id=x,path=" + m.Dir + ",security_model=none",
		"-device", "virtio-9p-pci,fsdev=x,mount_tag=x",
	}
	cmd := exec.Command(args[0], append(args[1:], devices...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + m.Dir}
	// The taps live in a namespace of the machine's own, and die with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	return cmd, nil
}

// writeInitramfs writes the loader as /init and the modules for the root, in the order to load them.
func (k *Kernel) writeInitramfs(path, loader string) error {
	archive := &cpio{}
	text, err := os.ReadFile(loader)
	if err != nil {
		return err
	}
	archive.dir("modules")
	archive.file("init", 0o755, text)

	tree := modules.Tree(filepath.Join(k.dir, "modules", "lib", "modules", k.release))
	seen := map[string]bool{}
	for _, name := range rootModules {
		files, err := tree.Files(name)
		if err != nil {
			return err
		}
		for _, file := range files {
			if seen[file] {
				continue
			}
			seen[file] = true
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			archive.file(fmt.Sprintf("modules/%02d-%s", len(seen), filepath.Base(file)), 0o644, text)
		}
	}
	return os.WriteFile(path, archive.bytes(), 0o644)
}
