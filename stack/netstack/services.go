package netstack

import (
	"fmt"
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Theory of operation.
//
// The gateway's own services (DNS, later the HTTP proxy) are ordinary listeners in
// gVisor's stack, one for each of the gateway's two addresses; the packets reach them
// because their destination is an address of the stack's own.

const (
	// backlog is how many connections to a service may wait to be accepted.
	backlog = 256

	// serviceBuffer is the receive buffer of a UDP service in bytes: a burst of a
	// thousand queries, as a container's start may cause, with gVisor's overhead.
	serviceBuffer = 1 << 20
)

// Listen opens a TCP port of the gateway, on both its addresses. The caller closes
// the listeners; connections end with the Stack at the latest.
func (s *Stack) Listen(port uint16) ([]net.Listener, error) {
	var lns []net.Listener
	for _, gw := range s.gateways() {
		ln, err := s.listen(gw, port)
		if err != nil {
			for _, l := range lns {
				l.Close()
			}
			return nil, err
		}
		lns = append(lns, ln)
	}
	return lns, nil
}

func (s *Stack) listen(gw netip.Addr, port uint16) (net.Listener, error) {
	wq := new(waiter.Queue)
	ep, terr := s.ip.NewEndpoint(tcp.ProtocolNumber, protocolOf(gw), wq)
	if terr != nil {
		return nil, fmt.Errorf("open tcp port %d on %v: %s", port, gw, terr)
	}
	if terr = ep.Bind(addressOf(gw, port)); terr == nil {
		terr = ep.Listen(backlog)
	}
	if terr != nil {
		ep.Close()
		return nil, fmt.Errorf("listen on tcp port %d of %v: %s", port, gw, terr)
	}
	return gonet.NewTCPListener(s.ip, wq, ep), nil
}

// ListenPacket opens a UDP port of the gateway, on both its addresses. The caller
// closes the sockets.
func (s *Stack) ListenPacket(port uint16) ([]net.PacketConn, error) {
	var pcs []net.PacketConn
	for _, gw := range s.gateways() {
		pc, err := s.listenPacket(gw, port)
		if err != nil {
			for _, p := range pcs {
				p.Close()
			}
			return nil, err
		}
		pcs = append(pcs, pc)
	}
	return pcs, nil
}

func (s *Stack) listenPacket(gw netip.Addr, port uint16) (net.PacketConn, error) {
	wq := new(waiter.Queue)
	ep, terr := s.ip.NewEndpoint(udp.ProtocolNumber, protocolOf(gw), wq)
	if terr != nil {
		return nil, fmt.Errorf("open udp port %d on %v: %s", port, gw, terr)
	}
	ep.SocketOptions().SetReceiveBufferSize(serviceBuffer, true)
	if terr := ep.Bind(addressOf(gw, port)); terr != nil {
		ep.Close()
		return nil, fmt.Errorf("listen on udp port %d of %v: %s", port, gw, terr)
	}
	return gonet.NewUDPConn(wq, ep), nil
}

func (s *Stack) gateways() []netip.Addr { return []netip.Addr{s.cfg.Gateway4, s.cfg.Gateway6} }

func addressOf(a netip.Addr, port uint16) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: toTCPIP(a), Port: port}
}
