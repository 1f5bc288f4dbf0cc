package probe

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ReadIdentity identifies the kernel that runs.
func ReadIdentity() (Identity, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Identity{}, fmt.Errorf("probe: uname: %w", err)
	}
	id := Identity{
		Release:       unix.ByteSliceToString(u.Release[:]),
		KernelVersion: unix.ByteSliceToString(u.Version[:]),
		Machine:       unix.ByteSliceToString(u.Machine[:]),
		Modules:       map[string]ModuleState{},
	}
	dir := "/lib/modules/" + id.Release
	builtin, available := moduleList(dir, "modules.builtin"), moduleList(dir, "modules.dep")
	var unknown []module
	for _, m := range modules {
		switch {
		case loaded(m.name):
			id.Modules[m.name] = Loaded
		case builtin[m.name]:
			id.Modules[m.name] = Builtin
		case available[m.name]:
			id.Modules[m.name] = Available
		default:
			id.Modules[m.name] = Absent
			unknown = append(unknown, m)
		}
	}
	return id, bySymbol(id.Modules, unknown)
}

// loaded says whether a module is loaded. What is built in may have a directory, too, but no
// state.
func loaded(name string) bool {
	b, err := os.ReadFile("/sys/module/" + name + "/initstate")
	return err == nil && strings.TrimSpace(string(b)) == "live"
}

// moduleList reads the names of modules from a list of depmod's; none if there is no list.
func moduleList(dir, file string) map[string]bool {
	names := map[string]bool{}
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return names
	}
	for line := range strings.Lines(string(b)) {
		// modules.dep: "kernel/net/ipv4/esp4.ko.xz: …"
		name, _, _ := strings.Cut(path.Base(strings.Fields(line + " ")[0]), ".ko")
		names[strings.ReplaceAll(name, "-", "_")] = true
	}
	return names
}

// bySymbol finds out which of the modules are compiled into a kernel that came without a list
// of them, by a function of theirs. The names in /proc/kallsyms are there for everybody, the
// addresses are not. A kernel without it leaves them Absent.
func bySymbol(states map[string]ModuleState, unknown []module) error {
	if len(unknown) == 0 {
		return nil
	}
	want := map[string]string{}
	for _, m := range unknown {
		want[m.symbol] = m.name
	}
	f, err := os.Open("/proc/kallsyms")
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		// "0000000000000000 t esp4_gso_segment", and "[esp4_offload]" behind it for a module.
		fields := bytes.Fields(s.Bytes())
		if len(fields) != 3 {
			continue
		}
		if name, ok := want[string(fields[2])]; ok {
			states[name] = Builtin
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	return nil
}
