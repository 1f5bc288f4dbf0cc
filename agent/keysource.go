package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"tsoagent/sockopt"
)

// dialKeys opens the watcher of TCP keys. A kernel that has none, or can't show them, is no error.
func (s *sources) dialKeys() error {
	return s.dialledKeys(sockopt.Dial(sockopt.Options{Period: time.Duration(s.cfg.TCPKeysEvery), More: s.aoKeys, Trust: s.trust.trusted}))
}

// dialledKeys takes what was opened, or why it was not. It logs outside of the lock: where a log is slow, others who want
// the lock don't wait for it.
func (s *sources) dialledKeys(w *sockopt.Watcher, err error) error {
	switch first := s.takeKeys(w, err); {
	case err == nil:
		return nil
	case first && errors.Is(err, unix.ENOPROTOOPT):
		s.log.Info("the kernel has no TCP-MD5: nothing can be signed")
		return nil
	case first && errors.Is(err, unix.EPROTONOSUPPORT):
		s.log.Info("TCP-MD5 keys are not seen", "why", err)
		return nil
	}
	return fmt.Errorf("agent: %w", err)
}

// takeKeys is the part of dialledKeys under the lock. It reports whether there was no watcher before.
func (s *sources) takeKeys(w *sockopt.Watcher, err error) (first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first = s.keys == nil
	if err == nil {
		w.Hooked(s.hooked.all)
		if s.keys != nil {
			s.keep(s.keyStats())
		}
		s.keys = w
	} else if first && errors.Is(err, unix.EPROTONOSUPPORT) {
		s.noKeys = err.Error()
	}
	return first
}

// aoKeys are TCP-AO's keys, none where they aren't known, and how many sockets have more than are told.
func (s *sources) aoKeys() (keys []sockopt.Key, cut int, err error) {
	s.mu.Lock()
	ao := s.hooked.ao
	s.mu.Unlock()
	if ao == nil {
		return nil, 0, nil
	}
	err = s.in(func() (err error) {
		keys, cut, err = ao.Keys()
		return err
	})
	return keys, cut, err
}

// followKeys follows the keys, and calls looked after each look.
func (s *sources) followKeys(ctx context.Context, in *inbox, looked func()) {
	if s.keys == nil {
		in.put(batch{keys: []sockopt.Event{sockopt.KeysSet{}}})
		return
	}
	tell := func(ev []sockopt.Event) {
		in.put(batch{keys: ev})
		looked()
	}
	s.follow(ctx, "sockopt", s.dialKeys,
		func() error { return s.keys.Run(ctx, tell) },
		func(err error) { tell([]sockopt.Event{sockopt.Lost{Err: err}}) })
}

// setHooked takes how keys are known from now on. What was set before that is looked at.
func (s *sources) setHooked(h hooked) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hooked = h
	if s.keys != nil {
		s.keys.Hooked(h.all)
		s.keys.Look()
	}
}

// lookAtKeys has the keys looked at now: one was set or deleted.
func (s *sources) lookAtKeys() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys != nil {
		s.keys.Look()
	}
}

// lookAtKeysSoon has them looked at when there is time: a connection with keys came or went.
func (s *sources) lookAtKeysSoon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys != nil {
		s.keys.LookSoon()
	}
}

// keyStats are the counters of the watcher, which is there. The lock is held.
func (s *sources) keyStats() SourceReport {
	k := s.keys.Stats()
	return SourceReport{
		Source: "sockopt", Events: k.Told, Dumps: k.Dumps, Overruns: k.Overruns, Undecodable: k.Undecodable,
		Seconds: k.Total.Seconds(), Sockets: k.Sockets, Traced: s.hooked.functions, Untraced: s.hooked.why,
	}
}

// missing is what the kernel can't tell, in words.
func (s *sources) missing() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noKeys == "" {
		return nil
	}
	return []string{"TCP-MD5 keys are not seen, all else works: " + s.noKeys}
}
