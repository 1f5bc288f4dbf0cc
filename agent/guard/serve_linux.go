package guard

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/routes"
)

// actWithin bounds for how long rules are being taken away, and a next agent is kept waiting.
const actWithin = 5 * time.Second

// watched is a namespace, with what the agent has given for it.
type watched struct {
	Watch
	table *routes.Table
	lock  *os.File
}

func (w *watched) close() error { return errors.Join(w.table.Close(), w.lock.Close()) }

// Serve is the guard's process: it waits for the end of the agent on the other side of a socket, and takes away then what it was told to. It returns
// nil when the agent has said that there is nothing to do. What can't be understood counts as nothing that was said: the rest is watched.
func Serve(agent *os.File, log *slog.Logger) error {
	all := map[uint64]*watched{}
	for {
		m, files, err := receive(agent)
		switch {
		case errors.Is(err, errMessage):
			log.Warn("the agent's guard was told something that makes no sense", "err", err)
		case err != nil:
			return fmt.Errorf("guard: listen to the agent: %w", err)
		case m == nil: // the agent has ended, and has not said so
			return act(all, log)
		case m.Bye:
			return nil
		case m.Drop:
			if w := all[m.ID]; w != nil {
				delete(all, m.ID)
				err = w.close()
			}
		default:
			err = take(all, m, files)
			files = nil
		}
		for _, f := range files {
			_ = f.Close() // of a message that can't have any
		}
		if err != nil && !errors.Is(err, errMessage) {
			log.Warn("the agent's guard can't watch all of it", "err", err)
		}
	}
}

// take watches a namespace. It takes the files over.
func take(all map[uint64]*watched, m *message, files []*os.File) error {
	if len(files) != 2 || all[m.ID] != nil {
		for _, f := range files {
			_ = f.Close()
		}
		return fmt.Errorf("%w: %d files", errMessage, len(files))
	}
	table, err := routes.TableFrom(files[0])
	if err != nil {
		return errors.Join(err, files[1].Close())
	}
	all[m.ID] = &watched{*m.Watch, table, files[1]}
	return nil
}

// receive waits for a message. There is none when the agent has ended.
func receive(agent *os.File) (*message, []*os.File, error) {
	b, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
	var n, oobn, flags int
	for {
		var err error
		n, oobn, flags, _, err = unix.Recvmsg(int(agent.Fd()), b, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err == unix.ECONNRESET { // it ended, and had not read all that it could have: there is nothing that we send
			return nil, nil, nil
		}
		if err != nil {
			return nil, nil, os.NewSyscallError("recvmsg", err)
		}
		break
	}
	if n == 0 {
		return nil, nil, nil
	}
	files, err := filesIn(oob[:oobn])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("%w: it was cut off", errMessage)
	}
	var m message
	if err == nil {
		m, err = parse(b[:n])
	}
	return &m, files, err
}

// filesIn are those that came with a message.
func filesIn(oob []byte) (files []*os.File, err error) {
	control, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errMessage, err)
	}
	for i := range control {
		fds, err := unix.ParseUnixRights(&control[i])
		if err != nil {
			return files, fmt.Errorf("%w: %w", errMessage, err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "of the agent"))
		}
	}
	return files, nil
}

// act takes away what is watched.
func act(all map[uint64]*watched, log *slog.Logger) error {
	late := time.AfterFunc(actWithin, func() {
		log.Error("the agent was killed, and its rules can't all be taken away in time: run `tsoctl restore --stale`")
		os.Exit(1)
	})
	defer late.Stop()
	var errs []error
	for _, w := range all {
		n, err := w.act()
		where := log
		if w.Name != "" {
			where = log.With("netns", w.Name)
		}
		if n > 0 {
			where.Warn("the agent was killed: its rules are taken away, as nobody follows the routes below its clones", "rules", n)
		}
		errs = append(errs, err)
	}
	for _, w := range all {
		errs = append(errs, w.close())
	}
	return errors.Join(errs...)
}

// act takes the rules of one namespace away, unless another agent has taken it over.
func (w *watched) act() (n int, err error) {
	// The lock is that of the file's one opening, which the agent's copy and ours share: if it is held by it, this changes nothing.
	err = unix.Flock(int(w.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("guard: %w", os.NewSyscallError("flock", err))
	}
	var errs []error
	for _, family := range []routes.Family{routes.IPv4, routes.IPv6} {
		done, err := w.drop(family)
		n += done
		errs = append(errs, err)
	}
	return n, errors.Join(errs...)
}

func (w *watched) drop(family routes.Family) (n int, err error) {
	rules, err := w.table.Rules(family)
	if err != nil {
		return 0, err // also where it was interrupted: what it has shown is ours all the same
	}
	var errs []error
	for i := range rules {
		if !w.own(&rules[i]) {
			continue
		}
		switch err := w.table.DeleteRule(rules[i]); {
		case err == nil:
			n++
		case !errors.Is(err, unix.ENOENT): // somebody was quicker
			errs = append(errs, err)
		}
	}
	return n, errors.Join(errs...)
}
