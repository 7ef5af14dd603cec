package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/engine/docker"
)

// isDockerd reports whether the engine is a dockerd whose options are ours.
func (e *engine) isDockerd() bool { return e.opts.Mode == ModeUp && e.cfg.Kind == config.KindDockerd }

// prepareDockerd makes the command of such an engine, and the files that it needs.
func (e *engine) prepareDockerd(ctx context.Context) error {
	help, err := docker.Help(ctx, e.cfg.Program)
	if errors.Is(err, exec.ErrNotFound) {
		return &Problem{Err: fmt.Errorf("start engine %s: %w", e.opts.Name, err), Hint: dockerdHint(systemPrograms), Code: 127}
	}
	if err != nil {
		return fmt.Errorf("start engine %s: %w", e.opts.Name, err)
	}
	self, err := os.Executable()
	if err == nil {
		err = docker.Prepare(e.state.path, self)
	}
	if err != nil {
		return fmt.Errorf("start engine %s: %w", e.opts.Name, err)
	}
	e.opts.Command = docker.DockerdCommand(docker.DockerdOptions{
		Program: e.cfg.Program, StateDir: e.state.path, DataRoot: docker.DataRoot(e.opts.Name, dataHome()),
		Rootless: e.spec().Rootless, Help: help, Extra: e.cfg.Command,
		Configured: docker.Configured(e.cfg.Command, os.ReadFile),
	})
	e.wrapper = docker.DockerdWrapper(e.cfg.Command)
	e.silent = docker.ProxyOff(e.cfg.Command, os.ReadFile)
	return nil
}

// systemPrograms is where distributions have dockerd's helpers, such as iptables, and some of them dockerd; PATH
// of an ordinary user of Debian leaves it out.
const systemPrograms = "/usr/sbin"

// dockerdHint says what can be done where there is no dockerd in PATH.
func dockerdHint(dir string) string {
	if _, err := os.Stat(filepath.Join(dir, "dockerd")); err == nil {
		return "it is in " + dir + ": export PATH=$PATH:" + dir
	}
	return "apt-get install docker.io, or name a dockerd as the first word of command"
}

// dataHome is where an ordinary user keeps data; empty for root.
func dataHome() string {
	if os.Geteuid() == 0 {
		return ""
	}
	if d := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(d) {
		return d
	}
	home, _ := os.UserHomeDir()
	return filepath.Join(home, ".local", "share")
}
