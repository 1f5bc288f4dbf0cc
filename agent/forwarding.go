package agent

import (
	"errors"
	"maps"
	"os"

	"tsoagent/routes"
)

// forwarding reads whether the namespace forwards. The kernel tells of changes in a group of its
// own (RTNLGRP_IPV4_NETCONF); reading two small files in the rounds that plan something is
// cheaper than to follow it. The files stay open: which namespace they are of is decided when
// they are opened (net_ctl_header_lookup, net/sysctl_net.c). Open, they don't keep it alive.
type forwarding struct {
	files map[routes.Family]*os.File
	b     [1]byte // what is read, so that no round allocates it
}

// openForwarding opens the files of the calling thread's namespace. A family that is not there
// doesn't forward.
func openForwarding() *forwarding {
	f := forwarding{files: map[routes.Family]*os.File{}}
	for family, path := range map[routes.Family]string{
		routes.IPv4: "/proc/sys/net/ipv4/ip_forward",
		routes.IPv6: "/proc/sys/net/ipv6/conf/all/forwarding",
	} {
		if file, err := os.Open(path); err == nil {
			f.files[family] = file
		}
	}
	return &f
}

// read reads them. Where they are as before, what was read then is returned again: it is never changed.
func (f *forwarding) read(before map[routes.Family]bool) map[routes.Family]bool {
	if f == nil {
		return before
	}
	out := before
	for family, file := range f.files {
		n, _ := file.ReadAt(f.b[:], 0)
		forwards := n == 1 && f.b[0] == '1'
		if have, known := out[family]; known && have == forwards {
			continue
		}
		fresh := maps.Clone(out)
		fresh[family] = forwards
		out = fresh
	}
	return out
}

// Close closes the files.
func (f *forwarding) Close() error {
	var errs []error
	for _, file := range f.files {
		errs = append(errs, file.Close())
	}
	return errors.Join(errs...)
}
