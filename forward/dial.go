package forward

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/slipway-net/slipway/internal/flow"
)

// DialError says why a target could not be connected. It wraps the errno of
// connect(2); ICMP is set when the host's kernel told which message it got.
type DialError struct {
	Target netip.AddrPort
	Err    error      // usually a syscall.Errno
	ICMP   *flow.ICMP // the message that ended the dial, in the family of Target; nil if none did
	From   netip.Addr // who sent it
	MTU    uint32
}

// Error implements error.
func (e *DialError) Error() string { return fmt.Sprintf("dial tcp on %v: %v", e.Target, e.Err) }

// Unwrap returns the errno.
func (e *DialError) Unwrap() error { return e.Err }

// Timeout reports whether nobody answered at all.
func (e *DialError) Timeout() bool { return errors.Is(e.Err, syscall.ETIMEDOUT) }

// verdict is what the guest is to be answered, v4 telling the family it speaks. That
// is the dialled one but for the host alias, which tries both.
func (e *DialError) verdict(v4 bool) flow.Verdict {
	if e.ICMP != nil && e.Target.Addr().Is4() == v4 {
		return flow.Verdict{Answer: flow.Unreachable, ICMP: *e.ICMP, From: e.From, MTU: e.MTU}
	}
	if errors.Is(e.Err, syscall.ECONNREFUSED) || errors.Is(e.Err, syscall.ECONNRESET) {
		return flow.Verdict{Answer: flow.Reset}
	}
	for _, r := range localErrors {
		if errors.Is(e.Err, r.errno) {
			v := flow.Verdict{Answer: flow.Unreachable, ICMP: flow.ICMP{Type: typeUnreachable6, Code: r.code6}}
			if v4 {
				v.ICMP = flow.ICMP{Type: typeUnreachable4, Code: r.code4}
			}
			return v
		}
	}
	return flow.Verdict{Answer: flow.Silence}
}

const (
	typeUnreachable4 = 3 // RFC 792
	typeUnreachable6 = 1 // RFC 4443
)

// localErrors are the errors that the host's own kernel gives a dial before a packet
// leaves, and the codes of "destination unreachable" a router with the same routes
// would send (Linux: net/ipv4/route.c ip_error, net/ipv6/route.c ip6_pkt_drop).
var localErrors = []struct {
	errno        syscall.Errno
	code4, code6 uint8
}{
	{syscall.ENETUNREACH, 0, 0},   // no route; route type "unreachable" in IPv6
	{syscall.EHOSTUNREACH, 1, 0},  // route type "unreachable"; no answer to ARP (to NDP: an ICMP, which tells more)
	{syscall.EACCES, 13, 1},       // route type "prohibit"
	{syscall.EPERM, 13, 1},        // refused by the host's own firewall or a security module
	{syscall.EADDRNOTAVAIL, 1, 3}, // no source address or port left for this target
	{syscall.EAFNOSUPPORT, 0, 0},  // the host has no IPv6
	{syscall.ENETDOWN, 0, 0},      //
	{syscall.EHOSTDOWN, 1, 3},     //
}
