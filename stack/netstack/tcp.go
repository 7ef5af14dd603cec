package netstack

import (
	"context"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// A SYN that belongs to no connection is held (dials.go) and a goroutine asks the
// forwarder, which dials the target. Exactly one of five things then happens:
//
//	connected    gVisor answers the SYN; when the handshake is complete the same
//	             goroutine runs the relay until both sides have ended
//	refused      gVisor answers with a RST
//	unreachable  the guest gets the ICMP message that the host's kernel got
//	silence      nothing, as if the network had lost the SYN
//	gave up      nothing, and the dial is cancelled
//
// A connected target whose guest does not complete the handshake is reset.

// setHandlers tells gVisor whom to ask about packets that no socket of its own
// wants.
func (s *Stack) setHandlers() {
	// Our own bounds are lower than this one, which must never act: it would drop
	// without telling.
	requests := tcp.NewForwarder(s.ip, bufMost, 2*s.cfg.MaxDials+1, s.serveTCP)
	s.ip.SetTransportProtocolHandler(tcp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		return s.tcpHandler(requests, id, pkt)
	})
	s.ip.SetTransportProtocolHandler(udp.ProtocolNumber, s.udpHandler)
	s.ip.SetTransportProtocolHandler(icmp.ProtocolNumber4, s.icmpHandler)
	s.ip.SetTransportProtocolHandler(icmp.ProtocolNumber6, s.icmpHandler)
}

// tcpHandler sees the segments that belong to no connection. It returns false when
// gVisor should answer with a RST.
func (s *Stack) tcpHandler(requests *tcp.Forwarder, id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	t := tupleOf(id)
	if h.Flags()&header.TCPFlagRst != 0 {
		if s.dials.reset(t, h.SequenceNumber()) {
			s.stats.gaveUp.Add(1)
		}
		return true
	}
	if h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck) != header.TCPFlagSyn ||
		t.Target.Addr() == s.cfg.Gateway4 || t.Target.Addr() == s.cfg.Gateway6 {
		return s.dials.holds(t) // a segment that the guest's own rules kept from its kernel's answer
	}
	if ip := infoOf(id, pkt); ip.hops <= 1 {
		s.unreachable(t, quote8(h), h[8:], flow.Verdict{ICMP: timeExceededFor(ip.src)})
		return true
	}
	d, a := s.dials.begin(t, h, time.Now(), func(d *dial) {
		s.flows.Add(1)
		d.ctx, d.cancel = context.WithCancel(s.ctx)
	})
	if !s.admitted(a) && !(a == repeated && s.dials.detour(d, s.ctx)) {
		return true
	}
	if !requests.HandlePacket(id, pkt) { // a bad checksum
		s.dials.end(t)
		s.flows.Done()
		return true
	}
	return true
}

// admitted reports whether a SYN is to be dialled, and counts why not.
func (s *Stack) admitted(a admission) bool {
	switch a {
	case overDials:
		s.stats.dialLimit.Add(1)
	case overGuest:
		s.stats.guestLimit.Add(1)
	case replaced:
		s.stats.gaveUp.Add(1)
	}
	return a == admitted
}

// tupleOf renames at the boundary: gVisor calls the guest's target "local".
func tupleOf(id stack.TransportEndpointID) flow.Tuple {
	return flow.Tuple{
		Proto:  flow.TCP,
		Guest:  netip.AddrPortFrom(fromTCPIP(id.RemoteAddress), id.RemotePort),
		Target: netip.AddrPortFrom(fromTCPIP(id.LocalAddress), id.LocalPort),
	}
}

func timeExceededFor(a netip.Addr) flow.ICMP {
	if a.Is4() {
		return timeExceeded4
	}
	return timeExceeded6
}

// serveTCP serves one connection from its SYN to its end. gVisor calls it in a
// goroutine of its own.
func (s *Stack) serveTCP(r *tcp.ForwarderRequest) {
	defer s.flows.Done()
	guest, v := s.answer(r)
	if guest != nil {
		defer s.served.Add(-1)
		guest.onReset(func() {
			guest.Abort()
			v.Host.Abort()
		})
		s.forward.Relay(s.ctx, guest, v)
		s.bufs.leave()
	}
}

// answer asks the forwarder and answers the SYN. It returns the guest's connection
// if there is one.
func (s *Stack) answer(r *tcp.ForwarderRequest) (*guestConn, flow.Verdict) {
	t := tupleOf(r.ID())
	d := s.dials.get(t)
	defer s.dials.end(t)

	var v flow.Verdict
	if d.held.kept != nil {
		v = *d.held.kept
	} else {
		v = s.forward.Decide(d.ctx, t)
		if v.Flow != nil && s.kernel.inUse(t.Target.Addr()) {
			v.Flow.FallBack()
		}
	}
	switch v.Answer {
	case flow.Connect:
		return s.connect(d, r, v), v
	case flow.Reset:
		r.Complete(true)
	case flow.Unreachable:
		r.Complete(false)
		s.unreachable(t, d.syn, d.rest, v)
	default:
		r.Complete(false)
	}
	return nil, v
}

// connect completes the guest's handshake. On failure it gives the verdict back and
// returns nil.
func (s *Stack) connect(d *dial, r *tcp.ForwarderRequest, v flow.Verdict) *guestConn {
	if d.ctx.Err() != nil { // the guest gave up, or we end, while the target answered
		r.Complete(false)
		s.forward.Discard(v)
		return nil
	}
	id := r.ID() // Complete forgets it
	size := s.bufs.enter()
	s.served.Add(1)
	wq := new(waiter.Queue)
	ep, terr := r.CreateEndpoint(wq)
	r.Complete(false)
	if terr != nil {
		s.served.Add(-1)
		s.bufs.leave()
		s.forward.Discard(v)
		return nil
	}
	guest := tupleOf(id).Guest.Addr()
	s.dials.know(guest)
	if d.held.kept != nil {
		v.Flow.FallBack()
		s.kernelDo(func(k *kernelPath) { k.avoid(guest) })
	}
	limitBuffers(ep, size)
	return newGuestConn(ep, wq)
}

// unreachable sends the ICMP message of v about the guest's SYN.
func (s *Stack) unreachable(t flow.Tuple, syn [8]byte, rest []byte, v flow.Verdict) {
	s.writeICMPError(icmpError{
		ICMP: v.ICMP, from: v.From, mtu: v.MTU,
		src: t.Guest.Addr(), dst: t.Target.Addr(), proto: tcp.ProtocolNumber,
		transport: syn, payload: rest, size: len(rest),
	})
}
