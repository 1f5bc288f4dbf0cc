package host

import (
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"

	"tsoagent/agent/doctor"
)

// networkdDirs are where its configuration is, the first one counting most.
var networkdDirs = []string{"etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd"}

// readNetworkd reads the configuration below a root: the first networkd.conf that there is, and then all drop-ins in the order of their names,
// of those with the same name the first (CONFIGURATION DIRECTORIES AND PRECEDENCE in networkd.conf(5)).
func readNetworkd(root fs.FS) (doctor.Networkd, error) {
	n := doctor.Networkd{Routes: true, Rules: true, Source: "the default"}
	var errs []error
	dropins := map[string]string{} // names to paths
	main := ""
	for _, dir := range networkdDirs {
		if _, err := fs.Stat(root, path.Join(dir, "networkd.conf")); err == nil && main == "" {
			main = path.Join(dir, "networkd.conf")
		}
		list, err := fs.ReadDir(root, path.Join(dir, "networkd.conf.d"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range list {
			if name := e.Name(); strings.HasSuffix(name, ".conf") && dropins[name] == "" {
				dropins[name] = path.Join(dir, "networkd.conf.d", name)
			}
		}
	}
	var files []string
	if main != "" {
		files = append(files, main)
	}
	names := make([]string, 0, len(dropins))
	for name := range dropins {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		files = append(files, dropins[name])
	}
	for _, file := range files {
		b, err := fs.ReadFile(root, file)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		apply(&n, "/"+file, string(b))
	}
	return n, errors.Join(errs...)
}

// apply takes what one file says.
func apply(n *doctor.Networkd, file, text string) {
	section := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if line[0] == '[' {
			section = line
			continue
		}
		key, value, _ := strings.Cut(line, "=")
		on, ok := boolean(strings.TrimSpace(value))
		if section != "[Network]" || !ok {
			continue
		}
		switch strings.TrimSpace(key) {
		case "ManageForeignRoutes":
			n.Routes, n.Source = on, file
		case "ManageForeignRoutingPolicyRules":
			n.Rules, n.Source = on, file
		}
	}
}

// boolean is one as systemd reads it (parse_boolean); what is none is passed over there too.
func boolean(s string) (on, ok bool) {
	switch strings.ToLower(s) {
	case "1", "yes", "y", "true", "t", "on":
		return true, true
	case "0", "no", "n", "false", "f", "off":
		return false, true
	}
	return false, false
}
