package forward

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// connect(2) tells an errno, and several ICMP messages share one. So the socket asks
// for its error queue (IP_RECVERR, IPV6_RECVERR; ip(7)) before it connects; when the
// connect fails the queue has the type, the code and the router that sent it. A RST,
// and an error found without a packet, leave nothing there. With the option on, a
// "soft" error ends the dial at once, as it ends a native connect of a guest: that
// guest gets the same message from us and its kernel decides. Once connected the
// option is switched off again, or a message that TCP would survive ended the flow.
//
// The socket is made by hand, not by package net: net hides the error queue by
// closing the socket, and sets options that cost a system call each.

// dialTCP connects to a. It blocks until the kernel has decided or ctx ends. The
// error is a *DialError, or ctx's.
func dialTCP(ctx context.Context, a netip.AddrPort) (flow.Conn, error) {
	fd, err := socketTCP(a.Addr())
	if err != nil {
		return nil, &DialError{Target: a, Err: err}
	}
	err = unix.Connect(fd, sockaddr(a))
	if err != nil && err != unix.EINPROGRESS {
		de := dialError(fd, a, err)
		unix.Close(fd)
		return nil, de
	}
	c, cerr := newHostConn(fd)
	if cerr != nil {
		unix.Close(fd)
		return nil, &DialError{Target: a, Err: cerr}
	}
	if err == unix.EINPROGRESS {
		if err := c.waitConnected(ctx, a); err != nil {
			c.Close()
			return nil, err
		}
	}
	c.established(a.Addr())
	return c, nil
}

// spareFDs is how many descriptors dials leave for the rest of us: for the guest's side
// of those that are connected, for the control API, for commands. A guest that uses
// up what there is must not stop what runs.
const spareFDs = 512

// maxFD is the highest descriptor that a dial may have. The kernel gives the lowest
// that is free, so its number tells how many are in use.
var maxFD = sync.OnceValue(func() int {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil || l.Cur > math.MaxInt32 {
		return math.MaxInt32
	}
	return int(l.Cur) - min(spareFDs, int(l.Cur)/4)
})

// socketTCP makes a non-blocking socket that reports ICMP errors.
func socketTCP(a netip.Addr) (int, error) {
	domain, level, opt := unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_RECVERR
	if a.Is4() {
		domain, level, opt = unix.AF_INET, unix.SOL_IP, unix.IP_RECVERR
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if fd > maxFD() {
		unix.Close(fd)
		return -1, unix.EMFILE
	}
	// Neither can fail on a fresh socket, and neither is worth failing for.
	unix.SetsockoptInt(fd, level, opt, 1)
	unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 1)
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// waitConnected waits for the end of a connect in progress. It asks with a second
// connect(2), which says EALREADY, or how the first one ended (connect(2), "EALREADY").
// The first question is put before waiting: the event that the first connect caused may
// have come and gone before the poller was asked to listen.
func (c *hostConn) waitConnected(ctx context.Context, a netip.AddrPort) error {
	defer context.AfterFunc(ctx, func() { c.file.SetWriteDeadline(time.Unix(1, 0)) })()
	var result error
	sa := sockaddr(a)
	err := c.raw.Write(func(fd uintptr) bool {
		switch err := unix.Connect(int(fd), sa); err {
		case unix.EALREADY, unix.EINPROGRESS, unix.EINTR:
			return false
		case nil, unix.EISCONN:
		default:
			result = dialError(int(fd), a, err)
		}
		return true
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("dial tcp on %v: %w", a, context.Cause(ctx))
	}
	return errors.Join(err, result)
}

// dialError explains errno with the socket's error queue.
func dialError(fd int, a netip.AddrPort, errno error) error {
	e := &DialError{Target: a, Err: errno}
	if q, ok := readErrorQueue(fd); ok && q.icmp {
		e.ICMP, e.From, e.MTU = &flow.ICMP{Type: q.typ, Code: q.code}, q.from, q.mtu
	}
	return e
}

// Keep-alive towards the target: the same numbers as towards the guest.
const (
	keepIdle     = 2 * time.Minute
	keepInterval = 15 * time.Second
	keepCount    = 8
)

// established prepares a connected socket for the relay.
func (c *hostConn) established(a netip.Addr) {
	c.raw.Control(func(fd uintptr) { setEstablished(int(fd), a) })
}

// setEstablished prepares a connected socket for the relay. Failing to set an option
// costs its comfort, not the connection.
func setEstablished(fd int, a netip.Addr) {
	level, opt := unix.SOL_IPV6, unix.IPV6_RECVERR
	if a.Is4() {
		level, opt = unix.SOL_IP, unix.IP_RECVERR
	}
	unix.SetsockoptInt(fd, level, opt, 0)
	setKeepAlive(fd)
}

// setKeepAlive sets the options of every connection of the host's.
func setKeepAlive(fd int) {
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) // urgent data is data
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_KEEPIDLE, int(keepIdle/time.Second))
	unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_KEEPINTVL, int(keepInterval/time.Second))
	unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_KEEPCNT, keepCount)
}
