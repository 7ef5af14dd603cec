package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// hostUDPSockets opens the host's UDP sockets.
type hostUDPSockets struct {
	poll         poller
	icmp4, icmp6 icmpToClients
}

func newUDPSockets() udpSockets { return new(hostUDPSockets) }

// open implements udpSockets.
func (u *hostUDPSockets) open(v6 bool, m *udpMapping) (udpSocket, error) {
	fd, err := unix.Socket(domainOf(v6), unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make udp socket: %w", err)
	}
	if err := reportAll(fd, v6); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if v6 { // its port must not take the IPv4 one as well
		unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
	}
	receiveTrains(fd)
	return u.watch(fd, v6, m)
}

// watch makes fd the socket of owner. It takes fd.
func (u *hostUDPSockets) watch(fd int, v6 bool, owner udpOwner) (udpSocket, error) {
	s := &hostUDP{owner: owner, poll: &u.poll, udpSender: udpSender{header: headerOptions{v6: v6}}}
	s.fd.open(fd)
	if err := u.poll.addAnywhere(fd, s); err != nil {
		s.fd.close()
		return nil, err
	}
	return s, nil
}

// receiveTrains has fd receive several datagrams at once and tell what it lost, where
// the kernel can.
func receiveTrains(fd int) {
	unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1) // Linux 5.0; without it datagrams come one by one
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
}

func (u *hostUDPSockets) close() { u.poll.close() }

func domainOf(v6 bool) int {
	if v6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// reportAll has fd report ICMP errors, and the TTL and TOS of what it receives.
func reportAll(fd int, v6 bool) error {
	opts := [...][2]int{{unix.SOL_IP, unix.IP_RECVERR}, {unix.SOL_IP, unix.IP_RECVTTL}, {unix.SOL_IP, unix.IP_RECVTOS}}
	if v6 {
		opts = [...][2]int{{unix.SOL_IPV6, unix.IPV6_RECVERR}, {unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT}, {unix.SOL_IPV6, unix.IPV6_RECVTCLASS}}
	}
	for _, o := range opts {
		if err := unix.SetsockoptInt(fd, o[0], o[1], 1); err != nil {
			return fmt.Errorf("set socket option %d of level %d: %w", o[1], o[0], err)
		}
	}
	return nil
}

// sharedFD is a file descriptor that several goroutines use and one closes: it is
// closed when the last has let go of it, so that its number is never another file's.
type sharedFD struct {
	fd     int
	users  atomic.Int32 // and one for not being closed
	closed atomic.Bool

	// errMu is held while an error is read off the queue, which puts the next one on the
	// socket, and while what has met one is sent again.
	errMu sync.Mutex
}

func (s *sharedFD) open(fd int) {
	s.fd = fd
	s.users.Store(1)
}

// use returns false when the descriptor is closed; else done must follow.
func (s *sharedFD) use() bool {
	for {
		n := s.users.Load()
		if n == 0 {
			return false
		}
		if s.users.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (s *sharedFD) done() {
	if s.users.Add(-1) == 0 {
		unix.Close(s.fd)
	}
}

func (s *sharedFD) close() {
	if !s.closed.Swap(true) {
		s.done()
	}
}

// headerOptions are the socket options that make the IP header of what is sent. They
// cost a system call each and are set on change only.
type headerOptions struct {
	v6   bool
	hops uint8
	tos  uint8
	df   int8 // 0 unknown, 1 set, -1 not set
}

// set has fd send with these values. What a kernel refuses is not worth a datagram.
func (o *headerOptions) set(fd int, hops, tos uint8, df bool) {
	if hops == 0 {
		hops = defaultHops
	}
	if hops != o.hops {
		o.hops = hops
		o.option(fd, unix.IP_TTL, unix.IPV6_UNICAST_HOPS, int(hops))
	}
	if tos != o.tos {
		o.tos = tos
		o.option(fd, unix.IP_TOS, unix.IPV6_TCLASS, int(tos))
	}
	want, value := int8(-1), unix.IP_PMTUDISC_DONT // the same numbers as IPV6_PMTUDISC
	if df {
		want, value = 1, unix.IP_PMTUDISC_DO
	}
	if want != o.df {
		o.df = want
		o.option(fd, unix.IP_MTU_DISCOVER, unix.IPV6_MTU_DISCOVER, value)
	}
}

func (o *headerOptions) option(fd, opt4, opt6, value int) {
	if o.v6 {
		unix.SetsockoptInt(fd, unix.SOL_IPV6, opt6, value)
		return
	}
	unix.SetsockoptInt(fd, unix.SOL_IP, opt4, value)
}

// udpSender sends from a UDP socket.
type udpSender struct {
	fd     sharedFD
	header headerOptions
	to4    unix.SockaddrInet4
	to6    unix.SockaddrInet6
	oob    [96]byte // control messages: where from, and UDP_SEGMENT
	noGSO  bool     // the route's device cannot, or the kernel is too old
}

// hostUDP is a mapping's host socket.
type hostUDP struct {
	udpSender
	owner   udpOwner
	poll    *poller
	overrun uint32 // of the receiver: what ancillary said last
}

// socketShare is how many sockets the mappings may hold: half of the files that the
// process may open. The rest is for TCP.
func socketShare() int {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil || l.Cur > 2*udpMaxMappings {
		return udpMaxMappings
	}
	return int(l.Cur / 2)
}

// send implements udpSocket.
func (s *hostUDP) send(d flow.Datagram, to netip.AddrPort) error {
	return s.sendFrom(d, netip.Addr{}, to)
}

// sendFrom is udpSocket.send from one of the socket's addresses; the zero Addr leaves it
// to the kernel.
func (s *udpSender) sendFrom(d flow.Datagram, from netip.Addr, to netip.AddrPort) error {
	if !s.fd.use() {
		return errMappingClosed
	}
	defer s.fd.done()
	s.header.set(s.fd.fd, d.Hops, d.TOS, d.DontFragment)
	sa, oob := s.sockaddr(to), s.fromOOB(from)
	if d.Segment <= 0 || len(d.Payload) <= d.Segment {
		return s.sendOne(d.Payload, oob, false, sa, to)
	}
	return s.sendTrain(&d, oob, sa, to)
}

// sockaddr makes the kernel's form of to without an allocation.
func (s *udpSender) sockaddr(to netip.AddrPort) unix.Sockaddr {
	if s.header.v6 {
		s.to6.Port, s.to6.Addr, s.to6.ZoneId = int(to.Port()), to.Addr().As16(), zoneOf(to.Addr())
		return &s.to6
	}
	s.to4.Port, s.to4.Addr = int(to.Port()), to.Addr().As4()
	return &s.to4
}

// fromOOB makes the control message that chooses the source address, nil for none.
func (s *udpSender) fromOOB(from netip.Addr) []byte {
	if !from.IsValid() {
		return nil
	}
	return putPktinfo(s.oob[:], from)
}

// gsoSegments is how many datagrams every kernel with UDP_SEGMENT takes at once.
const gsoSegments = 64

// sendTrain sends d's datagrams with as few calls as the kernel allows. It stops at
// the first that fails.
func (s *udpSender) sendTrain(d *flow.Datagram, oob []byte, sa unix.Sockaddr, to netip.AddrPort) error {
	for rest := d.Payload; len(rest) > 0; {
		n := min(len(rest), d.Segment*gsoSegments)
		if !s.noGSO && n > d.Segment {
			err := s.sendOne(rest[:n], s.segmentOOB(oob, d.Segment), true, sa, to)
			if err == nil || err == errSocketFull {
				rest = rest[n:]
				continue
			}
			// EINVAL: a datagram is longer than the MTU, or the kernel is old.
			// EIO: no checksum offload on the route's device.
			s.noGSO = errors.Is(err, unix.EIO) || errors.Is(err, unix.ENOPROTOOPT)
		}
		for part := rest[:n]; len(part) > 0; {
			k := min(len(part), d.Segment)
			if err := s.sendOne(part[:k], oob, false, sa, to); err != nil {
				return err
			}
			part = part[k:]
		}
		rest = rest[n:]
	}
	return nil
}

// segmentOOB adds the control message UDP_SEGMENT to oob, which is nil or the begin
// of s.oob.
func (s *udpSender) segmentOOB(oob []byte, size int) []byte {
	n := len(oob)
	all := s.oob[:n+unix.CmsgSpace(2)]
	putCmsgHeader(all[n:], unix.SOL_UDP, unix.UDP_SEGMENT, 2)
	binary.NativeEndian.PutUint16(all[n+unix.CmsgLen(0):], uint16(size))
	return all
}

// sendOne sends one message. An error that an earlier datagram left on the socket is
// not this one's: it is taken off, and the message sent again.
func (s *udpSender) sendOne(payload, oob []byte, train bool, sa unix.Sockaddr, to netip.AddrPort) error {
	err := sendMsg(s.fd.fd, payload, oob, sa)
	if err == nil {
		return nil
	}
	if isFull(err) {
		return errSocketFull
	}
	if err = s.fd.sendAgain(payload, oob, sa); err == nil {
		return nil
	}
	if isFull(err) {
		return errSocketFull
	}
	if errors.Is(err, unix.EMSGSIZE) && !train {
		if mtu := routeMTU(to); mtu != 0 {
			return &tooBigError{mtu}
		}
	}
	return err
}

// sendTries is how often what has met an error is sent again: others may come meanwhile.
const sendTries = 3

// sendAgain sends what has met an error, which may be an earlier one's. It is its own if there
// was none on the socket.
func (s *sharedFD) sendAgain(payload, oob []byte, to unix.Sockaddr) (err error) {
	s.errMu.Lock()
	defer s.errMu.Unlock()
	for range sendTries {
		earlier, _ := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err = sendMsg(s.fd, payload, oob, to); err == nil || isFull(err) || earlier == 0 {
			break
		}
	}
	return err
}

// sendMsg is one try to send; it does not allocate.
func sendMsg(fd int, payload, oob []byte, to unix.Sockaddr) error {
	for {
		var err error
		if oob == nil {
			err = unix.Sendto(fd, payload, unix.MSG_DONTWAIT, to)
		} else {
			_, err = unix.SendmsgN(fd, payload, oob, to, unix.MSG_DONTWAIT)
		}
		if err != unix.EINTR {
			return err
		}
	}
}

// isFull reports whether the host had no memory or no room in a queue.
func isFull(err error) bool {
	return err == unix.EAGAIN || err == unix.ENOBUFS || err == unix.ENOMEM
}

// routeMTU asks the kernel for the MTU of its route to a, as known now, in bytes; 0 if
// it does not say. The error of a refused datagram does not tell.
func routeMTU(a netip.AddrPort) uint32 {
	v6 := a.Addr().Is6()
	fd, err := unix.Socket(domainOf(v6), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	if unix.Connect(fd, sockaddr(a)) != nil {
		return 0
	}
	level, opt := unix.SOL_IP, unix.IP_MTU
	if v6 {
		level, opt = unix.SOL_IPV6, unix.IPV6_MTU
	}
	mtu, err := unix.GetsockoptInt(fd, level, opt)
	if err != nil || mtu < 0 {
		return 0
	}
	return uint32(mtu)
}

func (s *hostUDP) close() {
	s.poll.remove(s.fd.fd, s)
	s.fd.close()
}

// readyBatches is how many batches one socket gets before others have their turn.
const readyBatches = 16

// ready implements pollable.
func (s *hostUDP) ready(events uint32, rx *recvBatch) {
	if !s.fd.use() {
		return
	}
	defer s.fd.done()
	failed := events&unix.EPOLLERR != 0
	if failed {
		s.fd.drainErrors(s.relayError)
	}
	for range readyBatches {
		n, err := rx.recv(s.fd.fd)
		if err == unix.EAGAIN {
			return
		}
		s.relay(rx, n) // none after an error of something sent, which is off the socket now
		if err == nil && n < recvBatchLen && !failed {
			return
		}
	}
	s.poll.again(s.fd.fd)
}

func (s *hostUDP) relayError(e sentError) {
	s.owner.hostError(hostError{
		ICMP: flow.ICMP{Type: e.typ, Code: e.code}, from: e.from, to: e.to, mtu: e.mtu, quote: e.quote,
	})
}

// relay passes n received messages on.
func (s *hostUDP) relay(rx *recvBatch, n int) {
	rx.trains(n, func(from netip.AddrPort, b []byte, a ancillary) {
		if a.overrun > s.overrun {
			s.owner.lost(a.overrun - s.overrun)
			s.overrun = a.overrun
		}
		s.owner.fromHost(from, b, a.segment, a.hops, a.tos)
	})
}

// trains calls f for n received messages. Datagrams of one sender and size that follow
// each other become a train, which costs the guest's side one packet.
func (rx *recvBatch) trains(n int, f func(from netip.AddrPort, b []byte, a ancillary)) {
	for i := 0; i < n; {
		from, a, b := rx.from(i), parseAncillary(rx.oob(i)), rx.payload(i)
		i++
		if a.segment >= len(b) {
			a.segment = 0
		}
		size := len(b)
		for ; i < n && a.segment == 0 && size > 0; i++ {
			next := rx.payload(i)
			if len(next) == 0 || len(next) > size || len(b)+len(next) > maxTrain ||
				len(b)%size != 0 || rx.from(i) != from {
				break
			}
			other := parseAncillary(rx.oob(i))
			if other.segment != 0 || !other.like(a) {
				break
			}
			a.overrun = max(a.overrun, other.overrun)
			b = append(b, next...) // b has the capacity of the whole buffer
		}
		if len(b) > size {
			a.segment = size
		}
		f(from, b, a)
	}
}

// maxTrain is the longest train in bytes: a whole packet of 64 KiB less headers.
const maxTrain = 65535 - 40 - 8
