//go:build !linux

package daemon

import (
	"context"
	"errors"
)

var errLinux = errors.New("run engine on this system: engines are made of Linux namespaces; use a Linux machine, or WSL 2 on Windows")

// Run cannot work here: it returns an error that says so.
func Run(context.Context, Options) (int, error) { return CodeFailed, errLinux }

// Engines cannot work here: it returns an error that says so.
func Engines() ([]string, error) { return nil, errLinux }

func stateRoot() string { return "" }

func checkRoot(string) error { return errLinux }

func beVisible() {}
