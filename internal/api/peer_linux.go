package api

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// errInside refuses processes of an engine, and errOutside others.
var (
	errInside  = errors.New("refused: it comes from other namespaces than the daemon's, such as an engine's own")
	errOutside = errors.New("refused: it comes from a network namespace that is not the engine's, such as a container's own")
)

// checkPeer returns nil when the process that connected is ours: the same user (or the
// host's root, who can do anything anyway), in the daemon's own user and network
// namespace. A process in an engine, or in a container of that engine, has at least
// another network namespace, although in a rootless engine it has our user ID.
func checkPeer(c *net.UnixConn) error {
	cred, pidfd, err := peerOf(c)
	if err != nil {
		return fmt.Errorf("connect api: %w", err)
	}
	if pidfd > 0 {
		defer unix.Close(pidfd)
	}
	return checkCred(cred, pidfd)
}

// checkGuest returns the process that connected, and no error when it is in the network
// namespace of that path. Its user does not matter there: inside an engine each has what
// the socket's mode gives it. Whoever may ask the control socket may ask here too.
func checkGuest(c *net.UnixConn, netns string) (pid int32, err error) {
	cred, pidfd, err := peerOf(c)
	if err != nil {
		return 0, fmt.Errorf("connect guest.sock: %w", err)
	}
	if pidfd > 0 {
		defer unix.Close(pidfd)
	}
	if cred.Pid > 0 && sameFile(fmt.Sprintf("/proc/%d/ns/net", cred.Pid), netns) == nil {
		err = alive(cred.Pid, pidfd)
	} else if checkCred(cred, pidfd) != nil {
		err = errOutside
	}
	if err != nil {
		return 0, fmt.Errorf("connect guest.sock: process %d: %w", cred.Pid, err)
	}
	return cred.Pid, nil
}

// peerOf asks the kernel who connected. pidfd is the caller's, and not above 0 before
// Linux 6.5; without it a process that died and whose number was taken by another
// between connect and now could be mistaken for it.
func peerOf(c *net.UnixConn) (cred *unix.Ucred, pidfd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, -1, err
	}
	pidfd = -1
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		pidfd, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return nil, -1, err
	}
	if credErr != nil {
		if pidfd > 0 {
			unix.Close(pidfd)
		}
		return nil, -1, fmt.Errorf("who: %w", credErr)
	}
	return cred, pidfd, nil
}

func checkCred(cred *unix.Ucred, pidfd int) error {
	self := uint32(os.Geteuid())
	if cred.Uid == 0 && self != 0 {
		return nil // we may not look into root's processes, nor need we
	}
	if cred.Uid != self {
		return fmt.Errorf("connect api: refused: user %d is not %d", cred.Uid, self)
	}
	if cred.Pid <= 0 { // not visible from our pid namespace
		return fmt.Errorf("connect api: %w", errInside)
	}
	for _, ns := range []string{"user", "net"} {
		if err := sameNamespace(cred.Pid, ns); err != nil {
			return fmt.Errorf("connect api: %w", err)
		}
	}
	if err := alive(cred.Pid, pidfd); err != nil {
		return fmt.Errorf("connect api: %w", err)
	}
	return nil
}

// alive tells whether what was found out about pid was about the process of pidfd.
func alive(pid int32, pidfd int) error {
	if pidfd > 0 && errors.Is(unix.PidfdSendSignal(pidfd, 0, nil, 0), unix.ESRCH) {
		return fmt.Errorf("process %d has gone", pid)
	}
	return nil
}

func sameNamespace(pid int32, ns string) error {
	return sameFile(fmt.Sprintf("/proc/%d/ns/%s", pid, ns), "/proc/self/ns/"+ns)
}

// sameFile returns errInside when two namespaces are not one.
func sameFile(theirs, ours string) error {
	a, err := os.Stat(theirs)
	if err != nil {
		return fmt.Errorf("namespaces of the peer: %w", err)
	}
	b, err := os.Stat(ours)
	if err != nil {
		return fmt.Errorf("namespaces of the daemon: %w", err)
	}
	if !os.SameFile(a, b) {
		return errInside
	}
	return nil
}

// isInside reports whether err refuses a process of an engine.
func isInside(err error) bool { return errors.Is(err, errInside) }

// hungUp reports whether the other end has closed the connection, or its writing side,
// although there may be something to read yet.
func hungUp(c *net.UnixConn) (gone bool) {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0
	})
	return gone
}
