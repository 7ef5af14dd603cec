//go:build !linux

package forward

import (
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

var _ inboundSockets = (*hostUDPSockets)(nil)

// publishedUDP is a published port's socket. Package net does not tell which address
// was asked, so an answer leaves from the one that the host's routes choose.
type publishedUDP struct {
	conn   *net.UDPConn
	port   *udpPort
	closed atomic.Bool
}

// listen implements inboundSockets.
func (u *hostUDPSockets) listen(c *net.UDPConn, p *udpPort) (publishedSocket, error) {
	s := &publishedUDP{conn: c, port: p}
	u.readers.Go(s.receive)
	return s, nil
}

func (s *publishedUDP) receive() {
	buf := udpBuffers.Get().(*[64 << 10]byte)
	defer udpBuffers.Put(buf)
	for {
		n, from, err := s.conn.ReadFromUDPAddrPort(buf[:])
		if s.closed.Load() || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			count(s.port.in.Count.Errors)
			continue // about something sent: Windows reports a refusal here
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		s.port.fromClient(clientKey{client: from}, flow.Datagram{Payload: buf[:n], Hops: defaultHops - 1})
	}
}

// sendFrom implements publishedSocket.
func (s *publishedUDP) sendFrom(d flow.Datagram, _ netip.Addr, to netip.AddrPort) error {
	return (&hostUDP{conn: s.conn}).send(d, to)
}

// close implements publishedSocket.
func (s *publishedUDP) close() {
	s.closed.Store(true)
	s.conn.SetReadDeadline(time.Unix(1, 0))
}

// errNoNamespace says that the guest is not on this kernel.
var errNoNamespace = errors.New("the guest has no sockets here")

// adopt implements inboundSockets.
func (u *hostUDPSockets) adopt(int, bool, *udpClient) (udpSocket, error) {
	return nil, errNoNamespace
}

// tell implements inboundSockets.
func (u *hostUDPSockets) tell(clientError) bool { return false }

// closeICMP implements inboundSockets.
func (u *hostUDPSockets) closeICMP() {}
