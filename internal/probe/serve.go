package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Theory of operation.
//
// The services listen on ports that the kernel chooses: on one address of each family
// that the host has besides loopback, where a guest reaches them like any address of
// the LAN, and on the loopback addresses, where it reaches them by host access. Only
// the host itself is answered, for nobody else is meant, and an echo service open to
// all can be made to answer forged packets, those of another echo service for ever: what
// comes from an address that is none of the host's own is dropped.

const (
	maxEchoes   = 64               // TCP connections at one time on one listener
	echoTimeout = 10 * time.Second // for a whole TCP connection
	maxDatagram = 65535            // bytes
	// maxReadErrors in a row end a UDP service. Windows shows ICMP errors about
	// answers as errors of the next read.
	maxReadErrors = 1000
	portTries     = 20 // to find a port that is free in both families and protocols
)

// Services are running echo services.
type Services struct {
	log     *slog.Logger
	targets Targets
	own     []netip.Addr // whose packets are answered

	cancel  context.CancelFunc
	running sync.WaitGroup
}

// Serve starts the services that Targets names. They end with ctx or with Close,
// which has to be called in both cases. log may be nil. A host without an address
// besides loopback, or without IPv6, is no error: Targets.Missing says what is not there.
func Serve(ctx context.Context, log *slog.Logger) (*Services, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	own := ownAddrs()
	s := &Services{log: log.With(slog.String("component", "probe")), own: own}
	ctx, s.cancel = context.WithCancel(ctx)
	if err := s.hostServices(ctx); err != nil {
		s.Close()
		return nil, err
	}
	s.directServices(ctx, candidates(ctx, own))
	return s, nil
}

// Targets are what Run inside an engine needs to find the services. HostTCP and
// HostUDP have to be open to the guest.
func (s *Services) Targets() Targets { return s.targets }

// Close ends the services and waits for them.
func (s *Services) Close() {
	s.cancel()
	s.running.Wait()
}

// hostServices listens on the loopback addresses, the same port in both families.
func (s *Services) hostServices(ctx context.Context) error {
	v4, v6 := netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	if !slices.Contains(s.own, v6) {
		v6 = netip.Addr{}
	}
	var err error
	if s.targets.HostTCP, err = samePort(v4, v6, s.listenTCP(ctx)); err != nil {
		return fmt.Errorf("serve tcp echo on %v: %w", v4, err)
	}
	if s.targets.HostUDP, err = samePort(v4, v6, s.listenUDP(ctx)); err != nil {
		return fmt.Errorf("serve udp echo on %v: %w", v4, err)
	}
	return nil
}

// service opens a socket and serves it once run is called. port may be zero.
type service func(a netip.Addr, port uint16) (socket, error)

type socket struct {
	io.Closer
	addr netip.AddrPort
	run  func()
}

// samePort starts a service on one port of both addresses; v6 may be zero.
func samePort(v4, v6 netip.Addr, open service) (uint16, error) {
	var err error
	for range portTries {
		var first, second socket
		if first, err = open(v4, 0); err != nil {
			return 0, err
		}
		if v6.IsValid() {
			if second, err = open(v6, first.addr.Port()); err != nil {
				first.Close()
				continue // somebody else's; the kernel will name another
			}
			second.run()
		}
		first.run()
		return first.addr.Port(), nil
	}
	return 0, err
}

// directServices listens on the first address of each family that takes a service.
func (s *Services) directServices(ctx context.Context, from []netip.Addr) {
	t := &s.targets
	for _, f := range []struct {
		name, number string
		tcp, udp     *netip.AddrPort
		ping         *netip.Addr
	}{{ipv4, "4", &t.TCP4, &t.UDP4, &t.Ping4}, {ipv6, "6", &t.TCP6, &t.UDP6, &t.Ping6}} {
		why := "the host has no " + f.name + " address but loopback and link-local ones"
		for _, a := range from {
			if !isFamily(a, f.name) {
				continue
			}
			err := s.direct(ctx, a, f.tcp, f.udp)
			if err == nil {
				s.pingable(ctx, a, f.ping, "ping"+f.number)
				why = ""
				break
			}
			why = fmt.Sprintf("no service could be started on %v: %v", a, err)
		}
		if why != "" {
			for _, kind := range []string{"tcp", "udp", "ping"} {
				t.lack(kind+f.number, why)
			}
		}
	}
}

// direct serves TCP and UDP on a, or nothing.
func (s *Services) direct(ctx context.Context, a netip.Addr, tcp, udp *netip.AddrPort) error {
	stream, err := s.listenTCP(ctx)(a, 0)
	if err != nil {
		return err
	}
	datagrams, err := s.listenUDP(ctx)(a, 0)
	if err != nil {
		stream.Close()
		return err
	}
	stream.run()
	datagrams.run()
	*tcp, *udp = stream.addr, datagrams.addr
	return nil
}

// pingable makes a the target of pings if this process, which will send those of the
// guest, may ping at all.
func (s *Services) pingable(ctx context.Context, a netip.Addr, target *netip.Addr, kind string) {
	ctx, cancel := context.WithTimeout(ctx, repeatAt)
	defer cancel()
	if _, err := ping(ctx, a); err != nil {
		s.targets.lack(kind, "the host cannot ping itself ("+why(err)+"): see slipway doctor")
		return
	}
	*target = a
}

// candidates are the addresses for services: those that default routes start from,
// then the other global ones in the order of the interfaces.
func candidates(ctx context.Context, own []netip.Addr) []netip.Addr {
	var list []netip.Addr
	for _, out := range internet {
		if a, err := sourceTowards(ctx, out); err == nil {
			list = append(list, a)
		}
	}
	list = append(list, own...)
	seen := make(map[netip.Addr]bool)
	return slices.DeleteFunc(list, func(a netip.Addr) bool {
		unfit := seen[a] || !a.IsGlobalUnicast()
		seen[a] = true
		return unfit
	})
}

// answers tells whether a packet from there comes from the host itself.
func (s *Services) answers(from netip.AddrPort) bool {
	a := from.Addr().WithZone("").Unmap()
	return a.IsLoopback() || slices.Contains(s.own, a)
}

// listenTCP returns a TCP echo service.
func (s *Services) listenTCP(ctx context.Context) service {
	return func(a netip.Addr, port uint16) (socket, error) {
		ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, port)))
		if err != nil {
			return socket{}, bare(err)
		}
		return socket{ln, ln.Addr().(*net.TCPAddr).AddrPort(), func() {
			s.running.Go(func() { s.serveTCP(ctx, ln) })
		}}, nil
	}
}

// serveTCP accepts until ctx ends and waits for its connections.
func (s *Services) serveTCP(ctx context.Context, ln *net.TCPListener) {
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	var conns sync.WaitGroup
	defer conns.Wait()
	free := make(chan struct{}, maxEchoes)
	for {
		conn, err := ln.AcceptTCP()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil {
			s.log.Warn("echo service has ended", slog.Any("addr", ln.Addr()), slog.Any("error", err))
			return
		}
		if from := conn.RemoteAddr().(*net.TCPAddr).AddrPort(); !s.answers(from) {
			s.log.Debug("echo refused", slog.Any("from", from))
			conn.Close()
			continue
		}
		select {
		case free <- struct{}{}:
			conns.Go(func() { echo(ctx, conn); <-free })
		default:
			conn.Close()
		}
	}
}

// echo sends back what comes in, and the end of file.
func echo(ctx context.Context, conn *net.TCPConn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(echoTimeout))
	defer interrupt(ctx, conn)()
	if _, err := io.Copy(conn, conn); err == nil {
		conn.CloseWrite()
	}
}

// listenUDP returns a UDP echo service.
func (s *Services) listenUDP(ctx context.Context) service {
	return func(a netip.Addr, port uint16) (socket, error) {
		conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, port)))
		if err != nil {
			return socket{}, bare(err)
		}
		return socket{conn, conn.LocalAddr().(*net.UDPAddr).AddrPort(), func() {
			s.running.Go(func() { s.serveUDP(ctx, conn) })
		}}, nil
	}
}

// serveUDP sends datagrams back until ctx ends.
func (s *Services) serveUDP(ctx context.Context, conn *net.UDPConn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	buf := make([]byte, maxDatagram)
	for failed := 0; failed < maxReadErrors; {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			failed++
			continue
		}
		failed = 0
		if s.answers(from) {
			conn.WriteToUDPAddrPort(buf[:n], from) // lost like any datagram if it fails
		}
	}
	s.log.Warn("echo service has ended", slog.Any("addr", conn.LocalAddr()))
}

// bare is the reason inside a net.OpError, whose address the caller names.
func bare(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
