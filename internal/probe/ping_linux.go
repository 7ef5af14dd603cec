package probe

import (
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// pingSocket opens an ICMP echo socket (icmp(7)) connected to a, so that it gets only
// a's answers, and errors about its requests. EACCES says that our group is outside
// net.ipv4.ping_group_range.
func pingSocket(a netip.Addr) (net.Conn, error) {
	domain, proto := unix.AF_INET6, unix.IPPROTO_ICMPV6
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: a.As16()}
	if a.Is4() {
		domain, proto = unix.AF_INET, unix.IPPROTO_ICMP
		to = &unix.SockaddrInet4{Addr: a.As4()}
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "ping")
	defer f.Close() // FileConn duplicates it
	if err := unix.Connect(fd, to); err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	return net.FileConn(f)
}
