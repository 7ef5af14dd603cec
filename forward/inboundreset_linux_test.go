package forward

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
)

// tellingDoors lead to one server, by Conns that tell of resets.
type tellingDoors struct {
	hostDoors
	server netip.AddrPort
	told   chan func()
}

func (d *tellingDoors) Dial(ctx context.Context, _, _ netip.AddrPort) (flow.Conn, error) {
	c, err := dialTCP(ctx, d.server)
	return &tellingConn{c, d.told}, err
}

type tellingConn struct {
	flow.Conn
	told chan func()
}

func (c *tellingConn) OnReset(do func()) { c.told <- do }

// A client that reads nothing is reset when the guest resets, too.
func TestInboundResetWhileTheClientReadsNothing(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	doors := &tellingDoors{hostDoors: hostDoors{testDoors: *dockerDoors(false)}, told: make(chan func(), 1)}
	doors.server = ln.Addr().(*net.TCPAddr).AddrPort()
	p := publishTCP(t, false, "127.0.0.1:0", inWildcard, doors)
	c := p.call()
	guest, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		defer guest.Close()
		io.Copy(guest, endless{})
	}()
	reset := <-doors.told
	reset()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client reads %v, want connection reset", err)
	}
	<-flooded
}

// endless is a reader of zeroes.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }
