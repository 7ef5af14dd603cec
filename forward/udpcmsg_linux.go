package forward

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// ancillary is what control messages say about a received datagram.
type ancillary struct {
	segment int   // size of the datagrams in a train, 0 for a single one
	hops    uint8 // TTL or hop limit on arrival
	tos     uint8

	local netip.Addr // where it was sent to; the zero Addr if that was not asked for

	// overrun counts what the kernel has dropped since the socket's start because we
	// were slow; 0 also when it does not say.
	overrun uint32
}

// like reports whether two datagrams' packets looked the same.
func (a ancillary) like(b ancillary) bool {
	return a.hops == b.hops && a.tos == b.tos && a.local == b.local
}

// parseAncillary reads the control messages in oob. Others, and broken ones, are
// skipped.
func parseAncillary(oob []byte) (a ancillary) {
	a.hops = defaultHops
	for len(oob) >= unix.CmsgLen(0) {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return a
		}
		oob = rest
		switch {
		case h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO:
			a.segment = int(cmsgNumber(data) & 0xffff)
		case h.Level == unix.SOL_IP && h.Type == unix.IP_TTL, h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_HOPLIMIT:
			a.hops = uint8(cmsgNumber(data))
		case h.Level == unix.SOL_IP && h.Type == unix.IP_TOS, h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_TCLASS:
			a.tos = uint8(cmsgNumber(data))
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SO_RXQ_OVFL:
			a.overrun = cmsgNumber(data)
		case h.Level == unix.SOL_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			a.local = netip.AddrFrom4([4]byte(data[4:8])) // ipi_spec_dst: where to answer from
		case h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			a.local = netip.AddrFrom16([16]byte(data[:16]))
		}
	}
	return a
}

// putPktinfo writes the control message that has a datagram leave from a to the begin of
// oob, and returns it.
func putPktinfo(oob []byte, a netip.Addr) []byte {
	n := unix.SizeofInet6Pktinfo
	if a.Is4() {
		n = unix.SizeofInet4Pktinfo
	}
	oob = oob[:unix.CmsgSpace(n)]
	clear(oob)
	data := oob[unix.CmsgLen(0):]
	if a.Is4() {
		putCmsgHeader(oob, unix.SOL_IP, unix.IP_PKTINFO, n)
		*(*[4]byte)(data[4:8]) = a.As4() // the interface, 0, is the route's
		return oob
	}
	putCmsgHeader(oob, unix.SOL_IPV6, unix.IPV6_PKTINFO, n)
	*(*[16]byte)(data[:16]) = a.As16()
	return oob
}

// zoned gives a link-local address the interface that it is behind, and zoneOf reads
// it; others have none.
func zoned(a netip.Addr, iface uint32) netip.Addr {
	if !a.IsLinkLocalUnicast() || a.Is4() {
		return a
	}
	return a.WithZone(strconv.FormatUint(uint64(iface), 10))
}

func zoneOf(a netip.Addr) uint32 {
	if a.Zone() == "" {
		return 0
	}
	n, _ := strconv.ParseUint(a.Zone(), 10, 32)
	return uint32(n)
}

// cmsgNumber reads an int, or the single byte of IP_TOS.
func cmsgNumber(b []byte) uint32 {
	switch {
	case len(b) >= 4:
		return binary.NativeEndian.Uint32(b)
	case len(b) >= 1:
		return uint32(b[0])
	}
	return 0
}

// defaultHops is the TTL of a packet whose sender does not say otherwise.
const defaultHops = 64

// sentError is one entry of a datagram socket's error queue.
type sentError struct {
	queuedError
	to    netip.AddrPort // where the datagram went
	quote []byte         // what the message quotes of it, after the IP or UDP header; borrowed
}

// errorQuote is the longest quotation: an ICMPv6 error has at most 1280 bytes.
const errorQuote = 1280

// errorRoom is memory to read an error queue with.
type errorRoom struct {
	quote [errorQuote]byte
	oob   [512]byte
}

var errorRooms = sync.Pool{New: func() any { return new(errorRoom) }}

// drainErrors gives s's ICMP errors to f, oldest first, and forgets what the host's
// kernel reported by itself: the sender was told.
func (s *sharedFD) drainErrors(f func(sentError)) {
	room := errorRooms.Get().(*errorRoom)
	defer errorRooms.Put(room)
	for {
		s.errMu.Lock()
		n, oobn, _, to, err := unix.Recvmsg(s.fd, room.quote[:], room.oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		s.errMu.Unlock()
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return
		}
		e, ok := parseSentError(room.oob[:oobn])
		if !ok || !e.icmp {
			continue
		}
		switch sa := to.(type) {
		case *unix.SockaddrInet4:
			e.to = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			e.to = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
		}
		e.quote = room.quote[:n]
		f(e)
	}
}

// parseSentError finds the extended error in the control messages of an error queue.
func parseSentError(oob []byte) (e sentError, ok bool) {
	for len(oob) >= unix.CmsgLen(0) {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return e, false
		}
		oob = rest
		if h.Level == unix.SOL_IP && h.Type == unix.IP_RECVERR || h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_RECVERR {
			e.queuedError, ok = parseExtendedErr(data)
			return e, ok
		}
	}
	return e, false
}
