package forward

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Theory of operation.
//
// A client of a published UDP port learns that the guest's port is closed as it would
// from any host: by an ICMP error that quotes its datagram, from the address that it
// sent to. Only a raw socket can send one, which root may open. There is one for each
// family, made for the first error; a process that may not is asked once.

// clientQuote bounds the payload that is quoted, in bytes: an ICMPv4 error has at most
// 576 (RFC 1812 section 4.3.2.3).
const clientQuote = 576 - 20 - icmpHeaderLen - 20 - udpHeaderLen

const udpHeaderLen = 8

// icmpToClients sends ICMP errors of one family.
type icmpToClients struct {
	mu     sync.Mutex // guards the fields below
	tried  bool
	closed bool
	fd     int // valid if it was tried and not denied
	denied bool
}

// tell implements inboundSockets.
func (u *hostUDPSockets) tell(e clientError) bool {
	v6 := e.client.Addr().Is6()
	s := &u.icmp4
	if v6 {
		s = &u.icmp6
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.openLocked(v6) {
		return false
	}
	var oob []byte
	if from := e.asked.Addr(); from.IsValid() {
		oob = putPktinfo(make([]byte, 64), from)
	}
	to := sockaddr(netip.AddrPortFrom(e.client.Addr(), 0))
	if sa, ok := to.(*unix.SockaddrInet6); ok {
		sa.ZoneId = zoneOf(e.client.Addr())
	}
	_, err := unix.SendmsgN(s.fd, e.message(), oob, to, unix.MSG_DONTWAIT)
	return err == nil
}

// openLocked makes the socket, once, and reports whether there is one. The caller must
// hold mu.
func (s *icmpToClients) openLocked(v6 bool) bool {
	if s.tried || s.closed {
		return !s.denied && !s.closed
	}
	s.tried = true
	proto := unix.IPPROTO_ICMP
	if v6 {
		proto = unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(domainOf(v6), unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err == nil {
		err = receiveNothing(fd)
	}
	s.fd, s.denied = fd, err != nil
	return !s.denied
}

// receiveNothing has the kernel drop every message that fd would get a copy of. It closes
// fd if it cannot.
func receiveNothing(fd int) error {
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop})
	if err != nil {
		unix.Close(fd)
	}
	return err
}

// closeICMP implements inboundSockets.
func (u *hostUDPSockets) closeICMP() {
	for _, s := range []*icmpToClients{&u.icmp4, &u.icmp6} {
		s.mu.Lock()
		if s.tried && !s.denied && !s.closed {
			unix.Close(s.fd)
		}
		s.closed = true
		s.mu.Unlock()
	}
}

// message builds the error: its header, the quoted IP and UDP headers, and what is known
// of the payload. The kernel adds the IP header, and the checksum of an ICMPv6 one.
func (e *clientError) message() []byte {
	b := make([]byte, icmpHeaderLen, 576)
	b[0], b[1] = e.Type, e.Code
	if e.client.Addr().Is4() {
		binary.BigEndian.PutUint16(b[6:], uint16(min(e.mtu, 0xffff)))
		b = e.appendIPv4(b)
	} else {
		binary.BigEndian.PutUint32(b[4:], e.mtu)
		b = e.appendIPv6(b)
	}
	b = binary.BigEndian.AppendUint16(b, e.client.Port())
	b = binary.BigEndian.AppendUint16(b, e.asked.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(udpHeaderLen+e.size))
	b = append(b, 0, 0) // the checksum that it had is not known
	b = append(b, e.quote[:min(len(e.quote), clientQuote)]...)
	if e.client.Addr().Is4() {
		binary.BigEndian.PutUint16(b[2:], ^sumOnes(b))
	}
	return b
}

func (e *clientError) appendIPv4(b []byte) []byte {
	h := [20]byte{0: 0x45, 8: 1, 9: unix.IPPROTO_UDP}
	binary.BigEndian.PutUint16(h[2:], uint16(min(len(h)+udpHeaderLen+e.size, 0xffff)))
	*(*[4]byte)(h[12:]), *(*[4]byte)(h[16:]) = e.client.Addr().As4(), v4Of(e.asked.Addr())
	binary.BigEndian.PutUint16(h[10:], ^sumOnes(h[:]))
	return append(b, h[:]...)
}

func v4Of(a netip.Addr) [4]byte {
	if a.Is4() {
		return a.As4()
	}
	return [4]byte{}
}

func (e *clientError) appendIPv6(b []byte) []byte {
	h := [40]byte{0: 0x60, 6: unix.IPPROTO_UDP, 7: 1}
	binary.BigEndian.PutUint16(h[4:], uint16(min(udpHeaderLen+e.size, 0xffff)))
	*(*[16]byte)(h[8:]) = e.client.Addr().As16()
	if a := e.asked.Addr(); a.IsValid() {
		*(*[16]byte)(h[24:]) = a.As16()
	}
	return append(b, h[:]...)
}
