package netstack

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/stack/link"
)

// defaultHops is the TTL of packets that nobody gave one (RFC 1700's default).
const defaultHops = 64

// packet is an IP packet under construction: its headers in one buffer, its payload
// elsewhere. Get it with newPacket, hand it back with free.
type packet struct {
	buf   [headLen]byte // IP header, fragment header, transport header
	ipLen int           // bytes of IP header
	len   int           // bytes of buf in use
	src   netip.Addr
	dst   netip.Addr
	proto tcpip.TransportProtocolNumber
	hops  uint8
	tos   uint8
	parts [2][]byte
}

var packets = sync.Pool{New: func() any { return new(packet) }}

func newPacket(src, dst netip.Addr, proto tcpip.TransportProtocolNumber, hops, tos uint8) *packet {
	p := packets.Get().(*packet)
	if hops == 0 {
		hops = defaultHops
	}
	p.src, p.dst, p.proto, p.hops, p.tos = src, dst, proto, hops, tos
	p.ipLen = ipHeaderLen(dst)
	p.len = p.ipLen
	return p
}

func (p *packet) free() {
	p.parts = [2][]byte{}
	packets.Put(p)
}

// transport adds n bytes for the transport header and returns them.
func (p *packet) transport(n int) []byte {
	p.len += n
	return p.buf[p.len-n : p.len]
}

func ipHeaderLen(a netip.Addr) int {
	if a.Is4() {
		return header.IPv4MinimumSize
	}
	return header.IPv6MinimumSize
}

// writePacket sends p with payload as one packet.
func (s *Stack) writePacket(p *packet, vh link.Header, payload []byte) error {
	s.encodeIP(p.buf[:p.ipLen], p, p.len-p.ipLen+len(payload))
	p.parts = [2][]byte{p.buf[:p.len], payload}
	err := s.cfg.Link.WritePacket(vh, p.parts[:])
	if err != nil {
		s.stats.writeErrors.Add(1)
		return err
	}
	s.stats.toGuest.Add(p.len + len(payload))
	return nil
}

// encodeIP writes the IP header of a whole packet with n bytes behind it.
func (s *Stack) encodeIP(b []byte, p *packet, n int) {
	if p.dst.Is4() {
		s.encodeIPv4(b, p, n, uint16(s.ident.Add(1)), 0, 0)
		return
	}
	header.IPv6(b).Encode(&header.IPv6Fields{
		TrafficClass: p.tos, PayloadLength: uint16(n), TransportProtocol: p.proto,
		HopLimit: p.hops, SrcAddr: toTCPIP(p.src), DstAddr: toTCPIP(p.dst),
	})
}

func (s *Stack) encodeIPv4(b []byte, p *packet, n int, id uint16, flags uint8, offset uint16) {
	h := header.IPv4(b)
	h.Encode(&header.IPv4Fields{
		TOS: p.tos, TotalLength: uint16(header.IPv4MinimumSize + n), ID: id, Flags: flags, FragmentOffset: offset,
		TTL: p.hops, Protocol: uint8(p.proto), SrcAddr: toTCPIP(p.src), DstAddr: toTCPIP(p.dst),
	})
	h.SetChecksum(^h.CalculateChecksum())
}

// writeFragments sends p with payload in fragments of at most the MTU (RFC 791
// section 3.2, RFC 8200 section 4.5). Checksums must be complete.
func (s *Stack) writeFragments(p *packet, payload []byte) error {
	// The transport header travels with the first fragment: put it in front.
	body := append(append(make([]byte, 0, p.len-p.ipLen+len(payload)), p.buf[p.ipLen:p.len]...), payload...)
	id := s.ident.Add(1)
	hl := p.ipLen
	if !p.dst.Is4() {
		hl += header.IPv6FragmentHeaderSize
	}
	room := (s.cfg.Link.MTU() - hl) &^ 7 // fragments but the last are multiples of 8 bytes
	for off := 0; off < len(body); off += room {
		part := body[off:min(off+room, len(body))]
		more := off+room < len(body)
		if p.dst.Is4() {
			var flags uint8
			if more {
				flags = header.IPv4FlagMoreFragments
			}
			s.encodeIPv4(p.buf[:hl], p, len(part), uint16(id), flags, uint16(off))
		} else {
			s.encodeIPv6Fragment(p.buf[:hl], p, len(part), id, uint16(off), more)
		}
		p.parts = [2][]byte{p.buf[:hl], part}
		if err := s.cfg.Link.WritePacket(link.Header{}, p.parts[:]); err != nil {
			s.stats.writeErrors.Add(1)
			return err
		}
		s.stats.toGuest.Add(hl + len(part))
	}
	return nil
}

func (s *Stack) encodeIPv6Fragment(b []byte, p *packet, n int, id uint32, off uint16, more bool) {
	header.IPv6(b).Encode(&header.IPv6Fields{
		TrafficClass: p.tos, PayloadLength: uint16(header.IPv6FragmentHeaderSize + n),
		TransportProtocol: header.IPv6FragmentHeader, HopLimit: p.hops, SrcAddr: toTCPIP(p.src), DstAddr: toTCPIP(p.dst),
	})
	f := b[header.IPv6MinimumSize:]
	f[0], f[1] = uint8(p.proto), 0
	if more {
		off |= 1
	}
	binary.BigEndian.PutUint16(f[2:], off)
	binary.BigEndian.PutUint32(f[4:], id)
}
