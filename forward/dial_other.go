//go:build !linux

package forward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// dialTCP connects to a with package net, which knows no error queue: every ICMP
// message is told by its errno alone.
func dialTCP(ctx context.Context, a netip.AddrPort) (flow.Conn, error) {
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 2 * time.Minute, Interval: 15 * time.Second, Count: 8,
	}}
	conn, err := d.DialContext(ctx, "tcp", a.String())
	if ctx.Err() != nil {
		if err == nil {
			conn.Close()
		}
		return nil, fmt.Errorf("dial tcp on %v: %w", a, context.Cause(ctx))
	}
	if err != nil {
		return nil, &DialError{Target: a, Err: err}
	}
	return &hostConn{TCPConn: conn.(*net.TCPConn)}, nil
}

// hostConn is a connected host socket as a flow.Conn.
type hostConn struct{ *net.TCPConn }

var _ flow.Conn = (*hostConn)(nil)

// ReadBuf implements flow.Conn. Package net cannot wait without a buffer, so that an
// idle flow holds one here.
func (c *hostConn) ReadBuf(pool *flow.BufPool) (*flow.Buf, error) {
	buf := pool.Get()
	n, err := c.Read(buf.Room())
	if n == 0 && err != nil {
		pool.Put(buf)
		return nil, err
	}
	buf.Bytes = buf.Room()[:n]
	return buf, nil
}

// Drained implements flow.Conn; package net does not tell.
func (c *hostConn) Drained() bool { return true }

// Abort implements flow.Conn.
func (c *hostConn) Abort() {
	c.SetLinger(0)
	c.Close()
}

// Close implements flow.Conn.
func (c *hostConn) Close() error {
	if err := c.TCPConn.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
