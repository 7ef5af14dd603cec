package dockerproxy

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Limits for clients inside the engine's namespace.
const (
	dialLimit   = 10 * time.Second // for a container to answer; on a bridge it is there or not
	acceptFirst = 10 * time.Millisecond
	acceptMost  = time.Second
)

// tcpServer joins each client of a listener with a connection to the container.
type tcpServer struct {
	ln        *net.TCPListener
	container netip.AddrPort
	log       *slog.Logger
}

// serve returns when ctx has ended and so have all connections.
func (s *tcpServer) serve(ctx context.Context) {
	var conns sync.WaitGroup
	defer conns.Wait()
	defer s.ln.Close()
	defer context.AfterFunc(ctx, func() { s.ln.Close() })()
	wait := acceptFirst
	for {
		c, err := s.ln.AcceptTCP()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return
		}
		if err == nil {
			wait = acceptFirst
			conns.Go(func() { s.join(ctx, c) })
			continue
		}
		// No descriptors, no memory: it may pass. The listener stays, and does not spin.
		s.log.Warn("cannot accept", slog.Any("err", err))
		if !sleep(ctx, wait) {
			return
		}
		wait = min(2*wait, acceptMost)
	}
}

// join relays until both directions have ended. A client whose container is not there, or
// resets, is reset.
func (s *tcpServer) join(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	d := net.Dialer{Timeout: dialLimit}
	up, err := d.DialContext(ctx, "tcp", s.container.String())
	if err != nil {
		client.SetLinger(0)
		return
	}
	container := up.(*net.TCPConn)
	defer container.Close()
	reset := sync.OnceFunc(func() {
		for _, c := range []*net.TCPConn{client, container} {
			c.SetLinger(0)
			c.Close()
		}
	})
	defer context.AfterFunc(ctx, reset)()
	var both sync.WaitGroup
	defer both.Wait()
	for _, way := range [][2]*net.TCPConn{{client, container}, {container, client}} {
		both.Go(func() {
			if _, err := io.Copy(way[1], way[0]); err != nil {
				reset()
				return
			}
			way[1].CloseWrite() // FIN: the other direction goes on
		})
	}
}
