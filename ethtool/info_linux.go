package ethtool

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	safchain "github.com/safchain/ethtool"
	"golang.org/x/sys/unix"
)

// ReadInfo reads what identifies a device and its driver, by ioctl in the network namespace of
// the calling thread. What a device or driver does not tell stays empty. The error is
// os.ErrNotExist if there is no such device.
//
// Only an Ethernet device is asked for its permanent address: an IP tunnel answers with its local
// IP address, which is no identity, and of InfiniBand's 20 bytes the library returns six.
func ReadInfo(name string) (Info, error) {
	// The socket remembers the namespace (sock_ioctl, net/socket.c), so it is made on this
	// thread; the calls on it can be made on any.
	handle, err := safchain.NewEthtool()
	if err != nil {
		return Info{}, fmt.Errorf("ethtool: open a socket for ioctl: %w", err)
	}
	defer handle.Close()

	ethernet, err := isEthernet(name)
	if err := tolerate(err); err != nil {
		return Info{}, fmt.Errorf("ethtool: read hardware type of %s: %w", name, err)
	}
	var info Info
	done := make(chan error)
	go func() {
		done <- onDeepStack(func() error {
			driver, err := handle.DriverInfo(name)
			if err := tolerate(err); err != nil {
				return err
			}
			info = Info{Driver: driver.Driver, Bus: tidy(driver.BusInfo), Firmware: tidy(driver.FwVersion)}
			if !ethernet {
				return nil
			}
			info.PermAddr, err = handle.PermAddr(name)
			return tolerate(err)
		})
	}()
	if err := <-done; err != nil {
		return Info{}, fmt.Errorf("ethtool: read driver information of %s: %w", name, err)
	}
	return info, nil
}

// onDeepStack runs fn where the goroutine's stack has some 60 KiB free and can't be moved: it
// is called on a fresh goroutine, whose stack its frame makes grow to 128 KiB at once, and more
// than a quarter of a stack in use keeps the collector from shrinking it (runtime.shrinkstack).
//
// safchain/ethtool v0.7.0 passes the address of a variable on its stack to its ioctl method as a
// uintptr. If the stack is moved by the calls in between, the kernel writes to where the variable
// was: nothing is read and memory is overwritten. On a stack that is
// never moved the address stays right. FeatureNames and all that calls it (Features, Change)
// take far larger frames and are not used at all.
//
//go:noinline
func onDeepStack(fn func() error) error {
	var frame [64 << 10]byte
	keep(&frame)
	err := fn()
	keep(&frame)
	return err
}

// keep makes the compiler lay out the frame and hold on to it, without moving it to the heap.
//
//go:noinline
func keep(frame *[64 << 10]byte) { runtime.KeepAlive(frame[0]) }

// tolerate takes a device that has no answer for one that answers nothing.
func tolerate(err error) error {
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil
	case errors.Is(err, unix.ENODEV):
		return &noDeviceError{err}
	}
	return err
}

// tidy empties what some drivers spell out, and drops the white space that others leave.
func tidy(s string) string {
	s = strings.TrimSpace(s)
	if strings.EqualFold(s, "N/A") {
		return ""
	}
	return s
}

// isEthernet says whether the hardware address of the device is an Ethernet address.
func isEthernet(name string) (bool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return false, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFHWADDR, req); err != nil {
		return false, err
	}
	// The answer is a struct sockaddr whose family is the ARPHRD_* type.
	return req.Uint16() == unix.ARPHRD_ETHER, nil
}
