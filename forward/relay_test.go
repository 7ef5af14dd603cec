package forward

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
)

// joined is a running relay: what is written to guest comes out of target and back.
type joined struct {
	guest, target *net.TCPConn // the far ends
	flow          *flow.Flow
	fwd           *Forwarder
	done          chan struct{} // closed when Relay has returned
}

// join dials two loopback connections and relays between them.
func join(t *testing.T, ctx context.Context) *joined {
	t.Helper()
	f := &Forwarder{table: table.New(), tcp: newShare[netip.Addr](10), in: newInbounds(10, 10), relays: make(map[*relay]struct{})}
	f.idle.L = &f.mu
	ours, guest := connected(t)
	theirs, target := connected(t)
	j := &joined{guest: guest, target: target, fwd: f, done: make(chan struct{}),
		flow: &flow.Flow{Tuple: flow.Tuple{Proto: flow.TCP}}}
	f.open(j.flow)
	go func() {
		f.Relay(ctx, ours, flow.Verdict{Answer: flow.Connect, Host: theirs, Flow: j.flow})
		close(j.done)
	}()
	t.Cleanup(func() {
		guest.Close()
		target.Close()
		<-j.done
	})
	return j
}

// connected returns a connection made by dialTCP and its far end.
func connected(t *testing.T) (flow.Conn, *net.TCPConn) {
	t.Helper()
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := dialTCP(t.Context(), ln.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatal(err)
	}
	far, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	far.SetDeadline(time.Now().Add(time.Minute))
	return c, far
}

func (j *joined) wait(t *testing.T) {
	t.Helper()
	select {
	case <-j.done:
	case <-time.After(patience):
		t.Fatal("the relay did not end")
	}
}

func TestRelayBothWays(t *testing.T) {
	for _, n := range []int{1, 100, flow.BufSize, flow.BufSize + 1, 20 << 20} {
		j := join(t, t.Context())
		up, down := bytes.Repeat([]byte("up"), n/2+1)[:n], bytes.Repeat([]byte("down"), n/4+1)[:n]
		var wg sync.WaitGroup
		send := func(c *net.TCPConn, b []byte) {
			wg.Go(func() {
				c.Write(b)
				c.CloseWrite()
			})
		}
		send(j.guest, up)
		send(j.target, down)
		check := func(c *net.TCPConn, want []byte) {
			wg.Go(func() {
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes: got %d, %v", n, len(got), err)
				}
			})
		}
		check(j.guest, down)
		check(j.target, up)
		wg.Wait()
		j.wait(t)
		if h, g := j.flow.ToHost.Bytes.Load(), j.flow.ToGuest.Bytes.Load(); h != uint64(n) || g != uint64(n) {
			t.Errorf("counted %d and %d, want %d", h, g, n)
		}
		if j.flow.State() != flow.Closed || len(j.fwd.table.Snapshot()) != 0 {
			t.Error("the entry is still in the table")
		}
	}
}

// After one side's FIN the other goes on for as long as it likes.
func TestRelayHalfClose(t *testing.T) {
	for _, guestFirst := range []bool{true, false} {
		j := join(t, t.Context())
		first, second := j.guest, j.target
		if !guestFirst {
			first, second = second, first
		}
		first.CloseWrite()
		if b, err := io.ReadAll(second); err != nil || len(b) != 0 {
			t.Fatalf("read %q, %v; want end of file", b, err)
		}
		for range 3 {
			second.Write([]byte("more"))
			b := make([]byte, 4)
			if _, err := io.ReadFull(first, b); err != nil {
				t.Fatal(err)
			}
		}
		if j.flow.State() != flow.HalfOpen {
			t.Errorf("state %v", j.flow.State())
		}
		second.Close()
		if _, err := first.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("read = %v, want end of file", err)
		}
		j.wait(t)
	}
}

// A reset on one side is a reset on the other, at once, also after a half close.
func TestRelayReset(t *testing.T) {
	for _, guestFirst := range []bool{true, false} {
		for _, half := range []bool{false, true} {
			j := join(t, t.Context())
			first, second := j.guest, j.target
			if !guestFirst {
				first, second = second, first
			}
			if half {
				second.CloseWrite()
				io.ReadAll(first)
			}
			first.SetLinger(0)
			first.Close()
			if _, err := second.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("guest first %v, half %v: read = %v, want a reset", guestFirst, half, err)
			}
			j.wait(t)
		}
	}
}

// refuseUpload reads a little of what comes, answers, and closes with the rest unread: a
// reset right behind the answer, or behind a FIN.
func refuseUpload(server *net.TCPConn, answer []byte, half bool) {
	io.ReadFull(server, make([]byte, 100<<10))
	server.Write(answer)
	if half {
		server.CloseWrite()
	}
	server.Close()
}

// upload writes until that fails, and returns what there is to read then.
func upload(client *net.TCPConn) []byte {
	for b := make([]byte, 32<<10); ; {
		if _, err := client.Write(b); err != nil {
			got, _ := io.ReadAll(client) // the write may have taken the error
			return got
		}
	}
}

// The answer arrives also where a write meets the reset before a read.
func TestRelayUploadRefused(t *testing.T) {
	for i := range 50 {
		j := join(t, t.Context())
		answer := bytes.Repeat([]byte("too large"), 1000)
		go refuseUpload(j.target, answer, i%2 == 1)
		if got := upload(j.guest); !bytes.Equal(got, answer) {
			t.Fatalf("%d of %d bytes of the answer arrived", len(got), len(answer))
		}
		j.wait(t)
	}
}

// A reader that does not read holds its writer back: what lies between is bounded.
func TestRelayBackPressure(t *testing.T) {
	j := join(t, t.Context())
	j.guest.SetWriteDeadline(time.Now().Add(time.Second))
	const most = 64 << 20
	n, err := j.guest.Write(make([]byte, most))
	if err == nil {
		t.Errorf("%d bytes went nowhere", n)
	}
	if got := j.flow.ToHost.Bytes.Load(); got > most/2 {
		t.Errorf("relayed %d bytes that nobody read", got)
	}
}

func TestRelayEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	j := join(t, ctx)
	cancel()
	j.wait(t)
	for _, c := range []*net.TCPConn{j.guest, j.target} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read = %v, want a reset", err)
		}
	}
}

func TestDialAnyTriesInOrder(t *testing.T) {
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6 on loopback: %v", err)
	}
	defer ln.Close()
	port := ln.Addr().(*net.TCPAddr).AddrPort().Port()
	v4 := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	v6 := netip.AddrPortFrom(netip.IPv6Loopback(), port)
	c, err := dialAny(t.Context(), []netip.AddrPort{v4, v6})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
