package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
)

// errPaused is why the agent doesn't hand over while it is paused: a pause is the process's, and would end unasked.
var errPaused = errors.New("the agent is paused: resume it first")

// handOver makes this process the program that is installed now, which adopts what is in place as it does after a kill -9. To the service
// manager it is the same service that reloads: nothing is stopped, so nothing is given back. It returns only where that fails, and
// then all goes on as before.
func (s *service) handOver() {
	err := errPaused
	if g := s.fleet.Glance(); g == nil || g.Paused == 0 {
		s.log.Info("handing over to the program that is installed now", "nothing", "is given back")
		s.tell(daemon.SdNotifyReloading, daemon.SdNotifyMonotonicUsec())
		if err = s.become(); err == nil {
			return // in tests
		}
		s.tell(daemon.SdNotifyReady, s.status())
	}
	s.log.Error("not handed over: this program goes on", "err", err)
}

// become executes a program anew in this process, with what it was started with. All files and sockets are closed by that, and the
// lock of the run directory with them.
func become(program string) error {
	if err := syscall.Exec(program, os.Args, os.Environ()); err != nil {
		return fmt.Errorf("execute %s: %w", program, err)
	}
	return nil
}
