package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/slipway-net/slipway/stack/link"
)

// Theory of operation.
//
// Each packet is read into two places: its first headLen bytes into an array of the
// reader's, where the headers are looked at, and the rest into a 64 KiB chunk of
// gVisor's pool. A long packet's chunk becomes part of the packet that gVisor gets,
// without a copy; the head becomes a small view of its own, because gVisor copies
// the whole view that holds a header when it is shared. A short packet is copied
// into a view of its size and the chunk is used again: a queued 100-byte segment
// must not pin 64 KiB.
//
// The chunk is filled from headLen on. A datagram's payload starts somewhere in the
// head; its first bytes are copied in front of the rest, and the forwarder gets one
// piece of memory without a copy of the bulk.

const (
	// headLen holds the longest headers of a TCP segment: 40 bytes of IPv6 and 60
	// of TCP, or 60 and 60 of IPv4; and a small packet as a whole.
	headLen = 128

	// copyMax is the longest packet that is copied rather than handed over.
	copyMax = 4096
)

// errLinkClosed is what readLoop returns after the link was closed.
var errLinkClosed = fmt.Errorf("link: %w", net.ErrClosed)

// reader holds the packet that was read last.
type reader struct {
	s     *Stack
	head  [headLen]byte
	chunk *buffer.View // 64 KiB; bytes from headLen on are the packet's after head
	n     int          // length of the packet
	hdr   link.Header
}

// readLoop reads the link until it fails.
func (s *Stack) readLoop() error {
	r := &reader{s: s, chunk: newChunk()}
	defer func() { r.chunk.Release() }()
	for {
		n, h, err := s.cfg.Link.ReadPacket(r.head[:], r.chunk.AsSlice()[headLen:])
		if errors.Is(err, net.ErrClosed) {
			return errLinkClosed
		}
		if err != nil {
			return err
		}
		r.take(n, h)
	}
}

// take dispatches the packet that was read.
func (r *reader) take(n int, h link.Header) {
	r.n, r.hdr = n, h
	r.s.stats.fromGuest.Add(n)
	r.dispatch()
}

// turn is how many packets are read before others on the same thread have theirs.
const turn = 64

// poll has the configuration's thread read the link, until stop is called. When the link
// fails it tells failed.
func (s *Stack) poll(failed chan<- error) (stop func()) {
	r := &reader{s: s, chunk: newChunk()}
	s.train = new(train)
	unwatch, err := s.cfg.Poll(r.turns(s.cfg.Link.(link.TryReader), failed))
	if err != nil {
		failed <- err
		unwatch = func() {}
	}
	return func() {
		unwatch()
		r.chunk.Release()
	}
}

// turns returns a function that reads what the link has, without waiting, and says
// whether there may be more.
func (r *reader) turns(l link.TryReader, failed chan<- error) func() (again bool) {
	return func() bool {
		defer r.s.sendTrain()
		for range turn {
			n, h, err := l.TryReadPacket(r.head[:], r.chunk.AsSlice()[headLen:])
			switch {
			case errors.Is(err, link.ErrAgain):
				return false
			case err != nil:
				select {
				case failed <- err:
				default: // told already
				}
				return false
			}
			r.take(n, h)
		}
		return true
	}
}

// newChunk returns the largest view that gVisor's pool has.
func newChunk() *buffer.View { return buffer.NewViewSize(buffer.MaxChunkSize) }

// dispatch sends the packet on one of its ways.
func (r *reader) dispatch() {
	if r.n == 0 {
		r.s.stats.malformed.Add(1)
		return
	}
	switch r.head[0] >> 4 {
	case 4:
		r.ipv4()
	case 6:
		r.ipv6()
	default:
		r.s.stats.malformed.Add(1)
	}
}

func (r *reader) ipv4() {
	h := header.IPv4(r.head[:])
	hl := int(h.HeaderLength())
	if r.n < header.IPv4MinimumSize || hl < header.IPv4MinimumSize || int(h.TotalLength()) != r.n || hl > r.n {
		r.s.stats.malformed.Add(1)
		return
	}
	if !h.IsChecksumValid() {
		r.s.stats.badChecksum.Add(1)
		return
	}
	src := netip.AddrFrom4([4]byte(r.head[12:16]))
	dst := netip.AddrFrom4([4]byte(r.head[16:20]))
	if !r.s.plausible(src, dst) {
		return
	}
	whole := h.Flags()&header.IPv4FlagMoreFragments == 0 && h.FragmentOffset() == 0
	ip := ipInfo{
		src: src, dst: dst, hops: h.TTL(), tos: r.head[1],
		df: h.Flags()&header.IPv4FlagDontFragment != 0,
	}
	if whole && !r.slow(h.Protocol(), hl, &ip, dst == r.s.cfg.Gateway4) {
		return
	}
	r.toStack(header.IPv4ProtocolNumber)
}

func (r *reader) ipv6() {
	h := header.IPv6(r.head[:])
	if r.n < header.IPv6MinimumSize || int(h.PayloadLength()) != r.n-header.IPv6MinimumSize {
		r.s.stats.malformed.Add(1)
		return
	}
	src := netip.AddrFrom16([16]byte(r.head[8:24]))
	dst := netip.AddrFrom16([16]byte(r.head[24:40]))
	if !r.s.plausible(src, dst) {
		return
	}
	tos, _ := h.TOS()
	ip := ipInfo{src: src, dst: dst, hops: h.HopLimit(), tos: tos, df: true}
	if !r.slow(h.NextHeader(), header.IPv6MinimumSize, &ip, dst == r.s.cfg.Gateway6) {
		return
	}
	r.toStack(header.IPv6ProtocolNumber)
}

// ipInfo is what the datagram handlers need of an IP header.
type ipInfo struct {
	src, dst netip.Addr
	hops     uint8 // as received
	tos      uint8
	df       bool
}

// slow handles what gVisor need not see and drops what it must not; it reports
// whether the packet is gVisor's. toGateway tells that it is for ourselves. gVisor
// checks no TCP or UDP checksums: it asks the link once and for all, and most packets
// carry none that is worth checking.
func (r *reader) slow(proto uint8, hl int, ip *ipInfo, toGateway bool) bool {
	switch p := tcpip.TransportProtocolNumber(proto); {
	case p == header.TCPProtocolNumber:
		return r.checked(r.verified() || tcpChecksumOK(ip, r.payload(hl))) && !r.hold(ip, r.payload(hl), toGateway)
	case p == header.UDPProtocolNumber && toGateway && !r.s.expects(ip, r.payload(hl)):
		return r.checked(r.verified() || r.n < hl+header.UDPMinimumSize || udpChecksumOK(ip, r.payload(hl)))
	case p == header.UDPProtocolNumber:
		r.s.udpFromGuest(ip, r.payload(hl), r.verified(), int(r.segment()))
		return false
	case p == icmpOf(ip.src):
		return r.s.icmpFromGuest(ip, r.payload(hl), toGateway)
	case toGateway:
		return true
	case ip.src.Is6() && isExtension(proto):
		return true
	}
	// gVisor would say "protocol unreachable" in the target's name, which was not asked.
	r.s.stats.ignored.Add(1)
	return false
}

// isExtension reports whether proto is an IPv6 extension header that gVisor looks
// behind (RFC 8200 section 4.1).
func isExtension(proto uint8) bool {
	switch header.IPv6ExtensionHeaderIdentifier(proto) {
	case header.IPv6HopByHopOptionsExtHdrIdentifier, header.IPv6RoutingExtHdrIdentifier,
		header.IPv6FragmentExtHdrIdentifier, header.IPv6DestinationOptionsExtHdrIdentifier:
		return true
	}
	return false
}

// checked counts a wrong checksum and returns ok.
func (r *reader) checked(ok bool) bool {
	if !ok {
		r.s.stats.badChecksum.Add(1)
	}
	return ok
}

func tcpChecksumOK(ip *ipInfo, b []byte) bool {
	return checksum.Checksum(b, pseudo(ip.src, ip.dst, header.TCPProtocolNumber, len(b))) == 0xffff
}

// verified reports whether the guest's kernel vouches for the transport checksum:
// it left it to us, so the bytes never were on a wire, or it checked it.
func (r *reader) verified() bool { return r.hdr.Flags&(link.NeedsCsum|link.DataValid) != 0 }

// segment returns the size of the datagrams in a train, or 0.
func (r *reader) segment() uint16 {
	if r.hdr.GSOType == link.GSOUDPL4 {
		return r.hdr.GSOSize
	}
	return 0
}

// payload returns the packet from byte hl on in one piece, valid until the next
// read. hl is at most headLen.
func (r *reader) payload(hl int) []byte {
	if r.n <= headLen {
		return r.head[hl:r.n]
	}
	b := r.chunk.AsSlice()
	copy(b[hl:headLen], r.head[hl:])
	return b[hl:r.n]
}

// plausible counts and refuses packets with an address that may not be on a wire
// (RFC 1122 section 3.2.1.3, RFC 6890), and drops silently what is normal noise on
// an interface but goes nowhere from here.
func (s *Stack) plausible(src, dst netip.Addr) bool {
	switch {
	case src == dst, !src.IsValid(), src.IsMulticast(), src.IsLoopback(), src == broadcast4,
		src == s.cfg.Gateway4, src == s.cfg.Gateway6, dst.IsLoopback(), src.Is4In6(), dst.Is4In6():
		s.stats.martian.Add(1)
		return false
	case dst.IsMulticast(), dst == broadcast4, src.IsLinkLocalUnicast(), dst.IsUnspecified(), src.IsUnspecified():
		// The guest's kernel sends router solicitations and multicast reports by itself.
		s.stats.ignored.Add(1)
		return false
	}
	return true
}

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// toStack gives the packet to gVisor.
func (r *reader) toStack(proto tcpip.NetworkProtocolNumber) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: r.buffer()})
	r.s.ep.deliver(proto, pkt)
}

// buffer makes gVisor's memory of the packet. The reader's chunk goes with a long
// packet and is replaced.
func (r *reader) buffer() buffer.Buffer {
	if r.n <= headLen {
		return buffer.MakeWithView(buffer.NewViewWithData(r.head[:r.n]))
	}
	if r.n <= copyMax {
		v := buffer.NewView(r.n)
		v.Write(r.head[:])
		v.Write(r.chunk.AsSlice()[headLen:r.n])
		return buffer.MakeWithView(v)
	}
	b := buffer.MakeWithView(buffer.NewViewWithData(r.head[:]))
	r.chunk.CapLength(r.n)
	r.chunk.TrimFront(headLen)
	b.Append(r.chunk)
	r.chunk = newChunk()
	return b
}

// quote8 returns the first eight bytes of a transport header, which is what an ICMP
// error must bring back (RFC 792), padded with zeroes.
func quote8(b []byte) (q [8]byte) {
	copy(q[:], b)
	return q
}

// be16 reads a big endian number.
func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }
