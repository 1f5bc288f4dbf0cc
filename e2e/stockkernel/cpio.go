package stockkernel

import (
	"bytes"
	"fmt"
)

// cpio writes an archive as the kernel wants it for its initramfs: the format newc (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	out     bytes.Buffer
	entries int
}

const (
	cpioRegular   = 0o100000
	cpioDirectory = 0o040000
)

// dir adds a directory. It must come before what is in it.
func (c *cpio) dir(name string) { c.add(name, cpioDirectory|0o755, nil) }

// file adds a file.
func (c *cpio) file(name string, mode uint32, text []byte) { c.add(name, cpioRegular|mode, text) }

// bytes ends the archive and returns it.
func (c *cpio) bytes() []byte {
	c.add("TRAILER!!!", 0, nil)
	return c.out.Bytes()
}

// add adds an entry. Header with name, and text, are each padded to 4 bytes; a name ends with a NUL, which counts.
func (c *cpio) add(name string, mode uint32, text []byte) {
	c.entries++
	fmt.Fprintf(&c.out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.entries, mode, 0, 0, 1, 0, len(text), 0, 0, 0, 0, len(name)+1, 0)
	c.out.WriteString(name)
	c.out.WriteByte(0)
	c.pad()
	c.out.Write(text)
	c.pad()
}

func (c *cpio) pad() {
	for c.out.Len()%4 != 0 {
		c.out.WriteByte(0)
	}
}
