package publish

import (
	"errors"
	"fmt"

	"github.com/slipway-net/slipway/internal/flow"
)

// ErrTooMany is wrapped by what Add returns when there are as many ports, or
// descriptors, as there may be.
var ErrTooMany = errors.New("too many published ports")

// ErrNotFound is wrapped by what Remove and RemoveSpec return when there is no such port.
var ErrNotFound = errors.New("no such published port")

// Each error names the one address that it is about in Spec.Host, also where the PortSpec
// asked for both families; the zero Addr is written as 0.0.0.0.

// SpecError reports that a PortSpec can never be published on this host.
type SpecError struct {
	Spec flow.PortSpec
	Why  string // one line
}

// Error is one line that begins with "publish HOST:PORT/PROTO: ".
func (e *SpecError) Error() string { return fmt.Sprintf("publish %s: %s", name(e.Spec), e.Why) }

// PolicyError reports that the configuration, or the system, does not allow a port.
type PolicyError struct {
	Spec flow.PortSpec
	Why  string // one line
	hint string
}

// Error is one line that begins with "publish HOST:PORT/PROTO: ".
func (e *PolicyError) Error() string { return fmt.Sprintf("publish %s: %s", name(e.Spec), e.Why) }

// Hint is what the user can do, in one line.
func (e *PolicyError) Hint() string { return e.hint }

// ConflictError reports that a port is taken.
type ConflictError struct {
	Spec   flow.PortSpec
	Holder string // "nginx (pid 812)", or a published port and its owner; "" if not known
	hint   string
}

// Error is one line that begins with "publish HOST:PORT/PROTO: ".
func (e *ConflictError) Error() string {
	text := fmt.Sprintf("publish %s: port %d is taken", name(e.Spec), e.Spec.Host.Port())
	if e.Holder != "" {
		text += " by " + e.Holder
	}
	return text
}

// Hint is what the user can do, in one line.
func (e *ConflictError) Hint() string { return e.hint }

// limitError is an ErrTooMany that says which limit.
type limitError struct {
	spec flow.PortSpec
	why  string
	hint string
}

const hintFiles = "raise the limit of open files (ulimit -n, LimitNOFILE= of a systemd unit)"

func (e *limitError) Error() string {
	return fmt.Sprintf("publish %s: %v: %s", name(e.spec), ErrTooMany, e.why)
}
func (e *limitError) Unwrap() error { return ErrTooMany }

// Hint is what the user can do, in one line; "" if nothing.
func (e *limitError) Hint() string { return e.hint }
