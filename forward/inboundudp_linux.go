package forward

import (
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

var _ inboundSockets = (*hostUDPSockets)(nil)

// publishedUDP is a published port's socket: a descriptor of our own of the one that package
// net had.
type publishedUDP struct {
	udpSender
	port    *udpPort
	poll    *poller
	overrun uint32 // what ancillary said last
}

// listen implements inboundSockets.
func (u *hostUDPSockets) listen(c *net.UDPConn, p *udpPort) (publishedSocket, error) {
	v6 := p.local.Addr().Is6()
	fd, err := duplicate(c)
	if err != nil {
		return nil, err
	}
	c.Close() // or Go's poller wakes up for each datagram, too
	if err := reportLocal(fd, v6); err != nil {
		unix.Close(fd)
		return nil, err
	}
	receiveTrains(fd)
	makeRoom(fd)
	s := &publishedUDP{port: p, poll: &u.poll, udpSender: udpSender{header: headerOptions{v6: v6}}}
	s.fd.open(fd)
	if err := u.poll.addAnywhere(fd, s); err != nil {
		s.fd.close()
		return nil, err
	}
	return s, nil
}

// publishedBuffer is the receive buffer of a published port in bytes: all its clients
// share it. The kernel's default holds about 90 full datagrams.
const publishedBuffer = 1 << 20

// makeRoom gives fd that buffer, or as much of it as we may have.
func makeRoom(fd int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, publishedBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, publishedBuffer)
	}
}

// duplicate returns a descriptor of c's socket.
func duplicate(c *net.UDPConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	if cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return -1, cerr
	}
	if err != nil {
		return -1, fmt.Errorf("duplicate socket: %w", err)
	}
	return fd, nil
}

// reportLocal has fd report where what it receives was sent to, and its TTL and TOS.
// Not its errors: they are of clients that have gone.
func reportLocal(fd int, v6 bool) error {
	opts := [...][2]int{{unix.SOL_IP, unix.IP_PKTINFO}, {unix.SOL_IP, unix.IP_RECVTTL}, {unix.SOL_IP, unix.IP_RECVTOS}}
	if v6 {
		opts = [...][2]int{{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO}, {unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT}, {unix.SOL_IPV6, unix.IPV6_RECVTCLASS}}
	}
	for _, o := range opts {
		if err := unix.SetsockoptInt(fd, o[0], o[1], 1); err != nil {
			return fmt.Errorf("set socket option %d of level %d: %w", o[1], o[0], err)
		}
	}
	return nil
}

// ready implements pollable.
func (s *publishedUDP) ready(_ uint32, rx *recvBatch) {
	if !s.fd.use() {
		return
	}
	defer s.fd.done()
	for range readyBatches {
		n, err := rx.recv(s.fd.fd)
		if err == unix.EAGAIN {
			return
		}
		if err != nil {
			count(s.port.in.Count.Errors)
		}
		s.relay(rx, n)
		if err == nil && n < recvBatchLen {
			return
		}
	}
	s.poll.again(s.fd.fd)
}

// relay passes n received messages on.
func (s *publishedUDP) relay(rx *recvBatch, n int) {
	rx.trains(n, func(from netip.AddrPort, b []byte, a ancillary) {
		if a.overrun > s.overrun {
			s.port.lost(a.overrun - s.overrun)
			s.overrun = a.overrun
		}
		if from.Port() == 0 {
			return // there is no answering it
		}
		// A socket of both families has those of IPv4 as v4-in-v6.
		s.port.fromClient(clientKey{netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), a.local.Unmap()}, flow.Datagram{
			Payload: b, Segment: a.segment, TOS: a.tos,
			Hops: max(a.hops, 2) - 1, // it has arrived: no use in ending it here
		})
	})
}

func (s *publishedUDP) close() {
	s.poll.unwatch(s.fd.fd)
	s.poll.remove(s.fd.fd, s)
	s.fd.close()
}

// adopt implements inboundSockets.
func (u *hostUDPSockets) adopt(fd int, v6 bool, c *udpClient) (udpSocket, error) {
	if fd > maxFD() { // the rest of us needs those that are left
		unix.Close(fd)
		return nil, unix.EMFILE
	}
	if err := reportAll(fd, v6); err != nil {
		unix.Close(fd)
		return nil, err
	}
	receiveTrains(fd)
	return u.watch(fd, v6, c)
}
