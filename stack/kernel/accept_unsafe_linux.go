package kernel

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// accept4(2) and getsockname(2) without the further call that package unix makes to
// tell TCP from other protocols.

// rawAddr has room for a struct sockaddr_in or sockaddr_in6.
type rawAddr struct {
	sa  unix.RawSockaddrInet6
	len uint32
}

// addrPort is the address; the zero one if it is of another family.
func (r *rawAddr) addrPort() netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&r.sa.Port))[:])
	switch r.sa.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&r.sa)).Addr), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(r.sa.Addr), port)
	}
	return netip.AddrPort{}
}

// accept takes a connection from the queue of fd, non-blocking, with its peer.
func accept(fd int) (conn int, peer netip.AddrPort, errno syscall.Errno) {
	r := rawAddr{len: unix.SizeofSockaddrInet6}
	n, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&r.sa)),
		uintptr(unsafe.Pointer(&r.len)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, netip.AddrPort{}, errno
	}
	return int(n), r.addrPort(), 0
}

// localAddr is the address of a socket of our own.
func localAddr(fd int) netip.AddrPort {
	r := rawAddr{len: unix.SizeofSockaddrInet6}
	if _, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&r.sa)), uintptr(unsafe.Pointer(&r.len))); errno != 0 {
		return netip.AddrPort{}
	}
	return r.addrPort()
}
