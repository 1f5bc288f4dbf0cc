// Package modules reads depmod's indices, finds the modules behind a name and loads them, as modprobe does.
package modules

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrUnknown means that no module has the name or alias. What is built into the kernel isn't unknown.
var ErrUnknown = errors.New("no such module")

// Tree is the modules of one kernel: the directory lib/modules/RELEASE.
type Tree string

// Files returns the files of the modules that name stands for, each behind those that it depends on. The name is a module's
// or an alias, such as net-pf-2-proto-50 or rtnl-link-xfrm. What is built in has none.
func (t Tree) Files(name string) ([]string, error) {
	dependencies, err := t.dependencies()
	if err != nil {
		return nil, err
	}
	names := []string{name}
	if _, ok := dependencies[underscored(name)]; !ok {
		if names, err = t.aliases(name); err != nil {
			return nil, err
		}
	}
	var files []string
	for _, n := range names {
		entry, ok := dependencies[underscored(n)]
		if !ok {
			continue // built in, or not kept
		}
		// modules.dep lists a module's dependencies from the nearest to the farthest.
		for _, file := range slices.Backward(entry) {
			if full := filepath.Join(string(t), file); !slices.Contains(files, full) {
				files = append(files, full)
			}
		}
	}
	if len(files) == 0 && !t.builtIn(name) {
		return nil, fmt.Errorf("%s: %w", name, ErrUnknown)
	}
	return files, nil
}

// dependencies reads modules.dep: by module, its own file and those of its dependencies.
func (t Tree) dependencies() (map[string][]string, error) {
	found := map[string][]string{}
	err := t.eachLine("modules.dep", func(line string) {
		file, rest, ok := strings.Cut(line, ":")
		if ok {
			found[moduleName(file)] = append([]string{file}, strings.Fields(rest)...)
		}
	})
	return found, err
}

// aliases returns the modules that have the alias. depmod's aliases are shell patterns (`alias pci:v00008086d*bc* e1000e`).
func (t Tree) aliases(alias string) ([]string, error) {
	var names []string
	err := t.eachLine("modules.alias", func(line string) {
		words := strings.Fields(line)
		if len(words) != 3 || words[0] != "alias" {
			return
		}
		if match(words[1], alias) && !slices.Contains(names, words[2]) {
			names = append(names, words[2])
		}
	})
	return names, err
}

// match reports whether the pattern matches the alias, '-' being as good as '_'. The kernel asks for names such as
// crypto-rfc4106(gcm(aes)), which have no pattern's meaning.
func match(pattern, alias string) bool {
	pattern, alias = underscored(pattern), underscored(alias)
	if pattern == alias {
		return true
	}
	ok, err := path.Match(pattern, alias)
	return ok && err == nil
}

// builtIn reports whether the kernel has the module in itself.
func (t Tree) builtIn(name string) bool {
	found := false
	_ = t.eachLine("modules.builtin", func(line string) { // without the file nothing is built in
		found = found || moduleName(line) == underscored(name)
	})
	return found
}

// eachLine calls f with each line of one of depmod's files.
func (t Tree) eachLine(file string, f func(line string)) error {
	r, err := os.Open(filepath.Join(string(t), file))
	if err != nil {
		return err
	}
	defer r.Close()
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f(lines.Text())
	}
	return lines.Err()
}

// moduleName returns the name of the module in a file: kernel/net/xfrm/xfrm_interface.ko is xfrm_interface.
func moduleName(file string) string {
	return underscored(strings.TrimSuffix(path.Base(file), ".ko"))
}

func underscored(name string) string { return strings.ReplaceAll(name, "-", "_") }

// Load loads modules out of their files, in order. One that is loaded already is no error.
func Load(files []string) error {
	for _, file := range files {
		if err := load(file); err != nil {
			return fmt.Errorf("load %s: %w", file, err)
		}
	}
	return nil
}

func load(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
