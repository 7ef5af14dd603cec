package netstack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/slipway-net/slipway/internal/flow"
)

// clients are who dials the guest, with the port that is dialled.
var clients = []struct {
	name             string
	client, guest    netip.AddrPort
	gateway          netip.Addr
	icmp, unreach    uint8
	portUnreachables uint8
}{
	{"v4", netip.AddrPortFrom(target4, 50000), netip.AddrPortFrom(guest4, 8080), gw4, 1, 3, 3},
	{"v6", netip.AddrPortFrom(target6, 50000), netip.AddrPortFrom(guest6, 8080), gw6, 58, 1, 4},
}

// serveGuest has g answer every connection to at with its own bytes until the test
// ends, and tells who called.
func serveGuest(t *testing.T, g *stack.Stack, at netip.AddrPort) <-chan netip.AddrPort {
	t.Helper()
	ln, err := gonet.ListenTCP(g, addressOf(at.Addr(), at.Port()), protocolOf(at.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	callers := make(chan netip.AddrPort, 100)
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if a, ok := c.RemoteAddr().(*net.TCPAddr); ok { // else it has been reset already
				callers <- a.AddrPort()
			}
			all.Go(func() {
				stop := context.AfterFunc(ctx, func() { c.Close() })
				defer stop()
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		cancel()
		all.Wait()
	})
	return callers
}

// dialGuestFrom dials with patience.
func dialGuestFrom(t *testing.T, b *bench, from, to netip.AddrPort) (flow.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return b.Dial(ctx, from, to)
}

func TestDial(t *testing.T) {
	for _, f := range clients {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			callers := serveGuest(t, guestStack(b), f.guest)
			c, err := dialGuestFrom(t, b, f.client, f.guest)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if got := next(t, callers); got != f.client {
				t.Errorf("the guest sees %v, want %v", got, f.client)
			}
			want := pattern(3 << 20)
			go func() {
				c.Write(want)
				c.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestDialRefused(t *testing.T) {
	for _, f := range clients {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			guestStack(b)
			if _, err := dialGuestFrom(t, b, f.client, f.guest); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dial = %v, want connection refused", err)
			}
			if n := b.served.Load(); n != 0 || b.out.n != 0 || len(b.out.byFlow) != 0 || b.bufs.conns.Load() != 0 {
				t.Errorf("a refused dial is still counted: %d served, %d out", n, b.out.n)
			}
		})
	}
}

// One port of a client may be connected to each port of the guest, but to none twice.
func TestDialPortInUse(t *testing.T) {
	for _, f := range clients {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			g := guestStack(b)
			other := netip.AddrPortFrom(f.guest.Addr(), f.guest.Port()+1)
			serveGuest(t, g, f.guest)
			serveGuest(t, g, other)
			first, err := dialGuestFrom(t, b, f.client, f.guest)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := dialGuestFrom(t, b, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("the same once more: %v, want address in use", err)
			}
			second, err := dialGuestFrom(t, b, f.client, other)
			if err != nil {
				t.Fatalf("to another port of the guest: %v", err)
			}
			defer second.Close()
			first.Abort()
			again, err := dialGuestFrom(t, b, f.client, f.guest)
			if err != nil {
				t.Fatalf("after the first has gone: %v", err)
			}
			again.Close()
		})
	}
}

// A guest that is connecting from its port to the client has the four numbers first.
func TestDialOfHeldSYN(t *testing.T) {
	b := start(t, 1500)
	asked := make(chan flow.Tuple, 1)
	b.fwd.decide = func(ctx context.Context, tu flow.Tuple) flow.Verdict {
		asked <- tu
		<-ctx.Done()
		return flow.Verdict{}
	}
	f := clients[0]
	b.send(noOffload, syn(f.guest, f.client))
	next(t, asked)
	if _, err := dialGuestFrom(t, b, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("dial = %v, want address in use", err)
	}
}

func TestDialAnyPortOfGateway(t *testing.T) {
	for _, f := range clients {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			callers := serveGuest(t, guestStack(b), f.guest)
			seen := make(map[netip.AddrPort]bool)
			for range 20 {
				c, err := dialGuestFrom(t, b, netip.AddrPortFrom(f.gateway, 0), f.guest)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				got := next(t, callers)
				if got.Addr() != f.gateway || seen[got] {
					t.Errorf("the guest sees %v, want the gateway with a port of its own", got)
				}
				seen[got] = true
			}
		})
	}
}

func TestDialFromNowhere(t *testing.T) {
	b := start(t, 1500)
	for _, from := range []string{"0.0.0.0:1", "127.0.0.1:1", "224.0.0.1:1", "255.255.255.255:1", "169.254.1.1:1", "[2001:db8::1]:1", "[::ffff:192.0.2.1]:1"} {
		if _, err := dialGuestFrom(t, b, netip.MustParseAddrPort(from), clients[0].guest); !errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Errorf("dial from %s = %v, want address not available", from, err)
		}
	}
}

func TestDialLimit(t *testing.T) {
	b := start(t, 1500, func(c *Config) { c.MaxDials = 3 })
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for i := range 3 {
		all.Go(func() { b.Dial(ctx, netip.AddrPortFrom(target4, uint16(1000+i)), clients[0].guest) })
	}
	waitFor(t, "three dials", func() bool {
		b.out.mu.Lock()
		defer b.out.mu.Unlock()
		return b.out.n == 3
	})
	if _, err := b.Dial(ctx, clients[0].client, clients[0].guest); !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("a fourth dial = %v, want EAGAIN", err)
	}
	cancel()
	all.Wait()
}

// The end of Run ends a dial that waits and a connection that stands; whoever has that
// may use and close it later.
func TestDialAtTheEnd(t *testing.T) {
	var waiting sync.WaitGroup
	var stands flow.Conn
	t.Run("run", func(t *testing.T) {
		b := start(t, 1500)
		waiting.Go(func() {
			if _, err := b.Dial(context.Background(), clients[0].client, clients[0].guest); err == nil {
				t.Error("connected to nobody")
			}
		})
		b.receive() // the SYN
	})
	t.Run("run_connected", func(t *testing.T) {
		b := start(t, 1500)
		f := clients[0]
		waiting.Go(func() {
			pkt, _ := b.receive()
			ack := header.TCP(pkt[header.IPv4MinimumSize:]).SequenceNumber() + 1
			b.send(noOffload, segment(f.guest, f.client, header.TCPFields{SeqNum: 1, AckNum: ack, Flags: header.TCPFlagSyn | header.TCPFlagAck, WindowSize: 1000}))
		})
		c, err := dialGuestFrom(t, b, f.client, f.guest)
		if err != nil {
			t.Fatal(err)
		}
		stands = c
	})
	waiting.Wait()
	if _, err := io.ReadAll(stands); err == nil {
		t.Error("the connection ended in order")
	}
	if _, err := stands.Write([]byte("x")); err == nil {
		t.Error("a connection that has ended takes data")
	}
	stands.CloseWrite()
	stands.Abort()
	stands.Close()
}

func TestDialAfterTheEnd(t *testing.T) {
	b := start(t, 1500)
	b.dials.close()
	if _, err := dialGuestFrom(t, b, clients[0].client, clients[0].guest); !errors.Is(err, syscall.ENETDOWN) {
		t.Errorf("dial = %v, want network is down", err)
	}
}

func TestDialCancelled(t *testing.T) {
	b := start(t, 1500)
	ctx, cancel := context.WithCancel(context.Background())
	failed := make(chan error, 1)
	go func() {
		_, err := b.Dial(ctx, clients[0].client, clients[0].guest)
		failed <- err
	}()
	b.receive() // the SYN
	cancel()
	if err := next(t, failed); !errors.Is(err, context.Canceled) {
		t.Errorf("dial = %v, want context canceled", err)
	}
	// A SYN-ACK that is too late gets a RST.
	f := clients[0]
	b.send(noOffload, segment(f.guest, f.client, header.TCPFields{SeqNum: 1, AckNum: 2, Flags: header.TCPFlagSyn | header.TCPFlagAck, WindowSize: 1000}))
	for {
		pkt, _ := b.receive()
		if header.TCP(pkt[header.IPv4MinimumSize:]).Flags()&header.TCPFlagRst != 0 {
			return
		}
	}
}

// A guest's reset is told to whoever does not read.
func TestDialReset(t *testing.T) {
	b := start(t, 1500)
	f := clients[0]
	g := guestStack(b)
	ln, err := gonet.ListenTCP(g, addressOf(f.guest.Addr(), f.guest.Port()), protocolOf(f.guest.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := dialGuestFrom(t, b, f.client, f.guest)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	told := make(chan struct{})
	c.(interface{ OnReset(func()) }).OnReset(func() { close(told) })
	guest, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("unread"))
	guest.SetReadDeadline(time.Now().Add(patience))
	guest.Read(make([]byte, 1))
	guest.Close() // with data unread: a RST
	next(t, told)
}

// quoting is an ICMP error of from's about pkt.
func quoting(from netip.Addr, proto, typ, code uint8, rest uint32, pkt []byte) []byte {
	to := netip.AddrFrom4([4]byte(pkt[12:16]))
	if from.Is6() {
		to = netip.AddrFrom16([16]byte(pkt[8:24]))
	}
	b := echoBody(from, to, typ, uint16(rest>>16), uint16(rest), pkt)
	b[1] = code
	// Mend the checksum for the code.
	sum := uint32(^(uint16(b[2])<<8 | uint16(b[3]))) + uint32(code)
	sum = ^(sum&0xffff + sum>>16)
	b[2], b[3] = byte(sum>>8), byte(sum)
	if proto == 1 {
		return ipPacket(from, to, header.ICMPv4ProtocolNumber, b)
	}
	return ipPacket(from, to, header.ICMPv6ProtocolNumber, b)
}

func TestDialUnreachable(t *testing.T) {
	for _, f := range clients {
		codes := map[uint8]error{0: syscall.ENETUNREACH, f.portUnreachables: syscall.ECONNREFUSED, 13: syscall.EHOSTUNREACH}
		for code, want := range codes {
			for _, from := range []netip.AddrPort{f.client, netip.AddrPortFrom(f.gateway, 0)} {
				b := start(t, 1500)
				failed := make(chan error, 1)
				go func() {
					_, err := b.Dial(context.Background(), from, f.guest)
					failed <- err
				}()
				pkt, _ := b.receive()
				router := f.guest.Addr().Next()
				b.send(noOffload, quoting(router, f.icmp, f.unreach, code, 0, slices.Clone(pkt)))
				if err := next(t, failed); !errors.Is(err, want) {
					t.Errorf("%s from %v, code %d: %v, want %v", f.name, from, code, err, want)
				}
			}
		}
	}
}
