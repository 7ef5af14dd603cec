package publish

import (
	"errors"
	"fmt"
	"net/netip"

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
	hint string
}

// Error is one line that begins with "publish HOST:PORT/PROTO: ".
func (e *SpecError) Error() string { return fmt.Sprintf("publish %s: %s", name(e.Spec), e.Why) }

// Hint is what the user can do, in one line; "" if nothing.
func (e *SpecError) Hint() string { return e.hint }

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
	Holder Holder // nil if not known
	hint   string
}

// Holder is who has a port: a Published of the same Book, a PassedOn, a Process or a User.
type Holder interface{ String() string }

// HolderOf tells who keeps the process from binding a socket to at; nil if nobody is found. It may
// take half a second.
func HolderOf(proto flow.Proto, at netip.AddrPort) Holder { return new(holders).find(proto, at) }

// Published is a Holder that the Book knows itself.
type Published struct {
	Spec  flow.PortSpec // as it was asked for
	Owner string

	// Differs is what Spec does not say and all that the two have not in common, "" for
	// none: "with the source_ip gateway".
	Differs string
}

// String is "the published port SPEC of OWNER", and how that differs.
func (p Published) String() string {
	return p.By(fmt.Sprintf("the published port %v of %s", p.Spec, p.Owner))
}

// By is who, which stands for Spec and Owner, and how that differs.
func (p Published) By(who string) string {
	if p.Differs == "" {
		return who
	}
	return who + ", " + p.Differs
}

// PassedOn is a Holder that is a socket of the Book's, for other addresses than were asked.
type PassedOn struct {
	Addr netip.AddrPort
	Dual bool // it takes clients of IPv4, too
}

// String is "the socket for [::]:80 that was passed on".
func (p PassedOn) String() string {
	both := ""
	if p.Dual {
		both = " and IPv4"
	}
	return fmt.Sprintf("the socket for %v%s that was passed on", p.Addr, both)
}

// Process is a Holder that is somebody else on the host.
type Process struct {
	Name       string // as it calls itself, in one line
	PID        int
	Connection bool // the port is that of a connection, nobody listens
}

// String is "nginx (pid 812)".
func (p Process) String() string {
	return fmt.Sprintf("%s%s (pid %d)", connectionOf(p.Connection), p.Name, p.PID)
}

// User is a Holder of whom no more is known than the user.
type User struct {
	UID        uint32
	Connection bool // as in Process
}

// String is "a process of uid 1000".
func (u User) String() string {
	who := "root"
	if u.UID != 0 {
		who = fmt.Sprintf("uid %d", u.UID)
	}
	return connectionOf(u.Connection) + "a process of " + who
}

func connectionOf(is bool) string {
	if is {
		return "a connection of "
	}
	return ""
}

// Error is one line that begins with "publish HOST:PORT/PROTO: ".
func (e *ConflictError) Error() string {
	text := fmt.Sprintf("publish %s: port %d is taken", name(e.Spec), e.Spec.Host.Port())
	if e.Holder != nil {
		text += " by " + e.Holder.String()
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
