package dockerproxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Theory of operation.
//
// A client is its address and the address of ours that it asked. Each has a mapping: a
// socket connected to the container, whose datagrams go to the client from the address
// that was asked (IP_PKTINFO, IPV6_PKTINFO); by itself the kernel would choose the
// address of the device that the answer leaves by, and the client would not know it.
//
// A mapping ends 90 s after its last datagram either way. At 4096 the one that has been
// idle longest makes room. A container that says "port unreachable" has its mapping kept:
// it may be starting.
//
// Buffers are held while there is something to read, not while waiting.

// Limits of a udpServer; udpIdle is that of dockerd's own proxy.
const (
	udpIdle    = 90 * time.Second
	udpClients = 4096
	udpBuffer  = 65535
)

var udpBuffers = sync.Pool{New: func() any { return new([udpBuffer]byte) }}

// udpKey is a client.
type udpKey struct {
	client netip.AddrPort
	asked  netip.Addr
}

// udpServer has a mapping to the container for each client of a socket.
type udpServer struct {
	sock      *net.UDPConn
	container netip.AddrPort
	log       *slog.Logger
	idle      time.Duration

	mu       sync.Mutex // guards the fields below
	mappings map[udpKey]*udpMapping
}

// udpMapping is one client's way to the container.
type udpMapping struct {
	key  udpKey
	conn *net.UDPConn
	oob  []byte       // a control message: the address to answer from
	seen atomic.Int64 // of the last datagram either way, Unix ns
}

// newUDPServer has the kernel say with each datagram which address was asked.
func newUDPServer(sock *net.UDPConn, container netip.AddrPort, log *slog.Logger) (*udpServer, error) {
	s := &udpServer{sock: sock, container: container, log: log, idle: udpIdle, mappings: map[udpKey]*udpMapping{}}
	level, option := unix.SOL_IP, unix.IP_PKTINFO
	if sock.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Is6() {
		level, option = unix.SOL_IPV6, unix.IPV6_RECVPKTINFO
	}
	raw, err := sock.SyscallConn()
	if err != nil {
		return nil, err
	}
	if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, 1) }); e != nil {
		return nil, e
	}
	return s, os.NewSyscallError("setsockopt PKTINFO", err)
}

// serve returns when ctx has ended and so have all mappings.
func (s *udpServer) serve(ctx context.Context) {
	var answers sync.WaitGroup
	defer answers.Wait()
	defer s.closeAll()
	defer s.sock.Close()
	defer context.AfterFunc(ctx, func() { s.sock.Close() })()
	b, oob := make([]byte, udpBuffer), make([]byte, 128)
	for {
		n, oobn, _, client, err := s.sock.ReadMsgUDPAddrPort(b, oob)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			s.datagram(b[:n], client, askedAddr(oob[:oobn]), &answers)
		case !errors.Is(err, unix.ECONNREFUSED): // that is a client's, for an answer
			s.log.Warn("cannot read", slog.Any("err", err))
			if !sleep(ctx, acceptFirst) {
				return
			}
		}
	}
}

// datagram takes one from a client to the container. What cannot be sent is lost, as on
// any network.
func (s *udpServer) datagram(b []byte, client netip.AddrPort, asked netip.Addr, answers *sync.WaitGroup) {
	m, err := s.mapping(udpKey{client, asked}, answers)
	if err != nil {
		return
	}
	m.seen.Store(time.Now().UnixNano())
	if _, err := m.conn.Write(b); errors.Is(err, unix.ECONNREFUSED) {
		m.conn.Write(b) // that was the error of an earlier datagram, told now
	}
}

// mapping returns the client's, or a new one whose answers a goroutine takes.
func (s *udpServer) mapping(k udpKey, answers *sync.WaitGroup) (*udpMapping, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.mappings[k]; m != nil {
		return m, nil
	}
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(s.container))
	if err != nil {
		return nil, err
	}
	if len(s.mappings) >= udpClients {
		s.dropOldestLocked()
	}
	m := &udpMapping{key: k, conn: conn, oob: sourceMessage(k.asked)}
	m.seen.Store(time.Now().UnixNano())
	s.mappings[k] = m
	answers.Go(func() { s.answers(m) })
	return m, nil
}

// dropOldestLocked ends the mapping that was idle longest. The caller holds mu.
func (s *udpServer) dropOldestLocked() {
	var oldest *udpMapping
	for _, m := range s.mappings {
		if oldest == nil || m.seen.Load() < oldest.seen.Load() {
			oldest = m
		}
	}
	delete(s.mappings, oldest.key)
	oldest.conn.Close()
}

// answers takes the container's datagrams to the client until the mapping ends.
func (s *udpServer) answers(m *udpMapping) {
	defer m.conn.Close()
	defer s.forget(m)
	raw, err := m.conn.SyscallConn()
	if err != nil {
		return
	}
	for {
		left := s.idle - time.Since(time.Unix(0, m.seen.Load()))
		if left <= 0 {
			return
		}
		m.conn.SetReadDeadline(time.Now().Add(left))
		if err := raw.Read(func(fd uintptr) bool { return s.answer(m, int(fd)) }); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return // closed
		}
	}
}

// answer reports false when there is nothing to read.
func (s *udpServer) answer(m *udpMapping, fd int) bool {
	b := udpBuffers.Get().(*[udpBuffer]byte)
	defer udpBuffers.Put(b)
	n, err := unix.Read(fd, b[:])
	if err == nil {
		m.seen.Store(time.Now().UnixNano())
		s.sock.WriteMsgUDPAddrPort(b[:n], m.oob, m.key.client)
	}
	return err != unix.EAGAIN
}

func (s *udpServer) forget(m *udpMapping) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mappings[m.key] == m {
		delete(s.mappings, m.key)
	}
}

func (s *udpServer) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.mappings {
		m.conn.Close()
	}
}

// askedAddr reads which address of ours a datagram was for; the zero Addr where the
// kernel does not say. A link-local one has its device as zone.
func askedAddr(oob []byte) netip.Addr {
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.Addr{}
	}
	for _, m := range list {
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(m.Data[4:8])) // ipi_spec_dst: an own address also for a broadcast
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return netip.AddrFrom16([16]byte(m.Data[:16]))
		}
	}
	return netip.Addr{}
}

// sourceMessage is the control message that has a datagram leave from a; nil for the
// zero Addr: then the kernel chooses.
func sourceMessage(a netip.Addr) []byte {
	switch {
	case !a.IsValid():
		return nil
	case a.Is4():
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: a.As4()})
	}
	return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: a.As16()})
}
