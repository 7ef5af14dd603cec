// Package probe tries every kind of traffic from inside an engine, one check after
// the other, and says of each what happened and how long it took.
//
// Run is the inside. Serve is the outside: it starts the echo services that Run's
// checks of TCP, UDP and ping talk to, and tells as Targets where they are; without
// Targets, Run tries what every engine has: names, gateway, routes, host access.
package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"
)

// Theory of operation.
//
// The checks run one after another, so that a time measured is a time that the
// traffic took. A check has checkLimit; all together have runLimit, which is more
// than a healthy engine needs by a factor of 100. Checks that depend on one that
// failed, or for which no time is left, are skipped and say so; a run in which
// something failed ends with an error that names it. A datagram is repeated while
// nobody answers, as any program does that uses UDP.
//
// What is not tried: traffic from outside to the guest, MTU, speed.

const (
	checkLimit = 2 * time.Second         // one check
	runLimit   = 9500 * time.Millisecond // all of them; callers count on less than 10 s
	repeatAt   = 500 * time.Millisecond  // an unanswered datagram is sent again

)

// Built-in names of every engine.
const (
	gatewayName = "gateway.slipway.internal"
	hostName    = "host.slipway.internal"
)

// Result is the outcome of one check.
type Result struct {
	Name    string        `json:"name"`             // what was tried: "tcp v4"
	Target  string        `json:"target"`           // on what; may be empty for a skipped check
	OK      bool          `json:"ok"`               // false if Skipped
	Skipped bool          `json:"skipped"`          // not tried; Detail says why
	Took    time.Duration `json:"took_ns"`          // zero if Skipped
	Detail  string        `json:"detail,omitempty"` // what was seen, or why not
}

// Format is the Result on one line, in columns, without a line end.
func Format(r Result) string {
	status, took := "ok", formatTook(r.Took)
	switch {
	case r.Skipped:
		status, took = "skip", ""
	case !r.OK:
		status = "FAIL"
	}
	line := fmt.Sprintf("%-5s %-11s %-30s %8s  %s", status, r.Name, r.Target, took, r.Detail)
	return strings.TrimRight(line, " ")
}

func formatTook(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%dus", d.Microseconds())
	}
	return fmt.Sprintf("%dms", d.Milliseconds())
}

// FailedError is Run's error when checks failed.
type FailedError struct {
	Failed []Result // at least one
	Of     int      // checks that were tried
}

// Error names the checks that failed, on one line.
func (e *FailedError) Error() string {
	var names []string
	for _, r := range e.Failed {
		names = append(names, strings.TrimSpace(r.Name+" "+r.Target))
	}
	why := fmt.Sprintf("%d of %d checks failed", len(e.Failed), e.Of)
	if len(e.Failed) == 1 {
		why = e.Failed[0].Detail
	}
	return fmt.Sprintf("probe on %s: %s", strings.Join(names, ", "), why)
}

// Run tries everything and calls report once for each check, in order, as soon as it
// is over. It blocks for less than 10 s and returns nil if nothing failed, a
// *FailedError if something did, or ctx's cause when ctx ended first.
func Run(ctx context.Context, t Targets, report func(Result)) error {
	return newProber(t, report).run(ctx)
}

// prober is one run.
type prober struct {
	targets Targets
	report  func(Result)

	resolvConf string // the system's resolv.conf(5)
	dnsPort    string // overrides the port of its servers if not empty, for tests

	server string // the name server in use, address and port; empty while none answered
	known  map[string][]netip.Addr

	tried  int
	failed []Result
}

func newProber(t Targets, report func(Result)) *prober {
	return &prober{targets: t, report: report, resolvConf: "/etc/resolv.conf", known: make(map[string][]netip.Addr)}
}

func (p *prober) run(caller context.Context) error {
	ctx, cancel := context.WithTimeout(caller, runLimit)
	defer cancel()
	for _, part := range []func(context.Context){p.names, p.routes, p.gateway, p.direct, p.host} {
		part(ctx)
	}
	if caller.Err() != nil {
		return fmt.Errorf("probe: %w", context.Cause(caller))
	}
	if len(p.failed) > 0 {
		return &FailedError{Failed: p.failed, Of: p.tried}
	}
	return nil
}

// skip is the error of a check that cannot be made, and says why.
type skip string

func (s skip) Error() string { return string(s) }

// check makes one check and reports it. try returns what it saw; its error may be a
// skip. It tells whether the check was made and went well.
func (p *prober) check(run context.Context, name, target string, try func(context.Context) (string, error)) bool {
	r := Result{Name: name, Target: target}
	var err error
	if run.Err() != nil {
		err = skip("no time is left")
	} else {
		ctx, cancel := context.WithTimeout(run, checkLimit)
		start := time.Now()
		r.Detail, err = try(ctx)
		r.Took = time.Since(start)
		cancel()
	}
	var skipped skip
	switch {
	case errors.As(err, &skipped):
		r.Skipped, r.Took, r.Detail = true, 0, string(skipped)
	case errors.Is(run.Err(), context.Canceled):
		return false // the caller wants no more
	case err != nil:
		r.Detail = why(err)
	default:
		r.OK = true
	}
	if !r.Skipped {
		p.tried++
	}
	if !r.Skipped && !r.OK {
		p.failed = append(p.failed, r)
	}
	p.report(r)
	return r.OK
}

// skip reports a check that is not made.
func (p *prober) skip(ctx context.Context, name, target, reason string) {
	p.check(ctx, name, target, func(context.Context) (string, error) { return "", skip(reason) })
}

// why says in a few words what went wrong; the target is in the Result already.
func why(err error) string {
	var errno syscall.Errno
	var timeout net.Error
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Sprintf("no answer within %v", checkLimit)
	case errors.As(err, &errno):
		return errno.Error()
	}
	return err.Error()
}

// family is "v4" or "v6".
func family(a netip.Addr) string {
	if a.Is4() {
		return "v4"
	}
	return "v6"
}
