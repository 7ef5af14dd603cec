package netstack

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

// Theory of operation.
//
// Of ICMP only echo requests leave the guest, to the forwarder; the gateway's own
// address is pinged through gVisor. Errors that the guest sends about our packets
// come to whoever sent them (icmperror.go).
//
// Towards the guest go echo replies that a target really sent, and errors: those
// that the host's kernel learned about a flow (unreachable, time exceeded, packet
// too big), with the address of the router that reported them, and our own when a
// packet's TTL ends here. An error quotes the guest's packet as far as its kernel
// needs it to find the socket: addresses, ports or identifier, and TCP's sequence
// number (RFC 792, RFC 4443 section 3).

const (
	icmpHeaderLen = 8 // of echo messages and errors, both families

	// maxQuote4 and maxQuote6 bound the packet quoted in an error, in bytes: an
	// IPv4 error has at most 576 bytes (RFC 1812 section 4.3.2.3), an IPv6 one at
	// most the minimum MTU (RFC 4443 section 2.4).
	maxQuote4 = 576 - header.IPv4MinimumSize - icmpHeaderLen
	maxQuote6 = header.IPv6MinimumMTU - header.IPv6MinimumSize - icmpHeaderLen
)

// timeExceeded4 and timeExceeded6 are "time to live exceeded in transit".
var (
	timeExceeded4 = flow.ICMP{Type: uint8(header.ICMPv4TimeExceeded)}
	timeExceeded6 = flow.ICMP{Type: uint8(header.ICMPv6TimeExceeded)}
)

// icmpHandler takes echo requests that gVisor reassembled or that carry IPv6 extension
// headers.
func (s *Stack) icmpHandler(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	ip := infoOf(id, pkt)
	if ip.dst == s.cfg.Gateway4 || ip.dst == s.cfg.Gateway6 {
		return false
	}
	b := transportOf(pkt)
	if ip.src.Is4() {
		s.icmp4FromGuest(&ip, b)
	} else {
		s.icmp6FromGuest(&ip, b)
	}
	return true
}

// icmpOf returns the ICMP of a's family.
func icmpOf(a netip.Addr) tcpip.TransportProtocolNumber {
	if a.Is4() {
		return header.ICMPv4ProtocolNumber
	}
	return header.ICMPv6ProtocolNumber
}

// icmpFromGuest takes a message that came in one piece, and reports whether it is
// gVisor's.
func (s *Stack) icmpFromGuest(ip *ipInfo, b []byte, toGateway bool) (forStack bool) {
	if e, ok := parseError(ip, b); ok {
		return s.errorFromGuest(&e) || toGateway
	}
	switch {
	case toGateway:
		return true
	case ip.src.Is4():
		s.icmp4FromGuest(ip, b)
	default:
		s.icmp6FromGuest(ip, b)
	}
	return false
}

func (s *Stack) icmp4FromGuest(ip *ipInfo, b []byte) {
	s.echoFromGuest(ip, b, uint8(header.ICMPv4Echo), 0)
}

func (s *Stack) icmp6FromGuest(ip *ipInfo, b []byte) {
	s.echoFromGuest(ip, b, uint8(header.ICMPv6EchoRequest), pseudo(ip.src, ip.dst, header.ICMPv6ProtocolNumber, len(b)))
}

// echoFromGuest checks an ICMP message and passes it on when it is an echo request.
// sum is the pseudo header's.
func (s *Stack) echoFromGuest(ip *ipInfo, b []byte, request uint8, sum uint16) {
	if len(b) < icmpHeaderLen {
		s.stats.malformed.Add(1)
		return
	}
	if b[0] != request || b[1] != 0 {
		s.stats.ignored.Add(1)
		return
	}
	if checksum.Checksum(b, sum) != 0xffff {
		s.stats.badChecksum.Add(1)
		return
	}
	id, seq := be16(b[4:]), be16(b[6:])
	if ip.hops <= 1 {
		s.timeExceeded(flow.Tuple{
			Proto:  flow.Ping,
			Guest:  netip.AddrPortFrom(ip.src, id),
			Target: netip.AddrPortFrom(ip.dst, seq),
		}, b[icmpHeaderLen:])
		return
	}
	s.forward.Echo(flow.Echo{
		Guest: ip.src, Target: ip.dst, ID: id, Seq: seq, Payload: b[icmpHeaderLen:],
		Hops: ip.hops - 1, TOS: ip.tos, DontFragment: ip.df,
	})
}

// timeExceeded tells the guest that its packet's TTL ended here. t's ports for Ping
// are as in flow.Error.
func (s *Stack) timeExceeded(t flow.Tuple, payload []byte) {
	e := flow.Error{Tuple: t, ICMP: timeExceeded4, Quote: payload}
	if !t.Target.Addr().Is4() {
		e.ICMP = timeExceeded6
	}
	s.WriteError(e)
}

// WriteEcho implements flow.Guest.
func (s *Stack) WriteEcho(e flow.Echo) error {
	if len(e.Payload) > link.MaxPacket-header.IPv4MinimumSize-icmpHeaderLen {
		return fmt.Errorf("write echo reply of %d bytes to %v: %w", len(e.Payload), e.Guest, ErrTooLong)
	}
	proto, typ, sum := header.ICMPv4ProtocolNumber, uint8(header.ICMPv4EchoReply), uint16(0)
	if e.Guest.Is6() {
		proto, typ = header.ICMPv6ProtocolNumber, uint8(header.ICMPv6EchoReply)
		sum = pseudo(e.Target, e.Guest, proto, icmpHeaderLen+len(e.Payload))
	}
	p := newPacket(e.Target, e.Guest, proto, e.Hops, e.TOS)
	defer p.free()
	h := p.transport(icmpHeaderLen)
	clear(h)
	h[0] = typ
	binary.BigEndian.PutUint16(h[4:], e.ID)
	binary.BigEndian.PutUint16(h[6:], e.Seq)
	sum = checksum.Checksum(e.Payload, checksum.Checksum(h, sum))
	binary.BigEndian.PutUint16(h[2:], ^sum)
	if p.len+len(e.Payload) > s.cfg.Link.MTU() {
		return s.writeFragments(p, e.Payload)
	}
	return s.writePacket(p, link.Header{}, e.Payload)
}

// WriteError implements flow.Guest for UDP and Ping; errors about TCP start in
// tcp.go, which has the segment.
func (s *Stack) WriteError(e flow.Error) error {
	size := max(e.Size, len(e.Quote))
	var transport [8]byte
	proto := header.UDPProtocolNumber
	switch {
	case e.Proto == flow.UDP:
		binary.BigEndian.PutUint16(transport[0:], e.Guest.Port())
		binary.BigEndian.PutUint16(transport[2:], e.Target.Port())
		binary.BigEndian.PutUint16(transport[4:], uint16(header.UDPMinimumSize+size))
	case e.Guest.Addr().Is4():
		proto = header.ICMPv4ProtocolNumber
		transport[0] = uint8(header.ICMPv4Echo)
		binary.BigEndian.PutUint16(transport[4:], e.Guest.Port())
		binary.BigEndian.PutUint16(transport[6:], e.Target.Port())
	default:
		proto = header.ICMPv6ProtocolNumber
		transport[0] = uint8(header.ICMPv6EchoRequest)
		binary.BigEndian.PutUint16(transport[4:], e.Guest.Port())
		binary.BigEndian.PutUint16(transport[6:], e.Target.Port())
	}
	return s.writeICMPError(icmpError{
		ICMP: e.ICMP, from: e.From, mtu: e.MTU,
		src: e.Guest.Addr(), dst: e.Target.Addr(), proto: proto,
		transport: transport, payload: e.Quote, size: size,
	})
}

// icmpError is an error about the packet src > dst with the given first bytes of
// its transport header.
type icmpError struct {
	flow.ICMP
	from      netip.Addr // zero: the gateway
	mtu       uint32
	src, dst  netip.Addr
	proto     tcpip.TransportProtocolNumber
	transport [8]byte
	payload   []byte // what followed these eight bytes, as far as known
	size      int    // its whole length
}

// writeICMPError builds the error and its quotation and sends it to e.src.
func (s *Stack) writeICMPError(e icmpError) error {
	v4 := e.src.Is4()
	from, proto, most := e.from, header.ICMPv6ProtocolNumber, maxQuote6
	if v4 {
		proto, most = header.ICMPv4ProtocolNumber, maxQuote4
	}
	if !from.IsValid() || from.Is4() != v4 {
		from = s.cfg.Gateway6
		if v4 {
			from = s.cfg.Gateway4
		}
	}
	quoted := newPacket(e.src, e.dst, e.proto, 1, 0)
	defer quoted.free()
	body := append(make([]byte, icmpHeaderLen, icmpHeaderLen+most), quoted.buf[:quoted.ipLen]...)
	s.encodeIP(body[icmpHeaderLen:], quoted, min(len(e.transport)+e.size, link.MaxPacket-quoted.ipLen))
	body = append(body, e.transport[:]...)
	body = append(body, e.payload[:min(len(e.payload), icmpHeaderLen+most-len(body))]...)

	body[0], body[1] = e.Type, e.Code
	sum := uint16(0)
	if v4 {
		binary.BigEndian.PutUint16(body[6:], uint16(min(e.mtu, 0xffff)))
	} else {
		binary.BigEndian.PutUint32(body[4:], e.mtu)
		sum = pseudo(from, e.src, proto, len(body))
	}
	binary.BigEndian.PutUint16(body[2:], ^checksum.Checksum(body, sum))
	p := newPacket(from, e.src, proto, 0, 0)
	defer p.free()
	return s.writePacket(p, link.Header{}, body)
}
