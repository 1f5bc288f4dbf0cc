package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// prepareStock does what a stock kernel wants more. There, the host's root is a 9p mount, and its directories are bound from it; only
// /mnt/x is a mount of its own. On the command line:
//
//	tsoagent.root=9p              this is a stock kernel
//	tsoagent.x=TAG                the mount tag, and not the directory
//	tsoagent.modules=DIR          host directory with the kernel's modules, bound to /mnt/modules
//	tsoagent.drivers=NAME,…       modules to load, as nothing here does that for a PCI device
//	tsoagent.nics=NAME=MAC,…      how the network cards are to be named
//	tsoagent.cards=NAME,…         which of them a scenario takes for its wires, in order (bin/nic)
//	tsoagent.patience=N           how many times slower than the test kernel this machine is
func prepareStock(args map[string]string) error {
	// The kernel asks for modules by itself: link kinds, ciphers, socket families, nftables expressions.
	loader := filepath.Join(binDir, "loader")
	if err := os.WriteFile("/proc/sys/kernel/modprobe", []byte(loader), 0o644); err != nil {
		return fmt.Errorf("modprobe: %w", err)
	}
	if err := loadDrivers(args["tsoagent.drivers"]); err != nil {
		return err
	}
	return nameNICs(args["tsoagent.nics"])
}

// loadDrivers loads the modules in a list with commas.
func loadDrivers(list string) error {
	drivers := strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
	if out, err := exec.Command(filepath.Join(binDir, "loader"), drivers...).CombinedOutput(); err != nil {
		return fmt.Errorf("drivers: %w: %s", err, out)
	}
	return nil
}

// nameNICs gives each card the name that goes with its address. The kernel's own names follow the order in which the drivers came up.
func nameNICs(list string) error {
	devices, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("devices: %w", err)
	}
	byAddress := map[string]string{}
	for _, d := range devices {
		byAddress[d.HardwareAddr.String()] = d.Name
	}
	var batch strings.Builder
	for item := range strings.SplitSeq(list, ",") {
		name, address, _ := strings.Cut(item, "=")
		device, ok := byAddress[address]
		if !ok {
			return fmt.Errorf("no card with the address %s for %s", address, name)
		}
		if device != name {
			fmt.Fprintf(&batch, "link set %s down\nlink set %[1]s name %s\n", device, name)
		}
	}
	cmd := exec.Command("/sbin/ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(batch.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("name the cards: %w: %s", err, out)
	}
	return nil
}
