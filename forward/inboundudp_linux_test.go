package forward

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
	"github.com/slipway-net/slipway/internal/loop"
)

// udpDoors are Doors whose guest is on the host's loopback: its sockets are the host's,
// and what comes by the wire is a fakeGuest's.
type udpDoors struct {
	*testDoors
	slow bool // no socket is ever at hand
}

func (d udpDoors) Socket(k SocketKind, wait bool) (int, error) {
	if d.slow && !wait {
		return -1, ErrNoneReady
	}
	family := unix.AF_INET
	if k == SocketUDP6 {
		family = unix.AF_INET6
	}
	return unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
}

// udpPublisher is a Forwarder with published ports on real sockets.
type udpPublisher struct {
	*Forwarder
	t     *testing.T
	guest *fakeGuest
}

// eachUDPWay runs f with a goroutine that receives, and with a loop.
func eachUDPWay(t *testing.T, f func(t *testing.T, p *udpPublisher)) {
	for _, looped := range []bool{false, true} {
		t.Run(fmt.Sprintf("loop=%v", looped), func(t *testing.T) {
			before := countFDs(t)
			t.Cleanup(func() { wantFDs(t, before) })
			g := newFakeGuest()
			p := &udpPublisher{New(Config{
				Guest: g, Table: table.New(), Policy: NewPolicy(hostPolicy()), Log: slog.New(slog.DiscardHandler),
			}), t, g}
			var l *loop.Loop
			if looped {
				var err error
				if l, err = loop.New(); err != nil {
					t.Fatal(err)
				}
				l.Start()
				p.UseLoop(l)
			}
			p.SetDoors(udpDoors{testDoors: dockerDoors(false)})
			f(t, p)
			p.Close()
			if l != nil {
				l.Close()
			}
		})
	}
}

// publish opens a port at addr until the test ends.
func (p *udpPublisher) publish(addr string, in *Inbound) (at uint16, stop func()) {
	p.t.Helper()
	network := "udp4"
	if netip.MustParseAddrPort(addr).Addr().Is6() {
		network = "udp6"
	}
	conn, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(ap(addr)))
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := p.ServeUDP(conn, in)
	if err != nil {
		p.t.Fatal(err)
	}
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Port(), func() {
		c.Close()
		conn.Close()
	}
}

func dialUDP(t *testing.T, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// A client that is connected to an address of the host takes answers from that one only.
func TestInboundUDPAnswersFromWhatWasAsked(t *testing.T) {
	eachUDPWay(t, func(t *testing.T, p *udpPublisher) {
		for _, tt := range []struct {
			at     string
			in     Inbound
			asked  []string
			gw     netip.Addr
			length int
		}{
			{"0.0.0.0:0", inWildcard, []string{"127.0.0.1", "127.0.0.2"}, ip("192.168.65.1"), 65507},
			{"[::]:0", inWildcard6, []string{"::1"}, ip("fdc4:f303:9324::1"), 65487},
			{"127.0.0.3:0", inSpecific, []string{"127.0.0.3"}, ip("192.168.65.1"), 65507},
		} {
			in := counters(tt.in)
			port, stop := p.publish(tt.at, in)
			to, _ := in.reached(p.in.doors.Ends())
			for _, asked := range tt.asked {
				c := dialUDP(t, netip.AddrPortFrom(ip(asked), port))
				for _, n := range []int{0, 1, 1400, tt.length} {
					want := bytes.Repeat([]byte("q"), n)
					if _, err := c.Write(want); err != nil {
						t.Fatal(err)
					}
					d := take(t, p.guest, &p.guest.datagrams)
					if d.Guest != to || d.Target.Addr() != tt.gw || !bytes.Equal(d.Payload, want) || d.Hops != 63 {
						t.Errorf("%s: the guest gets %d bytes for %v from %v with %d hops", asked, len(d.Payload), d.Guest, d.Target, d.Hops)
					}
					p.Datagram(flow.Datagram{Guest: d.Guest, Target: d.Target, Payload: d.Payload, Hops: 63})
					got := make([]byte, 1<<16)
					if m, err := c.Read(got); err != nil || m != n {
						t.Fatalf("%s: the answer has %d bytes, %v; want %d", asked, m, err, n)
					}
				}
				c.Close()
			}
			if got := in.Count.Clients.Load(); got != uint64(len(tt.asked)) {
				t.Errorf("counted %d clients, want %d", got, len(tt.asked))
			}
			stop()
		}
	})
}

// Trains pass as trains, and come apart at the client.
func TestInboundUDPTrains(t *testing.T) {
	eachUDPWay(t, func(t *testing.T, p *udpPublisher) {
		port, stop := p.publish("127.0.0.1:0", counters(inWildcard))
		defer stop()
		c := dialUDP(t, netip.AddrPortFrom(ip("127.0.0.1"), port))
		defer c.Close()
		c.Write([]byte("x"))
		d := take(t, p.guest, &p.guest.datagrams)
		payload := bytes.Repeat([]byte("t"), 3500)
		p.Datagram(flow.Datagram{Guest: d.Guest, Target: d.Target, Payload: payload, Segment: 1000, Hops: 63})
		var sizes []int
		for range 4 {
			n, err := c.Read(make([]byte, 4000))
			if err != nil {
				t.Fatal(err)
			}
			sizes = append(sizes, n)
		}
		if !slices.Equal(sizes, []int{1000, 1000, 1000, 500}) {
			t.Errorf("the client gets %v", sizes)
		}
	})
}

// A plain way is a socket of the guest's namespace for each client, however long it
// takes to get one.
func TestInboundUDPPlain(t *testing.T) {
	for _, slow := range []bool{false, true} {
		eachUDPWay(t, func(t *testing.T, p *udpPublisher) {
			p.SetDoors(udpDoors{testDoors: dockerDoors(false), slow: slow})
			for at, serve := range map[string]string{"127.0.0.1:0": "127.0.0.1:0", "[::1]:0": "[::1]:0", "127.0.0.2:0": "[::1]:0"} {
				in := counters(Inbound{Guest: echoServer(t, serve), Preserve: true})
				port, stop := p.publish(at, in)
				for range 3 {
					c := dialUDP(t, netip.AddrPortFrom(ap(at).Addr(), port))
					for i := range 5 {
						want := fmt.Sprintf("%d from %v", i, c.LocalAddr())
						c.Write([]byte(want))
						got := make([]byte, 100)
						if n, err := c.Read(got); err != nil || string(got[:n]) != want {
							t.Fatalf("%s: %q, %v; want %q", at, got[:n], err, want)
						}
					}
					c.Close()
				}
				stop()
			}
		})
	}
}

// mayTell skips a test that needs raw sockets.
func mayTell(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	if err != nil {
		missing(t, os.NewSyscallError("raw socket", err))
		return
	}
	unix.Close(fd)
}

// A client of a closed port reads ECONNREFUSED.
func TestInboundUDPRefusedForReal(t *testing.T) {
	mayTell(t)
	eachUDPWay(t, func(t *testing.T, p *udpPublisher) {
		closed := echoServer(t, "127.0.0.1:0")
		closed = netip.AddrPortFrom(closed.Addr(), freeUDPPort(t))
		for name, tt := range map[string]struct {
			at string
			in Inbound
		}{
			"wire":         {"0.0.0.0:0", inWildcard},
			"wire6":        {"[::]:0", inWildcard6},
			"plain":        {"127.0.0.1:0", Inbound{Guest: closed}},
			"plain4_for_6": {"[::1]:0", Inbound{Guest: closed}},
		} {
			in := counters(tt.in)
			port, stop := p.publish(tt.at, in)
			to := ip("127.0.0.1")
			if ap(tt.at).Addr().Is6() {
				to = ip("::1")
			}
			c := dialUDP(t, netip.AddrPortFrom(to, port))
			c.Write([]byte("anybody?"))
			if !tt.in.Guest.Addr().IsLoopback() {
				d := take(t, p.guest, &p.guest.datagrams)
				p.Rejected(flow.Error{
					Tuple: flow.Tuple{Proto: flow.UDP, Guest: d.Guest, Target: d.Target},
					ICMP:  portUnreachable(d.Guest.Addr()), From: d.Guest.Addr(), Quote: d.Payload, Size: len(d.Payload),
				})
			}
			if _, err := c.Read(make([]byte, 10)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: the client reads %v, want connection refused", name, err)
			}
			if n := in.Count.Refused.Load(); n != 1 {
				t.Errorf("%s: counted %d, want 1", name, n)
			}
			c.Close()
			stop()
		}
	})
}

// A socket that a service manager passed on is published again and again, and was
// watched under a descriptor that others have next.
func TestInboundUDPAgain(t *testing.T) {
	eachUDPWay(t, func(t *testing.T, p *udpPublisher) {
		conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		passedOn, err := conn.File()
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer passedOn.Close()
		client := dialUDP(t, conn.LocalAddr().(*net.UDPAddr).AddrPort())
		defer client.Close()
		for i := range 3 {
			conn, err := net.FilePacketConn(passedOn)
			if err != nil {
				t.Fatal(err)
			}
			c, err := p.ServeUDP(conn.(*net.UDPConn), counters(inWildcard))
			if err != nil {
				t.Fatalf("published for time %d: %v", i+1, err)
			}
			if err := conn.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Go's poller still watches it: %v", err)
			}
			client.Write([]byte("x"))
			take(t, p.guest, &p.guest.datagrams)
			c.Close()
		}
	})
}

// Clients of a socket for both families are of the family that they come in.
func TestInboundUDPBothFamilies(t *testing.T) {
	eachUDPWay(t, func(t *testing.T, p *udpPublisher) {
		conn, err := net.ListenUDP("udp", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c, err := p.ServeUDP(conn, counters(inWildcard))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		port := conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		for _, asked := range []string{"127.0.0.2", "::1"} {
			client := dialUDP(t, netip.AddrPortFrom(ip(asked), port))
			client.Write([]byte("x"))
			d := take(t, p.guest, &p.guest.datagrams)
			if got := p.ports.client(d.Guest, d.Target).key; got.client != client.LocalAddr().(*net.UDPAddr).AddrPort() || got.asked != ip(asked) {
				t.Errorf("the client of %s is %+v, want %v", asked, got, client.LocalAddr())
			}
			if d.Hops != 63 {
				t.Errorf("%s: %d hops left", asked, d.Hops)
			}
			p.Datagram(flow.Datagram{Guest: d.Guest, Target: d.Target, Payload: []byte("y"), Hops: 63})
			if _, err := client.Read(make([]byte, 10)); err != nil {
				t.Errorf("the answer from %s: %v", asked, err)
			}
			client.Close()
		}
	})
}

func freeUDPPort(t *testing.T) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// Many clients at once, each of whom gets its own answers, while ports come and go.
func TestInboundUDPStress(t *testing.T) {
	eachUDPWay(t, func(t *testing.T, p *udpPublisher) {
		server := echoServer(t, "127.0.0.1:0")
		port, stop := p.publish("127.0.0.1:0", counters(Inbound{Guest: server}))
		defer stop()
		done := make(chan error, 20)
		for i := range cap(done) {
			go func() {
				done <- func() error {
					c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip("127.0.0.1"), port)))
					if err != nil {
						return err
					}
					defer c.Close()
					c.SetDeadline(time.Now().Add(patience))
					for n := range 50 {
						want := fmt.Sprintf("%d/%d", i, n)
						c.Write([]byte(want))
						got := make([]byte, 100)
						m, err := c.Read(got)
						if err != nil || string(got[:m]) != want {
							return fmt.Errorf("%q, %w; want %q", got[:m], err, want)
						}
					}
					return nil
				}()
			}()
		}
		for range 10 {
			_, stop := p.publish("127.0.0.1:0", counters(inWildcard))
			stop()
		}
		for range cap(done) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}
