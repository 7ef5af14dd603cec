//go:build !linux

package probe

import (
	"errors"
	"net"
	"net/netip"
)

// pingSocket: only Linux is known to have them; elsewhere a raw socket serves.
func pingSocket(netip.Addr) (net.Conn, error) { return nil, errors.ErrUnsupported }
