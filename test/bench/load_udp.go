//go:build linux

package main

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	udpWindowSize  = 16   // datagrams outstanding in the window load
	udpWindowBytes = 1200 // their payload: what QUIC sends
	udpTimeout     = 200 * time.Millisecond
)

// udpSocket returns a connected blocking socket with a receive time-out.
func udpSocket(o order) (int, error) {
	to := targets(o)
	fd, err := rawSocket(&to[0], unix.SOCK_DGRAM)
	if err != nil {
		return -1, err
	}
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
