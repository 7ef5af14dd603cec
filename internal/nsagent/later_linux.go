package nsagent

import "golang.org/x/sys/unix"

// closeLater closes fds, each the last descriptor of what it refers to, without
// waiting for what the kernel does then. Removing a TUN or an owned nftables table waits
// for RCU grace periods, 15 to 30 ms here, which is as long as everything else that
// `slipway run -- true` does; and a process that exits with such a descriptor waits too.
//
// The descriptors are put in flight on a socket that is in flight on itself, and forgotten.
// The kernel's garbage collector for such cycles (unix(7), net/unix/garbage.c) runs when
// the other end is closed, since Linux 6.10 on a thread of its own. Before that, and when
// anything fails here, it is an ordinary close.
func closeLater(fds ...int) {
	if len(fds) == 0 {
		return
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Sendmsg(pair[1], []byte{0}, unix.UnixRights(append(fds, pair[0])...), nil, 0)
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	if err == nil {
		unix.Close(pair[0])
		unix.Close(pair[1]) // the last end that is not in flight: wakes the collector
	}
}
