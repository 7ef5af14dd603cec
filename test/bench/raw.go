//go:build linux

package main

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The load tools call the kernel directly and block in the call: Go's scheduler
// and netpoller would add several microseconds to each step, for every driver
// alike, and so press all ratios towards one.

// quietly starts this process again with Go's preemption signals off. They come
// every 10 ms to a thread that does not return to the scheduler, and a call with a
// time-out (SO_RCVTIMEO) is interrupted by them rather than restarted. The
// setting cannot come from the environment of whoever starts us: a driver that
// is itself written in Go must not be measured with it.
func quietly() error {
	const setting = "asyncpreemptoff=1"
	if strings.Contains(os.Getenv("GODEBUG"), setting) {
		return nil
	}
	env := slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "GODEBUG=") })
	env = append(env, "GODEBUG="+setting)
	return fmt.Errorf("exec: %w", unix.Exec("/proc/self/exe", os.Args, env))
}

// rawMode prepares the calling goroutine for raw blocking calls: its thread is
// its own, nothing collects garbage (a collection would wait for the blocked
// thread), and other goroutines keep threads to run on.
func rawMode() {
	runtime.GOMAXPROCS(max(4, runtime.NumCPU()))
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
}

// sockaddr is a struct sockaddr_in or sockaddr_in6 in network byte order.
type sockaddr struct {
	family int
	v4     unix.RawSockaddrInet4
	v6     unix.RawSockaddrInet6
}

// sockaddrOf converts an address.
func sockaddrOf(a netip.AddrPort) sockaddr {
	port := a.Port()<<8 | a.Port()>>8 // the machines this runs on are little endian; checked in a test
	if a.Addr().Is4() {
		return sockaddr{family: unix.AF_INET, v4: unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: a.Addr().As4()}}
	}
	return sockaddr{family: unix.AF_INET6, v6: unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: a.Addr().As16()}}
}

// raw returns what the kernel wants.
func (sa *sockaddr) raw() (unsafe.Pointer, uintptr) {
	if sa.family == unix.AF_INET {
		return unsafe.Pointer(&sa.v4), unix.SizeofSockaddrInet4
	}
	return unsafe.Pointer(&sa.v6), unix.SizeofSockaddrInet6
}

// rawSocket makes a socket for talking to an address; typ may carry SOCK_NONBLOCK.
func rawSocket(to *sockaddr, typ int) (int, error) {
	fd, _, e := unix.RawSyscall(unix.SYS_SOCKET, uintptr(to.family), uintptr(typ|unix.SOCK_CLOEXEC), 0)
	if e != 0 {
		return -1, fmt.Errorf("socket: %w", e)
	}
	return int(fd), nil
}

// rawConnect is connect(2), tried again when a signal interrupts it.
func rawConnect(fd int, to *sockaddr) error {
	for {
		sa, size := to.raw()
		_, _, e := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(sa), size)
		switch e {
		case 0, unix.EISCONN:
			return nil
		case unix.EINTR:
		default:
			return e
		}
	}
}

// rawSend is send(2) without flags but MSG_NOSIGNAL.
func rawSend(fd int, b []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return -1, e
		}
	}
}

// rawRecv is recv(2); 0 bytes on a stream means that the peer closed it.
func rawRecv(fd int, b []byte, flags int) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(flags), 0, 0)
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return -1, e
		}
	}
}

// rawShutdown sends FIN.
func rawShutdown(fd int) { unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0) }

// rawAbort closes fd with a reset instead of FIN.
func rawAbort(fd int) {
	linger := unix.Linger{Onoff: 1}
	unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&linger)), unix.SizeofLinger, 0)
	rawClose(fd)
}

// rawClose closes fd.
func rawClose(fd int) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// poller is a level triggered epoll instance, edge triggered where asked.
type poller struct {
	fd     int
	events [256]unix.EpollEvent
}

// newPoller makes an empty poller.
func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	return &poller{fd: fd}, nil
}

// add watches fd for events; token comes back with them.
func (p *poller) add(fd int, events uint32, token int32) error {
	ev := unix.EpollEvent{Events: events, Fd: token}
	_, _, e := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(p.fd), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
	if e != 0 {
		return fmt.Errorf("epoll_ctl: %w", e)
	}
	return nil
}

// wait blocks for at most ms milliseconds (-1: for ever) and returns the events,
// which stay valid until the next call.
func (p *poller) wait(ms int) []unix.EpollEvent {
	n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), uintptr(ms), 0, 0)
	if e != 0 {
		return nil // EINTR: the caller asks again
	}
	return p.events[:n]
}
