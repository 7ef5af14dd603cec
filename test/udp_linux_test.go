package test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// echoUDP returns every datagram to its sender and tells who that was.
func echoUDP(t testing.TB, ns *topo.NS, address string) (netip.AddrPort, <-chan netip.AddrPort) {
	t.Helper()
	c, err := ns.ListenUDP(address)
	if err != nil {
		t.Fatal(err)
	}
	from := make(chan netip.AddrPort, 1024)
	g := newGroup(t, c)
	g.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, a, err := c.ReadFromUDPAddrPort(buf)
			switch {
			case errors.Is(err, net.ErrClosed):
				return
			case err != nil: // an ICMP error about what we sent
				continue
			}
			a = unmap(a)
			select {
			case from <- a:
			default: // nobody asks
			}
			c.WriteToUDPAddrPort(buf[:n], a)
		}
	})
	return c.LocalAddr().(*net.UDPAddr).AddrPort(), from
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// guestUDP is an unconnected socket of the guest.
func guestUDP(t testing.TB, g *guest, f family) *net.UDPConn {
	t.Helper()
	c, err := g.ns.ListenUDP(at(anyOf(f), 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func anyOf(f family) netip.Addr {
	if f.v6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// ask sends payload to target and waits for the same bytes from it.
func ask(t testing.TB, c *net.UDPConn, target netip.AddrPort, payload []byte) error {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort(payload, target); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, from, err := c.ReadFromUDPAddrPort(buf)
	switch {
	case err != nil:
		return err
	case unmap(from) != target:
		return fmt.Errorf("answer from %v, asked %v", from, target)
	case !bytes.Equal(buf[:n], payload):
		return fmt.Errorf("%d bytes came back of %d, or others", n, len(payload))
	}
	return nil
}

// TestDatagramSizes echoes datagrams of every interesting size.
func TestDatagramSizes(t *testing.T) {
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			target, _ := echoUDP(t, g.net.World, at(f.world, 0))
			c := guestUDP(t, g, f)
			for _, n := range []int{1, 0, 1200, 1452, 1453, 1472, 1473, 9000, 65507} {
				err := ask(t, c, target, pattern(n))
				for try := 1; isTimeout(err) && try < 3; try++ { // on a busy machine one may get lost
					c = guestUDP(t, g, f)
					err = ask(t, c, target, pattern(n))
				}
				if err != nil {
					t.Errorf("%d bytes: %v", n, err)
				}
			}
		})
	})
}

// TestMapping: all peers of one guest socket see one and the same address
// (endpoint-independent mapping, RFC 4787 REQ-1), and a peer that was not spoken
// to cannot send (address-dependent filtering, REQ-8).
func TestMapping(t *testing.T) {
	eachEngine(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			c := guestUDP(t, g, f)
			var seen []netip.AddrPort
			for _, a := range []netip.Addr{f.world, f.world, f.other} {
				target, from := echoUDP(t, g.net.World, at(a, 0))
				if err := ask(t, c, target, []byte("who am I")); err != nil {
					t.Fatalf("%v: %v", target, err)
				}
				seen = append(seen, receive(t, from))
			}
			if seen[0] != seen[1] || seen[1] != seen[2] {
				t.Errorf("one guest socket was seen as %v", seen)
			}
		})
	})
}

// TestFilter sends to a mapping from where the guest did and did not send.
func TestFilter(t *testing.T) {
	eachEngine(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			c := guestUDP(t, g, f)
			target, from := echoUDP(t, g.net.World, at(f.world, 0))
			if err := ask(t, c, target, []byte("open")); err != nil {
				t.Fatal(err)
			}
			mapped := receive(t, from)
			var peers []*net.UDPConn
			for _, a := range []netip.Addr{f.other, f.world} {
				s, err := g.net.World.ListenUDP(at(a, 0))
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				peers = append(peers, s)
			}
			// What passes comes after what must not, by the same socket: no need to wait for
			// silence.
			err := errors.New("not sent")
			for try := 0; try < 3 && err != nil; try++ {
				peers[0].WriteToUDPAddrPort([]byte("a stranger"), mapped)
				peers[1].WriteToUDPAddrPort([]byte("same address, another port"), mapped)
				c.SetReadDeadline(time.Now().Add(5 * time.Second))
				buf := make([]byte, 100)
				var n int
				if n, _, err = c.ReadFromUDPAddrPort(buf); err == nil && string(buf[:n]) != "same address, another port" {
					t.Errorf("%s passed", buf[:n])
				}
			}
			if err != nil {
				t.Errorf("from the same address, another port: %v", err)
			}
		})
	})
}

// TestPortUnreachable: a connected UDP socket learns that nobody listens.
func TestPortUnreachable(t *testing.T) {
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			if err := (client{ns: g.ns, from: anyOf(f)}).knock(netip.AddrPortFrom(f.world, 9), syscall.ECONNREFUSED); err != nil {
				t.Error(err)
			}
		})
	})
}

// TestBadDatagrams: nothing that goes wrong with one datagram harms the mapping.
func TestBadDatagrams(t *testing.T) {
	eachEngine(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			target, from := echoUDP(t, g.net.World, at(f.world, 0))
			c := guestUDP(t, g, f)
			if err := ask(t, c, target, []byte("before")); err != nil {
				t.Fatal(err)
			}
			mapped := receive(t, from)
			for _, bad := range badTargets(f) {
				c.WriteToUDPAddrPort([]byte("bad"), bad)
			}
			if err := ask(t, c, target, []byte("after")); err != nil {
				t.Error(err)
			}
			if now := receive(t, from); now != mapped {
				t.Errorf("the mapping moved from %v to %v", mapped, now)
			}
		})
	})
}

// badTargets are targets that refuse, hide, or must not be dialled.
func badTargets(f family) []netip.AddrPort {
	bad := []netip.Addr{topo.Prohibited4, topo.HostProhibited4, topo.HostUnreachable4, topo.HostBlackHole4,
		topo.World4, netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("240.0.0.1")}
	if f.v6 {
		bad = []netip.Addr{topo.Prohibited6, topo.HostProhibited6, topo.HostUnreachable6, topo.HostBlackHole6,
			topo.World6, netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("64:ff9b::7f00:1")}
	}
	var all []netip.AddrPort
	for _, a := range bad {
		all = append(all, netip.AddrPortFrom(a, 9))
	}
	return all
}

// TestPathMTU: a datagram that must not be fragmented and does not fit is answered
// with the MTU of the narrow hop, also where that hop is not the host's own.
func TestPathMTU(t *testing.T) {
	const narrow = 1400
	eachGuest(t, func(t *testing.T, g *guest) {
		if err := g.net.Router.IP(fmt.Sprintf("link set rtr1 mtu %d\n", narrow)); err != nil {
			t.Fatal(err)
		}
		eachFamily(t, func(t *testing.T, f family) {
			target, _ := echoUDP(t, g.net.World, at(f.world, 0))
			c, err := g.ns.Dial("udp", target.String(), time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			setDontFragment(t, c.(*net.UDPConn), f)
			big := make([]byte, 1420)
			learned := eventually(15*time.Second, func() bool {
				_, err := c.Write(big)
				return errors.Is(err, syscall.EMSGSIZE)
			})
			if mtu := pathMTU(t, c.(*net.UDPConn), f); !learned || mtu != narrow {
				t.Fatalf("told of the narrow hop: %v, path MTU %d, expected %d", learned, mtu, narrow)
			}
			fits := make([]byte, narrow-48)
			// The news of the narrow hop may still be pending on the socket.
			if !eventually(15*time.Second, func() bool {
				if _, err := c.Write(fits); err != nil {
					return false
				}
				c.SetReadDeadline(time.Now().Add(time.Second))
				n, err := c.Read(make([]byte, 2000))
				return err == nil && n == len(fits)
			}) {
				t.Errorf("%d bytes fit, and did not come back", len(fits))
			}
		})
	})
}

func setDontFragment(t testing.TB, c *net.UDPConn, f family) {
	t.Helper()
	control(t, c, func(fd int) error {
		if f.v6 {
			return errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO),
				unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1))
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
}

func pathMTU(t testing.TB, c *net.UDPConn, f family) (mtu int) {
	t.Helper()
	control(t, c, func(fd int) (err error) {
		if f.v6 {
			mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU)
			return err
		}
		mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU)
		return err
	})
	return mtu
}

func control(t testing.TB, c syscall.Conn, fn func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var cerr error
	if err := raw.Control(func(fd uintptr) { cerr = fn(int(fd)) }); err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
}

// TestSegmentedSend: one sendmsg with UDP_SEGMENT is many datagrams to the peer,
// however the packet crossed the link.
func TestSegmentedSend(t *testing.T) {
	const size, count, last = 1200, 10, 7
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			s, err := g.net.World.ListenUDP(at(f.world, 0))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			c := guestUDP(t, g, f)
			control(t, c, func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) })
			data := pattern(size*count + last)
			if _, err := c.WriteToUDPAddrPort(data, unmap(s.LocalAddr().(*net.UDPAddr).AddrPort())); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 64<<10)
			for i := range count + 1 {
				want := data[i*size : min((i+1)*size, len(data))]
				s.SetReadDeadline(time.Now().Add(10 * time.Second))
				n, _, err := s.ReadFromUDPAddrPort(buf)
				if err != nil || !bytes.Equal(buf[:n], want) {
					t.Fatalf("datagram %d: %d bytes of %d, %v", i, n, len(want), err)
				}
			}
		})
	})
}
