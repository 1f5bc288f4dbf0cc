package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"tsoagent/agent"
	"tsoagent/agent/metrics"
)

// A service is what the agent is to the machine around it: it tells systemd when it is ready and that it lives
// (sd_notify(3)), takes over another configuration at SIGHUP, hands over to another program at SIGUSR2, and lets Prometheus scrape. Without systemd there is
// nobody to tell, which costs nothing.
type service struct {
	fleet  *agent.Fleet
	log    *slog.Logger
	load   func() (agent.Config, error)
	hup    <-chan os.Signal
	asks   chan chan<- error // who asks for a reload over the control API hears what came of it
	usr2   <-chan os.Signal
	become func() error // executes the program that is installed now in this process, and does not return if it can
	notify func(state string) error
	// watchdog is how often systemd wants to hear that the loops go round, 0 for never.
	watchdog time.Duration
	metrics  metricsServer
	ready    atomic.Bool // what is needed has been in place once
}

// notifySystemd sends a state to systemd, if there is one that wants it.
func notifySystemd(state string) error {
	_, err := daemon.SdNotify(false, state)
	return err
}

// run serves until serving ends, which is when all is given back; stopped ends when the agent is told to stop. What
// goes wrong is told in the log: none of it is a reason to leave the network alone.
func (s *service) run(stopped, serving context.Context, cfg agent.Config) {
	s.metrics.health = metrics.Health{Alive: s.fleet.Alive, Ready: s.ready.Load}
	s.metrics.serve(serving, cfg)
	defer s.metrics.stop()
	fed := make(chan struct{})
	if s.watchdog > 0 {
		go func() { defer close(fed); s.feed(stopped, serving) }()
	} else {
		close(fed)
	}
	defer func() { <-fed }()
	stop, ready, hup, usr2 := stopped.Done(), s.fleet.Ready(), s.hup, s.usr2
	s.fleet.OnReload(func(ctx context.Context) error { return s.ask(ctx, stopped) })
	for {
		select {
		case <-serving.Done():
			return
		case <-stop:
			stop, ready, hup, usr2 = nil, nil, nil, nil
			s.tell(daemon.SdNotifyStopping)
		case <-ready:
			s.ready.Store(true)
			s.tell(daemon.SdNotifyReady, s.status())
		case <-hup:
			_ = s.reload(stopped, serving) // the log has it
		case <-usr2:
			s.handOver()
		case heard := <-s.asks:
			heard <- s.reload(stopped, serving)
		}
	}
}

// ask has the configuration reloaded, and says what came of it.
func (s *service) ask(ctx, stopped context.Context) error {
	heard := make(chan error, 1)
	select {
	case s.asks <- heard:
		return <-heard
	case <-ctx.Done():
		return ctx.Err()
	case <-stopped.Done():
		return agent.ErrStopping
	}
}

// reload reads the configuration again. If it is wrong, the one before it stays in use, and the error says why.
func (s *service) reload(stopped, serving context.Context) error {
	s.tell(daemon.SdNotifyReloading, daemon.SdNotifyMonotonicUsec())
	cfg, err := s.load()
	if err != nil {
		s.fleet.RefuseReload(err)
	} else {
		err = s.fleet.Reload(stopped, cfg)
	}
	if stopped.Err() != nil || serving.Err() != nil {
		return agent.ErrStopping
	}
	if err != nil {
		s.log.Error("the configuration is not reloaded: the one before it stays in use", "err", err)
		s.tell(daemon.SdNotifyReady, s.status())
		return err
	}
	s.metrics.serve(serving, s.fleet.Config())
	return nil
}

// feed tells systemd that the loops go round, three times in the time that it waits for, as long as each loop
// answers.
func (s *service) feed(stopped, serving context.Context) {
	every := s.watchdog / 3
	t := time.NewTicker(every)
	defer t.Stop()
	hung := false
	for {
		answered, cancel := context.WithTimeout(stopped, every)
		err := s.fleet.Alive(answered)
		cancel()
		switch {
		case stopped.Err() != nil, serving.Err() != nil:
			return
		case err == nil:
			hung = false
			s.tell(daemon.SdNotifyWatchdog, s.status())
		case !hung:
			hung = true
			s.log.Error("the watchdog is not fed", "err", err, "restart_in", s.watchdog)
		}
		select {
		case <-stopped.Done():
			return
		case <-serving.Done():
			return
		case <-t.C:
		}
	}
}

// tell sends states to systemd, in one message.
func (s *service) tell(states ...string) {
	if err := s.notify(strings.Join(states, "\n")); err != nil {
		s.log.Warn("systemd can't be told", "state", states[0], "err", err)
	}
}

// status is the line that `systemctl status` shows.
func (s *service) status() string { return statusLine(s.fleet.Glance()) }

func statusLine(g *agent.Glance) string {
	if g == nil {
		return "STATUS=reading the kernel's state"
	}
	text := fmt.Sprintf("%s: %s, %s, %s, %s", g.Mode, count(g.Coverages, "coverage"), count(g.Holds, "feature"), count(g.Locks, "route"), count(g.Clones, "clone"))
	if g.Namespaces > 1 {
		text += fmt.Sprintf(" (and %s)", count(g.Namespaces-1, "other namespace"))
	}
	switch {
	case g.Paused > 0 && g.Paused == max(g.Namespaces, 1):
		text += "; paused"
	case g.Paused > 0:
		text += fmt.Sprintf("; %s paused", count(g.Paused, "namespace"))
	}
	if g.Degraded {
		text += "; needs a look"
	}
	return "STATUS=" + text + "; `tsoctl status` has more"
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// rereadable refuses to read again what can be read once: a pipe has nothing more to say, which would be taken for an empty
// configuration, or keeps who reads it waiting.
func rereadable(file string) error {
	if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file, and can't be read again", file)
	}
	return nil // an error is told by who reads it
}

// A metricsServer lets Prometheus scrape, with the configuration that it was given last.
type metricsServer struct {
	collector *metrics.Collector
	health    metrics.Health
	log       *slog.Logger

	address, webConfig string
	cancel             context.CancelFunc
	done               chan struct{}
}

// serve begins to serve until the context ends, or goes on where nothing has changed.
func (m *metricsServer) serve(ctx context.Context, cfg agent.Config) {
	if m.cancel != nil && m.address == cfg.Metrics && m.webConfig == cfg.MetricsWebConfig {
		return
	}
	m.stop()
	m.address, m.webConfig = cfg.Metrics, cfg.MetricsWebConfig
	var mine context.Context
	mine, m.cancel = context.WithCancel(ctx)
	done := make(chan struct{})
	m.done = done
	if cfg.Metrics == agent.MetricsOff {
		close(done)
		return
	}
	l, err := metrics.Listen(ctx, cfg.Metrics)
	if err != nil {
		m.warn(err)
		close(done)
		m.address = "" // the next reload tries again
		return
	}
	go func() {
		defer close(done)
		if err := metrics.Serve(mine, l, cfg.MetricsWebConfig, m.collector, m.health, m.log); err != nil && mine.Err() == nil {
			m.warn(err)
		}
	}()
}

func (m *metricsServer) warn(err error) {
	m.log.Warn("metrics are not served", "err", err, "do", "set another address as metrics in the configuration, or off")
}

func (m *metricsServer) stop() {
	if m.cancel != nil {
		m.cancel()
		<-m.done
	}
}
