package api

import (
	"context"
	"errors"
	"net"
)

// peerKey is the context key of what was found out about a connection's other end.
type peerKey struct{}

// withPeer asks once for each connection; admit decides at each request.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	err := errors.New("connect api: not a unix socket")
	if u, ok := c.(*limitedConn); ok {
		err = checkPeer(u.UnixConn)
	}
	return context.WithValue(ctx, peerKey{}, err)
}

// admit returns why a request may not be answered, or nil.
func admit(ctx context.Context) error {
	err, _ := ctx.Value(peerKey{}).(error)
	return err
}
