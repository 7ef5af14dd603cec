package forward

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// queuedError is one entry of a socket's error queue (ip(7), IP_RECVERR).
type queuedError struct {
	icmp bool // typ, code and from are an ICMP message's; else the host's kernel found it
	typ  uint8
	code uint8
	mtu  uint32 // next hop's MTU in bytes, for "too big"
	from netip.Addr
}

// sockExtendedErrLen is the size of struct sock_extended_err; the address of the
// offender follows it.
const sockExtendedErrLen = 16

// readErrorQueue takes the oldest entry off fd's error queue.
func readErrorQueue(fd int) (queuedError, bool) {
	var oob [256]byte
	_, n, _, _, err := unix.Recvmsg(fd, nil, oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if err != nil {
		return queuedError{}, false
	}
	for rest := oob[:n]; len(rest) >= unix.CmsgLen(0); {
		h, data, next, err := unix.ParseOneSocketControlMessage(rest)
		if err != nil {
			return queuedError{}, false
		}
		rest = next
		if h.Level == unix.SOL_IP && h.Type == unix.IP_RECVERR || h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_RECVERR {
			return parseExtendedErr(data)
		}
	}
	return queuedError{}, false
}

// parseExtendedErr reads struct sock_extended_err and the offender behind it.
func parseExtendedErr(b []byte) (queuedError, bool) {
	if len(b) < sockExtendedErrLen {
		return queuedError{}, false
	}
	origin := b[4]
	q := queuedError{
		icmp: origin == unix.SO_EE_ORIGIN_ICMP || origin == unix.SO_EE_ORIGIN_ICMP6,
		typ:  b[5],
		code: b[6],
		mtu:  binary.NativeEndian.Uint32(b[8:]),
	}
	offender := b[sockExtendedErrLen:]
	if len(offender) < 2 {
		return q, true
	}
	switch binary.NativeEndian.Uint16(offender) {
	case unix.AF_INET:
		if len(offender) >= unix.SizeofSockaddrInet4 {
			q.from = netip.AddrFrom4([4]byte(offender[4:8]))
		}
	case unix.AF_INET6:
		if len(offender) >= unix.SizeofSockaddrInet6 {
			q.from = netip.AddrFrom16([16]byte(offender[8:24])).Unmap()
		}
	}
	return q, true
}
