package netstack

import (
	"encoding/binary"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// The guest's kernel, and what its own rules reject, answer with ICMP errors to
// what a published port's clients send. They quote our packet: its addresses and the
// first eight bytes behind them name the flow (RFC 792, RFC 4443 section 3).
//
//	about TCP   an unreachable ends the Dial that waits, and is ignored later
//	            (RFC 5927: no error ends a connection); too big is gVisor's
//	about UDP   the forwarder's, which passes it on to the client
//
// Errors about echo replies and about anything else are ignored.

// icmpv6 types that are errors we act on (RFC 4443 section 3).
const (
	unreachable6 = uint8(header.ICMPv6DstUnreachable)
	tooBig6      = uint8(header.ICMPv6PacketTooBig)
	exceeded6    = uint8(header.ICMPv6TimeExceeded)

	unreachable4 = uint8(header.ICMPv4DstUnreachable)
	exceeded4    = uint8(header.ICMPv4TimeExceeded)

	fragNeeded4 = uint8(header.ICMPv4FragmentationNeeded)
)

// parseError reads an ICMP error about a TCP segment or a datagram of ours, and
// reports whether b is one. Guest is where ours went.
func parseError(ip *ipInfo, b []byte) (e flow.Error, ok bool) {
	if len(b) < icmpHeaderLen || !isError(ip.src, b[0]) {
		return e, false
	}
	sum := uint16(0)
	if ip.src.Is6() {
		sum = pseudo(ip.src, ip.dst, header.ICMPv6ProtocolNumber, len(b))
	}
	if checksum.Checksum(b, sum) != 0xffff {
		return e, false
	}
	e.ICMP, e.From, e.MTU = flow.ICMP{Type: b[0], Code: b[1]}, ip.src, mtuOf(ip.src, b)
	if !parseQuote(&e, b[icmpHeaderLen:]) || e.Target.Addr() != ip.dst {
		return e, false // no packet of ours: it would have come back to its sender
	}
	return e, true
}

func isError(src netip.Addr, typ uint8) bool {
	if src.Is4() {
		return typ == unreachable4 || typ == exceeded4
	}
	return typ == unreachable6 || typ == tooBig6 || typ == exceeded6
}

// mtuOf returns the next hop's MTU where the message tells one.
func mtuOf(src netip.Addr, b []byte) uint32 {
	switch {
	case src.Is4() && b[0] == unreachable4 && b[1] == fragNeeded4:
		return uint32(be16(b[6:])) // RFC 1191 section 4
	case src.Is6() && b[0] == tooBig6:
		return binary.BigEndian.Uint32(b[4:])
	}
	return 0
}

// parseQuote reads the quoted packet: who sent what to whom, and e's Quote.
func parseQuote(e *flow.Error, b []byte) bool {
	if e.From.Is4() {
		return parseQuote4(e, b)
	}
	if len(b) < header.IPv6MinimumSize || b[0]>>4 != 6 {
		return false
	}
	h := header.IPv6(b)
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	return parsePorts(e, h.NextHeader(), src, dst, b[header.IPv6MinimumSize:])
}

func parseQuote4(e *flow.Error, b []byte) bool {
	if len(b) < header.IPv4MinimumSize || b[0]>>4 != 4 {
		return false
	}
	h := header.IPv4(b)
	hl := int(h.HeaderLength())
	if hl < header.IPv4MinimumSize || hl > len(b) || h.FragmentOffset() != 0 {
		return false
	}
	src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	return parsePorts(e, h.Protocol(), src, dst, b[hl:])
}

// parsePorts reads the first eight bytes of a transport header.
func parsePorts(e *flow.Error, proto uint8, src, dst netip.Addr, b []byte) bool {
	if len(b) < len(quote8(nil)) {
		return false
	}
	e.Target, e.Guest = netip.AddrPortFrom(src, be16(b)), netip.AddrPortFrom(dst, be16(b[2:]))
	switch proto {
	case uint8(header.TCPProtocolNumber):
		e.Proto = flow.TCP
	case uint8(header.UDPProtocolNumber):
		e.Proto = flow.UDP
		e.Size = max(int(be16(b[4:]))-header.UDPMinimumSize, 0)
		e.Quote = b[header.UDPMinimumSize:]
		e.Quote = e.Quote[:min(len(e.Quote), e.Size)]
	default:
		return false
	}
	return true
}

// errorFromGuest brings e to whom it is about, and reports whether gVisor has to see
// it.
func (s *Stack) errorFromGuest(e *flow.Error) (forStack bool) {
	if e.Proto == flow.UDP {
		s.forward.Rejected(*e)
		return false
	}
	if e.MTU != 0 {
		return s.served.Load() > 0
	}
	if err := unreachableErrno(e); err != nil {
		s.out.fail(e.Tuple, err)
	}
	return false
}

// unreachableErrno is what a connect gets for e, nil if it goes on trying.
func unreachableErrno(e *flow.Error) error {
	if e.ICMP.Type != unreachable4 && e.Guest.Addr().Is4() || e.ICMP.Type != unreachable6 && e.Guest.Addr().Is6() {
		return nil // the packet went in circles, which may end
	}
	switch code := e.ICMP.Code; {
	case e.Guest.Addr().Is4() && code == uint8(header.ICMPv4PortUnreachable),
		e.Guest.Addr().Is6() && code == uint8(header.ICMPv6PortUnreachable):
		return syscall.ECONNREFUSED
	case e.Guest.Addr().Is4() && code == fragNeeded4: // of a router that does not tell its MTU
		return nil
	case code == 0: // network, or no route, in both families
		return syscall.ENETUNREACH
	}
	return syscall.EHOSTUNREACH
}
