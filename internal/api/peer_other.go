//go:build !linux

package api

import (
	"errors"
	"net"
)

// checkPeer refuses everybody: engines run on Linux only, and without SO_PEERCRED we
// do not know who asks.
func checkPeer(*net.UnixConn) error {
	return errors.New("connect api: this system does not say who connects")
}

// checkGuest refuses everybody, as checkPeer does.
func checkGuest(*net.UnixConn, string) (int32, error) {
	return 0, errors.New("connect guest.sock: this system does not say who connects")
}

// isInside does not know.
func isInside(error) bool { return false }

// hungUp does not know.
func hungUp(*net.UnixConn) bool { return false }
