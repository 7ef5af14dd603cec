package netstack

import (
	"context"
	"io"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/slipway-net/slipway/internal/flow"
)

// closing is a connection whose guest has not read what was written, when both sides
// have sent FIN and Close waits.
func closing(t *testing.T, b *bench) (c *guestConn, guest io.ReadCloser, closed chan struct{}) {
	t.Helper()
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Connect} }
	conns, closed := make(chan *guestConn, 1), make(chan struct{})
	b.fwd.relay = func(_ context.Context, c flow.Conn, _ flow.Verdict) {
		defer close(closed)
		// More than the guest offers to take (half its buffer) and less than ours holds.
		c.Write(pattern(900 << 10))
		c.CloseWrite()
		io.Copy(io.Discard, c)
		conns <- c.(*guestConn)
		c.Close()
	}
	far, err := dialGuest(t, guestStack(b), families[0].target)
	if err != nil {
		t.Fatal(err)
	}
	far.CloseWrite()
	c = next(t, conns)
	waitFor(t, "Close to be patient", func() bool {
		var o tcpip.TCPUserTimeoutOption
		return c.ep.GetSockOpt(&o) == nil && time.Duration(o) == closePatience
	})
	select {
	case <-closed:
		t.Fatal("closed although the guest has not read")
	default:
	}
	return c, far, closed
}

// A connection that both sides have closed counts for as long as the guest leaves our
// buffer full.
func TestCloseWaitsForGuest(t *testing.T) {
	b := start(t, 1500)
	_, guest, closed := closing(t, b)
	defer guest.Close()
	if n := b.bufs.conns.Load(); n != 1 {
		t.Errorf("%d connections counted, want 1", n)
	}
	if n, err := io.Copy(io.Discard, guest); err != nil || n != 900<<10 {
		t.Errorf("got %d bytes, %v", n, err)
	}
	next(t, closed)
	waitFor(t, "the count", func() bool { return b.bufs.conns.Load() == 0 })
}

func TestAbortEndsClose(t *testing.T) {
	b := start(t, 1500)
	c, guest, closed := closing(t, b)
	defer guest.Close()
	c.Abort()
	c.Abort()
	next(t, closed)
	if _, err := io.Copy(io.Discard, guest); err == nil {
		t.Error("the guest saw an orderly end")
	}
}

// stalledHost is a host socket that takes nothing until it is aborted.
type stalledHost struct {
	flow.Conn
	once    sync.Once
	aborted chan struct{}
}

func (h *stalledHost) Abort() { h.once.Do(func() { close(h.aborted) }) }

// A relay that reads nothing hears of the guest's reset.
func TestResetEndsStalledRelay(t *testing.T) {
	b := start(t, 1500)
	stalled := &stalledHost{aborted: make(chan struct{})}
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict {
		return flow.Verdict{Answer: flow.Connect, Host: stalled}
	}
	ended := make(chan struct{})
	b.fwd.relay = func(_ context.Context, c flow.Conn, _ flow.Verdict) {
		defer c.Abort()
		c.Write([]byte("xy"))
		<-stalled.aborted
		close(ended)
	}
	far, err := dialGuest(t, guestStack(b), families[0].target)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	far.Close() // with a byte unread: a reset
	next(t, ended)
}
