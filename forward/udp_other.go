//go:build !linux

package forward

import (
	"errors"
	"net"
	"net/netip"
	"sync"

	"github.com/slipway-net/slipway/internal/flow"
)

// hostUDPSockets opens the host's UDP sockets with package net, which knows neither
// the TTL of a datagram nor an error queue: a guest's traceroute shows no routers
// here, and a refusal is silence.
type hostUDPSockets struct{ readers sync.WaitGroup }

func newUDPSockets() udpSockets { return new(hostUDPSockets) }

// open implements udpSockets.
func (u *hostUDPSockets) open(v6 bool, m *udpMapping) (udpSocket, error) {
	network := "udp4"
	if v6 {
		network = "udp6"
	}
	conn, err := net.ListenUDP(network, nil)
	if err != nil {
		return nil, err
	}
	u.readers.Go(func() { receive(conn, m) })
	return &hostUDP{conn: conn}, nil
}

// close implements udpSockets; every socket has been closed before.
func (u *hostUDPSockets) close() { u.readers.Wait() }

// udpBuffers are for the longest datagram each. Package net cannot wait without one.
var udpBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// receive passes on what arrives until conn is closed.
func receive(conn *net.UDPConn, m *udpMapping) {
	buf := udpBuffers.Get().(*[64 << 10]byte)
	defer udpBuffers.Put(buf)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf[:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // about something sent: Windows reports a refusal here
		}
		from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
		m.fromHost(from, buf[:n], 0, defaultHops, 0)
	}
}

// socketShare is how many sockets the mappings may hold.
func socketShare() int { return udpMaxMappings }

// defaultHops is the TTL of a packet whose sender does not say otherwise.
const defaultHops = 64

// hostUDP is a mapping's host socket.
type hostUDP struct{ conn *net.UDPConn }

// send implements udpSocket.
func (s *hostUDP) send(d flow.Datagram, to netip.AddrPort) error {
	if d.Segment <= 0 || len(d.Payload) <= d.Segment {
		_, err := s.conn.WriteToUDPAddrPort(d.Payload, to)
		return err
	}
	for rest := d.Payload; len(rest) > 0; {
		n := min(d.Segment, len(rest))
		if _, err := s.conn.WriteToUDPAddrPort(rest[:n], to); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

func (s *hostUDP) close() { s.conn.Close() }
