package netstack

import (
	"errors"
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
// A datagram from the guest reaches udpFromGuest, whole: straight from the reader,
// or reassembled by gVisor through udpHandler. It is checked (RFC 768; a zero
// checksum is legal in IPv4 only) and given to the forwarder.
//
// WriteDatagram makes the packet of a reply. Its checksum is left to the guest's
// kernel, which will mostly never compute it. A datagram longer than the MTU is cut
// into IP fragments here, with a checksum; a train of datagrams (Segment) goes as
// one packet where the link takes that, else one by one.
//
// As a router we take one from the TTL. What arrives with a TTL of 1 ends here, with
// a "time exceeded" from the gateway: the first line of a traceroute.

// udpHandler takes datagrams that gVisor reassembled or that carry IPv6 extension
// headers.
func (s *Stack) udpHandler(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	ip, b := infoOf(id, pkt), transportOf(pkt)
	if (ip.dst == s.cfg.Gateway4 || ip.dst == s.cfg.Gateway6) && !s.expects(&ip, b) {
		return false // nobody listens on that port: gVisor says so
	}
	s.udpFromGuest(&ip, b, false, 0)
	return true
}

// expects reports whether a datagram to the gateway is the forwarder's. b starts with
// the UDP header.
func (s *Stack) expects(ip *ipInfo, b []byte) bool {
	if len(b) < header.UDPMinimumSize {
		return false
	}
	h := header.UDP(b)
	return s.forward.Expects(flow.Tuple{
		Proto:  flow.UDP,
		Guest:  netip.AddrPortFrom(ip.src, h.SourcePort()),
		Target: netip.AddrPortFrom(ip.dst, h.DestinationPort()),
	})
}

// transportOf copies a packet from its transport header on into one piece.
func transportOf(pkt *stack.PacketBuffer) []byte {
	h, data := pkt.TransportHeader().Slice(), pkt.Data().AsRange()
	b := append(make([]byte, 0, len(h)+data.Size()), h...)
	if v := data.ToView(); v != nil { // nil for no data
		b = append(b, v.AsSlice()...)
		v.Release()
	}
	return b
}

// infoOf reads the IP header of a packet that gVisor parsed.
func infoOf(id stack.TransportEndpointID, pkt *stack.PacketBuffer) ipInfo {
	ip := ipInfo{src: fromTCPIP(id.RemoteAddress), dst: fromTCPIP(id.LocalAddress)}
	switch pkt.NetworkProtocolNumber {
	case header.IPv4ProtocolNumber:
		h := header.IPv4(pkt.NetworkHeader().Slice())
		ip.hops = h.TTL()
		ip.tos, _ = h.TOS()
		ip.df = h.Flags()&header.IPv4FlagDontFragment != 0
	case header.IPv6ProtocolNumber:
		h := header.IPv6(pkt.NetworkHeader().Slice())
		ip.hops = h.HopLimit()
		ip.tos, _ = h.TOS()
	}
	return ip
}

// udpFromGuest checks one datagram, or a train of them, and passes it on. b starts
// with the UDP header.
func (s *Stack) udpFromGuest(ip *ipInfo, b []byte, verified bool, segment int) {
	if len(b) < header.UDPMinimumSize {
		s.stats.malformed.Add(1)
		return
	}
	h := header.UDP(b)
	if segment == 0 {
		if l := int(h.Length()); l < header.UDPMinimumSize || l > len(b) {
			s.stats.malformed.Add(1)
			return
		}
		b = b[:h.Length()]
	}
	if !verified && !udpChecksumOK(ip, b) {
		s.stats.badChecksum.Add(1)
		return
	}
	guest := netip.AddrPortFrom(ip.src, h.SourcePort())
	target := netip.AddrPortFrom(ip.dst, h.DestinationPort())
	payload := b[header.UDPMinimumSize:]
	if ip.hops <= 1 {
		s.timeExceeded(flow.Tuple{Proto: flow.UDP, Guest: guest, Target: target}, payload)
		return
	}
	if guest.Port() == 0 || target.Port() == 0 {
		s.stats.malformed.Add(1)
		return
	}
	d := flow.Datagram{
		Guest: guest, Target: target, Payload: payload, Segment: segment,
		Hops: ip.hops - 1, TOS: ip.tos, DontFragment: ip.df,
	}
	if !s.collect(&d) {
		s.forward.Datagram(d)
	}
}

func udpChecksumOK(ip *ipInfo, b []byte) bool {
	h := header.UDP(b)
	if h.Checksum() == 0 {
		return ip.src.Is4() // RFC 768; RFC 8200 section 8.1 requires one
	}
	return checksum.Checksum(b, pseudo(ip.src, ip.dst, header.UDPProtocolNumber, len(b))) == 0xffff
}

// pseudo sums the pseudo header of a transport payload of n bytes.
func pseudo(src, dst netip.Addr, proto tcpip.TransportProtocolNumber, n int) uint16 {
	return header.PseudoHeaderChecksum(proto, toTCPIP(src), toTCPIP(dst), uint16(n))
}

// udpChecksumOffset is where the checksum is in a UDP header.
const udpChecksumOffset = 6

// maxUDPPayload is the longest payload of one UDP datagram over IPv4, in bytes.
const maxUDPPayload = link.MaxPacket - header.IPv4MinimumSize - header.UDPMinimumSize

// ErrTooLong reports a payload that does not fit a packet. It is not wrapped.
var ErrTooLong = errors.New("payload too long for an IP packet")

// WriteDatagram implements flow.Guest.
func (s *Stack) WriteDatagram(d flow.Datagram) error {
	if d.Segment > 0 && len(d.Payload) > d.Segment && !s.canSendTrain(&d) {
		return s.writeEach(d)
	}
	if len(d.Payload) > maxUDPPayload {
		return fmt.Errorf("write datagram of %d bytes to %v: %w", len(d.Payload), d.Guest, ErrTooLong)
	}
	train := d.Segment > 0 && len(d.Payload) > d.Segment
	b := newPacket(d.Target.Addr(), d.Guest.Addr(), header.UDPProtocolNumber, d.Hops, d.TOS)
	defer b.free()
	hdr := header.UDP(b.transport(header.UDPMinimumSize))
	hdr.Encode(&header.UDPFields{
		SrcPort: d.Target.Port(), DstPort: d.Guest.Port(),
		Length: uint16(header.UDPMinimumSize + len(d.Payload)),
	})
	sum := pseudo(d.Target.Addr(), d.Guest.Addr(), header.UDPProtocolNumber, header.UDPMinimumSize+len(d.Payload))
	if !train && b.ipLen+header.UDPMinimumSize+len(d.Payload) > s.cfg.Link.MTU() {
		sum = ^checksum.Checksum(d.Payload, checksum.Checksum(hdr, sum))
		if sum == 0 {
			sum = 0xffff
		}
		hdr.SetChecksum(sum)
		return s.writeFragments(b, d.Payload)
	}
	hdr.SetChecksum(sum)
	vh := link.Header{
		Flags:  link.NeedsCsum,
		HdrLen: uint16(b.ipLen + header.UDPMinimumSize), CsumStart: uint16(b.ipLen), CsumOffset: udpChecksumOffset,
	}
	if train {
		vh.GSOType, vh.GSOSize = link.GSOUDPL4, uint16(d.Segment)
	}
	return s.writePacket(b, vh, d.Payload)
}

// canSendTrain reports whether the link cuts d for us: each piece must fit the MTU
// and the whole a packet.
func (s *Stack) canSendTrain(d *flow.Datagram) bool {
	headers := header.UDPMinimumSize + ipHeaderLen(d.Guest.Addr())
	return s.cfg.Link.Offloads().USO && headers+d.Segment <= s.cfg.Link.MTU() && headers+len(d.Payload) <= link.MaxPacket
}

// writeEach sends the datagrams of a train one by one.
func (s *Stack) writeEach(d flow.Datagram) error {
	one := d
	one.Segment = 0
	for rest := d.Payload; len(rest) > 0; {
		n := min(d.Segment, len(rest))
		one.Payload, rest = rest[:n], rest[n:]
		if err := s.WriteDatagram(one); err != nil {
			return err
		}
	}
	return nil
}
