package daemon

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/nsagent"
)

// exitCode is the exit status that an error of Run stands for.
func exitCode(err error) int {
	var ee *nsagent.ExecError
	if errors.As(err, &ee) {
		return ee.Code
	}
	return CodeFailed
}

// withHint makes a *Problem of an error that a user can do something about.
func withHint(err error) error {
	hint := ""
	var ae *nsagent.Error
	var p *Problem
	switch {
	case errors.As(err, &p):
		return &Problem{Err: err, Hint: p.Hint, Code: p.Code}
	case errors.As(err, &ae):
		hint = ae.Hint
	case errors.Is(err, unix.EBADFD): // tun_chr_read_iter of a device without a network interface
		hint = "somebody inside has deleted the guest's device"
	case errors.Is(err, ErrRunning):
		hint = "see it with: slipway ls; run and attach take another name with --name"
	case errors.Is(err, ErrNotOurs):
		hint = "somebody else made this directory, or others may write to it: look at it, then remove it"
	}
	return &Problem{Err: err, Hint: hint, Code: exitCode(err)}
}
