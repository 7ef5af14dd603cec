//go:build !linux

package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/slipway-net/slipway/internal/flow"
)

// acceptClient takes a connection from the queue of ln.
func acceptClient(ln *net.TCPListener) (client, error) {
	c, err := ln.AcceptTCP()
	if err != nil {
		return client{}, err
	}
	return client{conn: &hostConn{TCPConn: c}, addr: addrPortOf(c.RemoteAddr()), at: addrPortOf(c.LocalAddr())}, nil
}

func addrPortOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// dialInside is Linux's: the guest is not on this kernel.
func dialInside(context.Context, Doors, passage) (flow.Conn, error) {
	return nil, &socketError{errors.ErrUnsupported}
}
