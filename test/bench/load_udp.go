//go:build linux

package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	udpWindowSize  = 16   // datagrams outstanding in the window load
	udpWindowBytes = 1200 // their payload: what QUIC sends
	udpTimeout     = 200 * time.Millisecond
	idleDeadline   = 30 * time.Second // for opening all idle flows
)

// udpSocket returns a connected blocking socket with a receive time-out.
func udpSocket(o order) (int, error) {
	fd, err := rawSocket(unix.SOCK_DGRAM)
	if err != nil {
		return -1, err
	}
	to := targets(o)
	tv := unix.NsecToTimeval(int64(udpTimeout))
	err = cmpErr(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		rawConnect(fd, &to[0]),
	)
	if err != nil {
		rawClose(fd)
		return -1, fmt.Errorf("udp socket: %w", err)
	}
	return fd, nil
}

// udpRoundTrips sends 64 bytes to and fro between two UDP sockets.
func udpRoundTrips(o order) (map[string]float64, int, error) {
	rawMode()
	fd, err := udpSocket(o)
	if err != nil {
		return nil, 0, err
	}
	defer rawClose(fd)
	return pingPong(fd, o.Seconds)
}

// udpWindow keeps 16 datagrams of 1200 bytes under way and counts the answers.
// What does not come back within udpTimeout is lost, and replaced.
func udpWindow(o order) (map[string]float64, int, error) {
	rawMode()
	fd, err := udpSocket(o)
	if err != nil {
		return nil, 0, err
	}
	defer rawClose(fd)
	msg := make([]byte, udpWindowBytes)
	answers, lost, outstanding := 0, 0, 0
	start := time.Now()
	for time.Since(start).Seconds() < o.Seconds {
		for ; outstanding < udpWindowSize; outstanding++ {
			if _, err := rawSend(fd, msg); err != nil {
				return nil, lost, fmt.Errorf("send: %w", err)
			}
		}
		n, err := rawRecv(fd, msg, 0)
		switch {
		case err == unix.EAGAIN:
			lost += outstanding
			outstanding = 0
		case err != nil:
			return nil, lost, fmt.Errorf("recv: %w", err)
		case n != udpWindowBytes:
			return nil, lost, fmt.Errorf("recv: %d bytes instead of %d", n, udpWindowBytes)
		default:
			answers++
			outstanding--
		}
	}
	if answers == 0 {
		return nil, lost, errors.New("no datagram came back")
	}
	rate := float64(answers) / time.Since(start).Seconds()
	return map[string]float64{"rate": rate, "n": float64(answers)}, lost, nil
}

// idleFlows opens o.Count TCP connections, proves each by a byte, holds them, and
// proves each again. It prints a line before, when all are open, and waits for
// a line of the harness each time, which looks at the driver's processes then.
func idleFlows(o order) (map[string]float64, int, error) {
	in := bufio.NewReader(os.Stdin)
	if err := meet(in, "base"); err != nil {
		return nil, 0, err
	}
	to := targets(o)
	deadline := time.Now().Add(idleDeadline)
	fds := make([]int, 0, o.Count)
	defer func() {
		for _, fd := range fds {
			rawClose(fd)
		}
	}()
	for i := range o.Count {
		fd, err := openIdle(&to[i%len(to)])
		if err != nil {
			return nil, o.Count - i, fmt.Errorf("flow %d of %d: %w", i+1, o.Count, err)
		}
		fds = append(fds, fd)
		if time.Now().After(deadline) {
			return nil, o.Count - i, fmt.Errorf("only %d of %d flows open after %v", i+1, o.Count, idleDeadline)
		}
	}
	if err := meet(in, "open"); err != nil {
		return nil, 0, err
	}
	failed := 0
	for _, fd := range fds {
		if err := echoByte(fd); err != nil {
			failed++
		}
	}
	return map[string]float64{"flows": float64(len(fds) - failed)}, failed, nil
}

// openIdle connects with a time-out of a few seconds and proves the connection.
func openIdle(to *unix.RawSockaddrInet4) (int, error) {
	fd, err := rawSocket(unix.SOCK_STREAM)
	if err != nil {
		return -1, err
	}
	tv := unix.Timeval{Sec: 3}
	err = cmpErr(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv), // bounds connect too
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		rawConnect(fd, to),
	)
	if err == nil {
		err = echoByte(fd)
	}
	if err != nil {
		rawClose(fd)
		return -1, err
	}
	return fd, nil
}

// echoByte sends a byte and waits for it.
func echoByte(fd int) error {
	var b [1]byte
	if _, err := rawSend(fd, b[:]); err != nil {
		return err
	}
	if n, err := rawRecv(fd, b[:], 0); n != 1 {
		return cmpErr(err, unix.ENODATA)
	}
	return nil
}

// meet prints word and waits for the harness to answer with a line.
func meet(in *bufio.Reader, word string) error {
	fmt.Println(word)
	if _, err := in.ReadString('\n'); err != nil {
		return fmt.Errorf("stdin after %q: %w", word, err)
	}
	return nil
}
