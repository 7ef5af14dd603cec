package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/nsagent"
)

// passed are the signals that the command gets from us. A terminal sends QUIT and WINCH
// to both of us, so that it gets them twice, which does no harm; INT it gets twice only
// without this rule: with a terminal, the terminal alone sends it.
var passed = []os.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGINT}

// signals is what the process was sent since catchSignals.
type signals struct {
	c        chan os.Signal
	terminal bool           // there is a controlling terminal
	broken   chan os.Signal // takes PIPE; nobody reads it
}

// catchSignals takes over the signals of passed. A signal that comes before somebody
// reads waits.
//
// What whoever started us has ignored stays so, for us and the command, which inherits
// it: HUP under nohup, INT in the background of a script. Without a terminal INT is
// passed on all the same: it can only be meant for the command.
//
// PIPE is caught, or the first word to a log that nobody reads any more would end us
// (os/signal says so of standard error), and the guest with us. The write's error is all
// there is to know.
func catchSignals() *signals {
	s := &signals{c: make(chan os.Signal, 16), broken: make(chan os.Signal, 1)}
	if tty, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0); err == nil {
		s.terminal = true
		tty.Close()
	}
	for _, sig := range passed {
		if !signal.Ignored(sig) || sig == unix.SIGINT && !s.terminal {
			signal.Notify(s.c, sig)
		}
	}
	signal.Notify(s.broken, unix.SIGPIPE)
	return s
}

// ownTerminal keeps us running when the guest has taken the terminal we log to: with
// stty tostop a process in the background is stopped at its first word. An ignored
// signal is inherited, so this comes after the agent's start, the last of our children.
func (s *signals) ownTerminal() { signal.Ignore(unix.SIGTTOU) }

func (s *signals) stop() {
	signal.Stop(s.c)
	signal.Stop(s.broken)
	signal.Reset(unix.SIGTTOU)
}

// waiting returns how many signals have come that nobody has read. Stop waits until those
// that Go's runtime has are in their channels.
func (s *signals) waiting() int {
	flush := make(chan os.Signal, 1)
	signal.Notify(flush, unix.SIGTERM)
	signal.Stop(flush)
	return len(s.c)
}

// ends reports whether a signal asks a daemon whose command has ended, or that has
// none, to end.
func (s *signals) ends(sig os.Signal) bool {
	return slices.Contains([]os.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT}, sig)
}

// interrupted returns a signal that came while there was no command to pass it to and
// that asks us to end, or 0. Without it a Ctrl-C during the start would reach nobody.
func (e *engine) interrupted(ctx context.Context, signals *signals) syscall.Signal {
	if e.opts.Mode == ModeAttach && e.agent != nil {
		return 0 // waitAttached reads it, and the agent has the time to put back what it changed
	}
	for range signals.waiting() {
		switch sig := <-signals.c; {
		case sig == unix.SIGHUP && e.opts.Mode == ModeUp:
			e.reload(ctx)
		case signals.ends(sig):
			return sig.(syscall.Signal)
		}
	}
	return 0
}

// interruptedCode is the exit status after a signal that interrupted has returned: as if it had
// ended the command. With attach it is 0, as after any signal.
func (e *engine) interruptedCode(sig syscall.Signal) int {
	if e.opts.Mode == ModeAttach {
		return 0
	}
	return 128 + int(sig)
}

// wait blocks until the engine is to end and returns the command's exit status. kill
// makes the agent's end an end at once.
func (e *engine) wait(ctx context.Context, signals *signals, s *services, kill func()) (int, error) {
	main := e.main.Load()
	if main == nil {
		return 0, e.waitAttached(ctx, signals, s)
	}
	type result struct {
		status nsagent.Status
		err    error
	}
	exited := make(chan result, 1)
	go func() { // ends when the agent has, which our caller sees to
		status, err := main.Wait()
		exited <- result{status, err}
	}()
	stop := stopper{engine: e, main: main}
	defer stop.close()
	done := ctx.Done()
	early := signals.waiting() // they came while the command was started: the terminal may have missed it
	for {
		select {
		case r := <-exited:
			if r.err != nil {
				return 0, fmt.Errorf("serve engine %s: %w", e.opts.Name, r.err)
			}
			return r.status.Code, nil
		case <-s.failed:
			return 0, nil // services.err says why
		case <-done:
			done = nil
			stop.signal(unix.SIGTERM)
		case <-stop.expired():
			e.log.Warn("the command does not end: it is killed", slog.Duration("stop_timeout", e.cfg.StopTimeout))
			kill()
			main.Signal(unix.SIGKILL)
		case sig := <-signals.c:
			early--
			if sig == unix.SIGINT && signals.terminal && early < 0 {
				continue
			}
			if sig == unix.SIGHUP && e.opts.Mode == ModeUp {
				e.reload(ctx)
				continue
			}
			if stop.signal(sig.(syscall.Signal)) {
				kill()
				main.Signal(unix.SIGKILL)
			}
		}
	}
}

// stopper passes signals to the command and counts what a TERM sets going: the command
// has stop_timeout, and a second TERM is a KILL.
type stopper struct {
	engine *engine
	main   *nsagent.Process
	timer  *time.Timer
}

// signal passes sig on; it reports whether the command is to be killed instead.
func (s *stopper) signal(sig syscall.Signal) bool {
	if sig == unix.SIGTERM {
		if s.timer != nil {
			return true
		}
		s.timer = time.NewTimer(s.engine.cfg.StopTimeout)
		s.engine.progress("waiting %v for the command to end; a second TERM kills it", s.engine.cfg.StopTimeout)
	}
	if err := s.main.Signal(sig); err != nil {
		s.engine.log.Warn("signal not passed on", slog.String("signal", sig.String()), slog.Any("err", err))
	}
	return false
}

func (s *stopper) expired() <-chan time.Time {
	if s.timer == nil {
		return nil
	}
	return s.timer.C
}

func (s *stopper) close() {
	if s.timer != nil {
		s.timer.Stop()
	}
}

// goneGrace is how long the end of a namespace may take to be told by the agent after
// its device has told by its own.
const goneGrace = 2 * time.Second

// waitAttached blocks until the namespace is gone, a part failed, or a signal comes.
func (e *engine) waitAttached(ctx context.Context, signals *signals, s *services) error {
	e.progress("engine %s serves the namespace; TERM or Ctrl-C ends it", e.opts.Name)
	for {
		select {
		case <-e.agent.Done():
			return e.detached(s)
		case <-ctx.Done():
			return nil
		case <-s.failed:
			select {
			case <-e.agent.Done():
				return e.detached(s)
			case <-time.After(goneGrace):
			}
			return nil // services.err says why
		case sig := <-signals.c:
			if signals.ends(sig) {
				return nil
			}
		}
	}
}

// detached returns nil when the namespace is gone, after which no part can be served.
func (e *engine) detached(s *services) error {
	s.forgive()
	if err := e.agent.Err(); err != nil {
		return fmt.Errorf("serve engine %s: %w", e.opts.Name, err)
	}
	return nil
}

// liveKeys are the settings that reload takes over.
var liveKeys = []string{"log_level", "publish", "publish_bind", "publish_ports", "source_ip"}

// reload reads the configuration again, takes over what can change while an engine
// runs, and says what cannot.
func (e *engine) reload(ctx context.Context) {
	if e.opts.Reload == nil {
		e.log.Warn("configuration not read again: there is no file")
		return
	}
	cfg, err := e.opts.Reload()
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			e.log.Error("configuration not changed", slog.String("err", strings.TrimSpace(line)))
		}
		return
	}
	was, err1 := e.opts.Config.Values(e.opts.Name)
	now, err2 := cfg.Values(e.opts.Name)
	settings, err3 := cfg.Engine(e.opts.Name)
	if err := errors.Join(err1, err2, err3); err != nil {
		e.log.Error("configuration not changed", slog.Any("err", err))
		return
	}
	var restart []string
	for i := range now {
		if now[i].Value != was[i].Value && !slices.Contains(liveKeys, now[i].Key) {
			restart = append(restart, now[i].Key)
		}
	}
	e.level.Set(settings.LogLevel)
	if e.book != nil {
		e.reloadPorts(ctx, settings.Settings)
	}
	e.log.Info("configuration read again", slog.String("log_level", settings.LogLevel.String()))
	if len(restart) > 0 {
		e.log.Warn("changed settings need a restart of the engine", slog.String("settings", strings.Join(restart, " ")))
	}
}
