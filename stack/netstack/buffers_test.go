package netstack

import (
	"context"
	"io"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
)

// The more connections there are the less a new one may hold, whatever it carries.
func TestBuffersShrink(t *testing.T) {
	b := start(t, 1500)
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Connect} }
	rcv, snd := make(chan int64, 1), make(chan int64, 1)
	b.fwd.relay = func(_ context.Context, c flow.Conn, _ flow.Verdict) {
		c.Write(pattern(4 << 20)) // lets gVisor tune the send buffer
		rcv <- c.(*guestConn).ep.SocketOptions().GetReceiveBufferSize()
		snd <- c.(*guestConn).ep.SocketOptions().GetSendBufferSize()
		c.Close()
	}
	g := guestStack(b)
	for _, tt := range []struct{ conns, want int64 }{
		{0, 1 << 20}, {255, 1 << 20}, {256, 256 << 10}, {4095, 256 << 10}, {4096, 64 << 10}, {9000, 64 << 10}, {10, 1 << 20},
	} {
		b.bufs.conns.Store(tt.conns)
		c, err := dialGuest(t, g, families[0].target)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, c); err != nil || n != 4<<20 {
			t.Errorf("got %d bytes, %v", n, err)
		}
		c.Close()
		if r, s := <-rcv, <-snd; r != tt.want || s > tt.want {
			t.Errorf("with %d others a connection may hold %d and %d bytes, want %d", tt.conns, r, s, tt.want)
		}
		waitFor(t, "the connection to leave", func() bool { return b.bufs.conns.Load() == tt.conns })
	}
}

// A connection that is idle keeps no buffer of the relay's.
func TestIdleConnKeepsNoBuffer(t *testing.T) {
	b := start(t, 1500)
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Connect} }
	kept := make(chan bool, 1)
	b.fwd.relay = func(_ context.Context, c flow.Conn, _ flow.Verdict) {
		defer c.Close()
		var pool flow.BufPool
		buf, err := c.ReadBuf(&pool)
		if err != nil {
			return
		}
		c.Write(buf.Bytes)
		gc := c.(*guestConn)
		kept <- gc.into != nil || gc.from.Size() != 0
	}
	c, err := dialGuest(t, guestStack(b), families[0].target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write(pattern(100))
	if next(t, kept) {
		t.Error("a buffer is kept")
	}
}
