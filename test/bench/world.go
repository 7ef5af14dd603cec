//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The server listens on worldPorts TCP ports, so that a client has that many
// times the ephemeral ports, and on the first of them for UDP too. IPv6, of which
// there is TCP only, has sockets of its own, lest IPv4 pay for the mapping.
const (
	worldPortBase = 20000
	worldPorts    = 64
)

// worldReport is what the server says when it is asked: one line of JSON.
type worldReport struct {
	Peers    []string // addresses of the clients seen, sorted by time
	Accepted uint64   // TCP connections
	Bytes    uint64   // payload read, TCP and UDP
}

// worldServer echoes TCP bytes and UDP datagrams, and closes when its client does.
// One thread does everything, by epoll.
type worldServer struct {
	poll      *poller
	listeners map[int32]bool // by file descriptor
	udp       int32
	buf       []byte

	mu     sync.Mutex // guards the fields below
	report worldReport
	last   netip.Addr // the peer counted last: most are the same
}

// worldMain is the server process: it prints "ready", then a report for each
// line on stdin, and ends at end of file.
func worldMain() error {
	s, err := newWorldServer(true)
	if err != nil {
		return err
	}
	rawReady := make(chan struct{})
	go func() {
		rawMode()
		close(rawReady)
		s.run()
	}()
	<-rawReady
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		s.mu.Lock()
		line, _ := json.Marshal(s.report)
		s.mu.Unlock()
		fmt.Printf("%s\n", line)
	}
	return in.Err()
}

// newWorldServer opens all sockets.
func newWorldServer(udp bool) (*worldServer, error) {
	if err := raiseFiles(); err != nil {
		return nil, err
	}
	poll, err := newPoller()
	if err != nil {
		return nil, err
	}
	s := &worldServer{poll: poll, listeners: make(map[int32]bool), buf: make([]byte, 64<<10)}
	for port := worldPortBase; port < worldPortBase+worldPorts; port++ {
		for _, any := range []unix.Sockaddr{&unix.SockaddrInet4{Port: port}, &unix.SockaddrInet6{Port: port}} {
			fd, err := listenTCP(any)
			if err != nil {
				return nil, fmt.Errorf("tcp port %d: %w", port, err)
			}
			s.listeners[int32(fd)] = true
			if err := poll.add(fd, unix.EPOLLIN, int32(fd)); err != nil {
				return nil, err
			}
		}
	}
	if !udp {
		s.udp = -1
		return s, nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	// Not the wildcard: answers would come from the address of the route back.
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: worldPortBase, Addr: worldAddr.As4()}); err != nil {
		return nil, fmt.Errorf("bind udp port %d: %w", worldPortBase, err)
	}
	s.udp = int32(fd)
	return s, poll.add(fd, unix.EPOLLIN, s.udp)
}

// listenTCP opens one non-blocking listener on all addresses.
func listenTCP(any unix.Sockaddr) (int, error) {
	family := unix.AF_INET
	if _, ok := any.(*unix.SockaddrInet6); ok {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // inherited by what is accepted
	if family == unix.AF_INET6 {
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err := unix.Bind(fd, any); err != nil {
		return -1, fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return -1, fmt.Errorf("listen: %w", err)
	}
	return fd, nil
}

// run serves for ever.
func (s *worldServer) run() {
	for {
		for _, ev := range s.poll.wait(-1) {
			switch {
			case s.listeners[ev.Fd]:
				s.accept(int(ev.Fd))
			case ev.Fd == s.udp:
				s.echoUDP()
			default:
				s.echoTCP(int(ev.Fd))
			}
		}
	}
}

// accept takes one connection; epoll calls again while there are more.
func (s *worldServer) accept(listener int) {
	var sa unix.RawSockaddrInet6 // room for either family
	size := uint32(unix.SizeofSockaddrInet6)
	fd, _, e := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if e != 0 {
		return
	}
	if err := s.poll.add(int(fd), unix.EPOLLIN, int32(fd)); err != nil {
		rawClose(int(fd))
		return
	}
	s.count(peerOf(&sa), 0, 1)
}

// peerOf returns the address in sa, which may be a sockaddr_in.
func peerOf(sa *unix.RawSockaddrInet6) netip.Addr {
	if sa.Family == unix.AF_INET {
		return netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr)
	}
	return netip.AddrFrom16(sa.Addr)
}

// count notes n bytes and conns connections of a peer.
func (s *worldServer) count(peer netip.Addr, n int, conns uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Accepted += conns
	s.report.Bytes += uint64(n)
	if peer == s.last {
		return
	}
	s.last = peer
	name := peer.String()
	for _, p := range s.report.Peers {
		if p == name {
			return
		}
	}
	s.report.Peers = append(s.report.Peers, name)
}

// echoTCP sends back what came and closes after end of file or an error.
func (s *worldServer) echoTCP(fd int) {
	n, err := rawRecv(fd, s.buf, 0)
	switch {
	case err == unix.EAGAIN:
	case n <= 0:
		rawClose(fd)
	default:
		rawSend(fd, s.buf[:n])
		s.count(s.last, n, 0)
	}
}

// echoUDP sends back what is there, a batch at most, so that TCP has its turn.
func (s *worldServer) echoUDP() {
	var sa unix.RawSockaddrInet4
	for range 32 {
		size := uint32(unix.SizeofSockaddrInet4)
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(s.udp), uintptr(unsafe.Pointer(&s.buf[0])), uintptr(len(s.buf)), 0, uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)))
		if e != 0 {
			return
		}
		s.count(netip.AddrFrom4(sa.Addr), int(n), 0)
		unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.udp), uintptr(unsafe.Pointer(&s.buf[0])), n, unix.MSG_NOSIGNAL, uintptr(unsafe.Pointer(&sa)), uintptr(size))
	}
}

// raiseFiles lifts the limit of open files to the hard limit: a Go process would
// do so by itself, but not before its first use of package os.
func raiseFiles() error {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return fmt.Errorf("getrlimit nofile: %w", err)
	}
	lim.Cur = lim.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return fmt.Errorf("setrlimit nofile %d: %w", lim.Max, err)
	}
	return nil
}
