package api

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// errInside refuses processes of an engine.
var errInside = errors.New("refused: it comes from other namespaces than the daemon's, such as an engine's own")

// checkPeer returns nil when the process that connected is ours: the same user (or the
// host's root, who can do anything anyway), in the daemon's own user and network
// namespace. A process in an engine, or in a container of that engine, has at least
// another network namespace, although in a rootless engine it has our user ID.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("connect api: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	pidfd := -1
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		// Linux 6.5; without it a process that died and whose number was taken by
		// another between connect and now could be mistaken for it.
		pidfd, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return fmt.Errorf("connect api: %w", err)
	}
	if pidfd > 0 {
		defer unix.Close(pidfd)
	}
	if credErr != nil {
		return fmt.Errorf("connect api: who: %w", credErr)
	}
	return checkCred(cred, pidfd)
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
	if pidfd > 0 {
		if err := unix.PidfdSendSignal(pidfd, 0, nil, 0); err != nil {
			return fmt.Errorf("connect api: process %d has gone", cred.Pid)
		}
	}
	return nil
}

func sameNamespace(pid int32, ns string) error {
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
	if err != nil {
		return fmt.Errorf("namespaces of process %d: %w", pid, err)
	}
	ours, err := os.Stat("/proc/self/ns/" + ns)
	if err != nil {
		return fmt.Errorf("namespaces of the daemon: %w", err)
	}
	if !os.SameFile(theirs, ours) {
		return errInside
	}
	return nil
}
