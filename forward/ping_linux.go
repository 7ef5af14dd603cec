package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// A ping socket (icmp(7), SOCK_DGRAM with IPPROTO_ICMP) belongs to one ping: the kernel
// gives it an identifier, fills that in, and delivers the replies and errors that carry
// it and no others. Root without ping sockets gets raw ones, one for each family and
// shared by all pings (pingraw_linux.go). Which it is, is found out once.

// hostPingSockets make the host's.
type hostPingSockets struct {
	poll poller
	raw4 rawPings
	raw6 rawPings

	once  sync.Once
	found PingMode
}

func newPingSockets() pingSockets {
	h := new(hostPingSockets)
	h.raw4.poll, h.raw6.poll = &h.poll, &h.poll
	h.raw6.v6 = true
	return h
}

// mode implements pingSockets.
func (h *hostPingSockets) mode() PingMode {
	h.once.Do(func() { h.found = findPingMode() })
	return h.found
}

// findPingMode tries which sockets the kernel gives us. The sysctl that opens ping
// sockets is one for both families.
func findPingMode() PingMode {
	err := tryICMP(unix.SOCK_DGRAM)
	if err == nil {
		return PingMode{Mode: PingSocket}
	}
	if tryICMP(unix.SOCK_RAW) == nil {
		return PingMode{Mode: PingRaw}
	}
	return PingMode{
		Mode: PingUnavailable,
		Why:  fmt.Sprintf("no ping sockets: %v", err),
		Hint: `sysctl -w net.ipv4.ping_group_range="0 2147483647"`,
	}
}

func tryICMP(typ int) error {
	fd, err := unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// open implements pingSockets.
func (h *hostPingSockets) open(p *ping) (pingSocket, error) {
	v6 := p.dial.Is6()
	switch m := h.mode(); {
	case m.Mode == PingSocket:
		return h.openPingSocket(p, v6)
	case m.Mode == PingRaw && v6:
		return h.raw6.open(p)
	case m.Mode == PingRaw:
		return h.raw4.open(p)
	default:
		return nil, fmt.Errorf("%w: %s", errPingUnavailable, m.Why)
	}
}

func (h *hostPingSockets) close() {
	h.poll.close()
	h.raw4.closeSocket()
	h.raw6.closeSocket()
}

func (h *hostPingSockets) openPingSocket(p *ping, v6 bool) (pingSocket, error) {
	s := &dgramPing{ping: p, poll: &h.poll, out: icmpSender{header: headerOptions{v6: v6}}}
	if err := s.out.open(unix.SOCK_DGRAM); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoSocket, err)
	}
	if err := h.poll.add(s.out.fd.fd, s); err != nil {
		s.out.fd.close()
		return nil, fmt.Errorf("%w: %w", errNoSocket, err)
	}
	return s, nil
}

// icmpSender sends echo requests from an ICMP socket of either kind. Calls are
// serialised by its owner.
type icmpSender struct {
	fd     sharedFD
	header headerOptions
}

// open makes the socket.
func (s *icmpSender) open(typ int) error {
	proto := unix.IPPROTO_ICMP
	if s.header.v6 {
		proto = unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(domainOf(s.header.v6), typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return fmt.Errorf("make icmp socket: %w", err)
	}
	if err := reportAll(fd, s.header.v6); err != nil {
		unix.Close(fd)
		return err
	}
	s.fd.open(fd)
	return nil
}

// ICMP message types (RFC 792, RFC 4443) and the length of their header in bytes.
const (
	echoRequest4  = 8
	echoReply4    = 0
	echoRequest6  = 128
	echoReply6    = 129
	icmpHeaderLen = 8
)

// send sends one request with identifier id, which a ping socket replaces by its own.
// The errors are those of pingSocket.send.
func (s *icmpSender) send(e *flow.Echo, id uint16, to netip.Addr) error {
	if !s.fd.use() {
		return errSocketFull
	}
	defer s.fd.done()
	s.header.set(s.fd.fd, e.Hops, e.TOS, e.DontFragment)
	msg := make([]byte, icmpHeaderLen, icmpHeaderLen+len(e.Payload))
	msg[0] = echoRequest4
	if s.header.v6 {
		msg[0] = echoRequest6
	}
	binary.BigEndian.PutUint16(msg[4:], id)
	binary.BigEndian.PutUint16(msg[6:], e.Seq)
	msg = append(msg, e.Payload...)
	if !s.header.v6 { // in ICMPv6 the kernel computes it always
		binary.BigEndian.PutUint16(msg[2:], ^sumOnes(msg))
	}
	return s.sendMessage(msg, to)
}

// sendMessage sends msg, again when it met an error that an earlier one left behind.
func (s *icmpSender) sendMessage(msg []byte, to netip.Addr) error {
	sa := sockaddr(netip.AddrPortFrom(to, 0))
	err := sendMsg(s.fd.fd, msg, nil, sa)
	if err == nil {
		return nil
	}
	if err = s.fd.sendAgain(msg, nil, sa); err == nil {
		return nil
	}
	if isFull(err) {
		return errSocketFull
	}
	if errors.Is(err, unix.EMSGSIZE) {
		if mtu := routeMTU(netip.AddrPortFrom(to, discardPort)); mtu != 0 {
			return &tooBigError{mtu}
		}
	}
	return err
}

// discardPort is any port: only a route is asked for, nothing is sent.
const discardPort = 9

// sumOnes is the ones' complement sum of RFC 1071; over a message with its checksum it
// is 0xffff.
func sumOnes(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	return uint16(sum)
}

// echoMessage is an echo request or reply.
type echoMessage struct {
	typ     uint8
	id, seq uint16
	payload []byte // borrowed
}

// parseEcho reads an ICMP message as an echo message.
func parseEcho(b []byte) (m echoMessage, ok bool) {
	if len(b) < icmpHeaderLen || b[1] != 0 {
		return m, false
	}
	return echoMessage{
		typ: b[0], id: binary.BigEndian.Uint16(b[4:]), seq: binary.BigEndian.Uint16(b[6:]), payload: b[icmpHeaderLen:],
	}, true
}

// isReply and isRequest check the type against the socket's family.
func (m *echoMessage) isReply(v6 bool) bool {
	return m.typ == echoReply4 && !v6 || m.typ == echoReply6 && v6
}

func (m *echoMessage) isRequest(v6 bool) bool {
	return m.typ == echoRequest4 && !v6 || m.typ == echoRequest6 && v6
}

// dgramPing is a ping socket.
type dgramPing struct {
	ping *ping
	poll *poller
	out  icmpSender
}

// send implements pingSocket.
func (s *dgramPing) send(e flow.Echo, to netip.Addr) error { return s.out.send(&e, 0, to) }

func (s *dgramPing) close() {
	s.poll.remove(s.out.fd.fd, s)
	s.out.fd.close()
}

// ready implements pollable.
func (s *dgramPing) ready(events uint32, rx *recvBatch) {
	receiveICMP(&s.out, s.poll, events, rx, s.reply, s.failed)
}

func (s *dgramPing) reply(from netip.Addr, b []byte, a ancillary) {
	if m, ok := parseEcho(b); ok && m.isReply(s.out.header.v6) {
		s.ping.fromHost(from, m.seq, m.payload, a.hops, a.tos)
	}
}

func (s *dgramPing) failed(e sentError) {
	if m, ok := parseEcho(e.quote); ok && m.isRequest(s.out.header.v6) {
		s.ping.hostError(flow.ICMP{Type: e.typ, Code: e.code}, e.from, e.mtu, m.seq, m.payload)
	}
}

// receiveICMP reads an ICMP socket until it is empty.
func receiveICMP(s *icmpSender, poll *poller, events uint32, rx *recvBatch,
	reply func(netip.Addr, []byte, ancillary), failed func(sentError),
) {
	if !s.fd.use() {
		return
	}
	defer s.fd.done()
	hadError := events&unix.EPOLLERR != 0
	if hadError {
		s.fd.drainErrors(failed)
	}
	for range readyBatches {
		n, err := rx.recv(s.fd.fd)
		if err == unix.EAGAIN {
			return
		}
		for i := range n {
			reply(rx.from(i).Addr(), rx.payload(i), parseAncillary(rx.oob(i)))
		}
		if err == nil && n < recvBatchLen && !hadError {
			return
		}
	}
	poll.again(s.fd.fd)
}
