// Package daemon runs one engine: it is the only package that knows all the others,
// makes them, introduces them to each other, and stops them in the reverse order.
//
// Run does everything, in the foreground, from the state directory to the exit
// status. Engines and Client are for the commands that talk to a running one.
package daemon

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/config"
)

// Mode is what an engine was started by.
type Mode string

// The modes.
const (
	ModeRun    Mode = "run"    // a command in a fresh namespace
	ModeUp     Mode = "up"     // a configured engine's command; HUP reads the configuration again
	ModeAttach Mode = "attach" // a namespace that somebody else made
)

// Options say what to run.
type Options struct {
	Mode Mode
	Name string // of the engine; see NameFor

	Command []string // for run and up: the program and its arguments
	Dir     string   // its working directory; empty for ours
	Env     []string // its environment, NAME=value

	PID   int    // for attach: the process whose namespace is served, or
	NetNS string // the path of a namespace

	// Rootless gives root a user namespace, which everybody else gets anyway.
	Rootless bool

	Config *config.Config
	// Reload reads the configuration again; nil where there is nothing to read.
	Reload func() (*config.Config, error)

	Version  string
	Log      io.Writer // log lines as text
	Progress io.Writer // what a person who waits wants to know; nil for nobody
}

// Problem is an error with what a user can do about it.
type Problem struct {
	Err  error
	Hint string // one line, without "hint:"; may be empty
	Code int    // exit status; 0 means 125
}

// Error returns the error's text.
func (p *Problem) Error() string { return p.Err.Error() }

// Unwrap returns Err.
func (p *Problem) Unwrap() error { return p.Err }

// CodeFailed is the exit status when slipway itself failed before the command started;
// Run returns it with an error that has no code of its own.
const CodeFailed = 125

// NameFor makes the name of an engine that was given none: its command and our pid.
func NameFor(command []string, pid int) string {
	base := "engine"
	if len(command) > 0 {
		base = filepath.Base(command[0])
	}
	base = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-' || r == '.' {
			return r
		}
		return '-'
	}, base)
	base = strings.TrimLeft(base, "._-")
	if len(base) > 20 { // leaves room for the pid
		base = base[:20]
	}
	if base == "" {
		base = "engine"
	}
	return fmt.Sprintf("%s-%d", base, pid)
}

// socketName is the file of the control API in a state directory.
const socketName = "api.sock"

// ClientOf returns a client for this user's engine of that name, running or not. It is
// an error if the engine could be somebody else's. A process that is not root's loses the
// capabilities that it has of its file: it is for commands that do nothing but ask.
func ClientOf(name string) (*api.Client, error) {
	if err := config.CheckName(name); err != nil {
		return nil, err
	}
	root := stateRoot()
	if err := checkRoot(root); err != nil {
		return nil, err
	}
	beVisible()
	return api.NewClient(name, filepath.Join(root, name, socketName)), nil
}
