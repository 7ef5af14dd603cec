package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// Of linux/tcp.h and linux/in.h.
const (
	noQueue, recvQueue, sendQueue = 0, 1, 2 // TCP_NO_QUEUE and so on

	optMSS, optWindow, optSACK, optTimestamp = 2, 3, 4, 8 // TCPOPT_MSS and so on

	ipLocalPortRange = 51 // IP_LOCAL_PORT_RANGE

	// firstPort and lastPort are the range of ports that a kernel begins with.
	firstPort, lastPort = 32768, 60999
)

// startRepair has the kernel do what fd is told without a packet, its close included.
func startRepair(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_ON)
}

// errOtherPort says that connect(2) took another port than it was to.
var errOtherPort = errors.New("the kernel chose another port")

// adopt makes fd, which is in repair, the client's end of h, and ends the repair with a
// window probe.
func (p *Path) adopt(fd int, h *flow.Handshake) error {
	if err := setNumbers(fd, h); err != nil {
		return fmt.Errorf("set sequence numbers: %w", err)
	}
	if err := p.connect(fd, h); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if err := setAgreed(fd, h); err != nil {
		return fmt.Errorf("set what was agreed on: %w", err)
	}
	if err := endRepair(fd); err != nil {
		return fmt.Errorf("end repair: %w", err)
	}
	return nil
}

// endRepair sends a window probe, where fd is connected.
func endRepair(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_OFF); err != nil {
		return err
	}
	// A server that wants to listen on the client's port may, as far as we are concerned.
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
}

// probe sends another window probe.
func probe(fd int) error {
	if err := startRepair(fd); err != nil {
		return err
	}
	return endRepair(fd)
}

// setNumbers sets what connect(2) begins with.
func setNumbers(fd int, h *flow.Handshake) error {
	for _, o := range [][2]int{
		{unix.TCP_MAXSEG, min(max(int(h.GuestMSS), leastMSS), mostMSS)},
		{unix.TCP_REPAIR_QUEUE, sendQueue}, {unix.TCP_QUEUE_SEQ, int(int32(h.Next))},
		{unix.TCP_REPAIR_QUEUE, recvQueue}, {unix.TCP_QUEUE_SEQ, int(int32(h.GuestNext))},
		{unix.TCP_REPAIR_QUEUE, noQueue},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, o[0], o[1]); err != nil {
			return err
		}
	}
	return nil
}

// connect connects fd from the client's port. A port that connect(2) chooses, of a range
// of one, stays free for what guests connect to elsewhere; one that bind(2) has
// chosen does not, and up to tens of thousands of clients have one each. But bind(2)
// takes any port, one that a server listens on, too.
func (p *Path) connect(fd int, h *flow.Handshake) error {
	port := int(h.Client.Port())
	if !p.entrance.bindPort && port >= firstPort && port <= lastPort {
		err := unix.SetsockoptInt(fd, unix.SOL_IP, ipLocalPortRange, port<<16|port)
		if err == nil {
			err = connectFrom(fd, netip.AddrPortFrom(h.Client.Addr(), 0), h.Guest)
		}
		if err == nil {
			return p.checkPort(fd, h.Client)
		}
		if errors.Is(err, unix.ENOPROTOOPT) { // before Linux 6.3
			p.entrance.bindPort = true
		} else if !errors.Is(err, unix.EADDRNOTAVAIL) {
			return err
		}
	}
	return connectFrom(fd, h.Client, h.Guest)
}

// checkPort returns an error unless fd has from's port: the guest has another
// net.ipv4.ip_local_port_range than most, and kernels take no range beyond it.
func (p *Path) checkPort(fd int, from netip.AddrPort) error {
	if localAddr(fd).Port() != from.Port() {
		p.entrance.bindPort = true
		return errOtherPort
	}
	return nil
}

func connectFrom(fd int, from, to netip.AddrPort) error {
	if err := unix.Bind(fd, sockaddr(from)); err != nil {
		return err
	}
	return unix.Connect(fd, sockaddr(to))
}

// setAgreed sets the rest.
func setAgreed(fd int, h *flow.Handshake) error {
	options := []uint32{optMSS, uint32(h.GuestMSS), optWindow, uint32(h.GuestScale) | uint32(h.Scale)<<16}
	if h.SACK {
		options = append(options, optSACK, 0)
	}
	if h.Timestamps {
		options = append(options, optTimestamp, 0)
	}
	if err := setWords(fd, unix.TCP_REPAIR_OPTIONS, options...); err != nil {
		return err
	}
	if h.Timestamps {
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_TIMESTAMP, int(int32(h.Clock))); err != nil {
			return err
		}
	}
	// struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
	return setWords(fd, unix.TCP_REPAIR_WINDOW, h.GuestNext-1, h.GuestWindow, h.GuestWindow, h.Window, h.GuestNext)
}

// setWords sets an option that is made of 32-bit numbers.
func setWords(fd, option int, words ...uint32) error {
	b := make([]byte, 0, 4*len(words))
	for _, w := range words {
		b = binary.NativeEndian.AppendUint32(b, w)
	}
	return unix.SetsockoptString(fd, unix.SOL_TCP, option, string(b))
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
