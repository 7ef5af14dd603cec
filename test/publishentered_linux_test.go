package test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// Clients that keep their address on the kernel path: a socket of the guest's namespace
// takes their place behind the handshake.

// pathOf waits for the flow of a client and returns its path.
func (p *publishable) pathOf(t *testing.T, own netip.AddrPort) (path string) {
	t.Helper()
	if !eventually(10*time.Second, func() bool {
		for _, f := range readFlows(t, p.engine) {
			if f.Proto == "tcp" && f.Target == own {
				path = f.Path
			}
		}
		return path != ""
	}) {
		t.Errorf("no flow of %v", own)
	}
	return path
}

// enter connects from another machine, and expects to be seen as itself, on the path.
func (p *publishable) enter(t *testing.T, f family, from string, port int, path string) *net.TCPConn {
	t.Helper()
	c, err := p.dialAgain(from, at(hostOf(f), port))
	if err != nil {
		t.Fatalf("port %d, %s: %v", port, f.name, err)
	}
	t.Cleanup(func() { c.Close() })
	s, err := seenBy(c)
	if err != nil || s.seen != s.own {
		t.Fatalf("port %d, %s: the guest sees %v, the client is %v, %v", port, f.name, s.seen, s.own, err)
	}
	if got := p.pathOf(t, s.own); got != path {
		t.Errorf("port %d, %s: path %s, expected %s", port, f.name, got, path)
	}
	return c.(*net.TCPConn)
}

// deviceBytes is what has crossed the guest's device, either way.
func (p *publishable) deviceBytes(t *testing.T) (n int) {
	t.Helper()
	out, err := p.ns.Run("", "cat", "/proc/thread-self/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(strings.ReplaceAll(line, ":", " "))
		if len(f) > 9 && f[0] == "slipway0" {
			var in, out int
			fmt.Sscan(f[1], &in)
			fmt.Sscan(f[9], &out)
			n = in + out
		}
	}
	return n
}

// eachEntered runs the suite over the guests with a kernel path.
func eachEntered(t *testing.T, suite func(t *testing.T, p *publishable)) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		if !p.kind.kernel() {
			return
		}
		if err := p.bridge.tables.load(p.ns, dockerPort(18080, containerPort)...); err != nil {
			t.Fatal(err)
		}
		p.engine.publish(t, "18080:18080", "18081:81", "18094:94")
		suite(t, p)
	})
}

// TestPublishEntered: a container behind DNAT and a server in the namespace, IPv4 and
// IPv6; a bulk transfer crosses no device.
func TestPublishEntered(t *testing.T) {
	eachEntered(t, func(t *testing.T, p *publishable) {
		const size = 8 << 20
		before := p.deviceBytes(t)
		for _, f := range families {
			for _, port := range []int{18080, 18081} {
				c := p.enter(t, f, at(f.world, 0), port, "kernel")
				go func() {
					c.Write(make([]byte, size))
					c.CloseWrite()
				}()
				if n, err := io.Copy(io.Discard, c); n != size || err != nil {
					t.Errorf("port %d, %s: %d bytes came back of %d, %v", port, f.name, n, size, err)
				}
			}
		}
		if n := p.deviceBytes(t) - before; n == 0 || n > 100000 {
			t.Errorf("%d bytes crossed the guest's device", n)
		}
		if n := counters(t, p.engine); n["kernel.entered"] != 4 || n["kernel.unentered"] != 0 {
			t.Errorf("%d entered, %d did not", n["kernel.entered"], n["kernel.unentered"])
		}
	})
}

// TestPublishEnteredPorts: a client whose port a server of the guest listens on, one that
// comes again at once from the same port, and a server that begins to listen on it.
func TestPublishEnteredPorts(t *testing.T) {
	eachEntered(t, func(t *testing.T, p *publishable) {
		for _, f := range families {
			p.enter(t, f, at(f.world, enginePort), 18081, "kernel")
			const port = 23457
			from := at(f.world, port)
			for range 2 {
				c := p.enter(t, f, from, 18081, "kernel")
				c.SetLinger(0)
				c.Close()
			}
			p.enter(t, f, from, 18081, "kernel")
			l, err := listenOnly(p.ns, netip.AddrPortFrom(anyOf(f), port))
			if err != nil {
				t.Errorf("%s: a server cannot listen on a client's port: %v", f.name, err)
				continue
			}
			l.Close()
		}
	})
}

// TestPublishEnteredAgain: a client that comes again from the same port as soon as it has
// ended, whoever ended it, is served by a socket with its own address. Without timestamps a
// socket cannot take over the old one's TIME_WAIT: netstack serves the client, and the time
// after that, within a second, as the gateway.
func TestPublishEnteredAgain(t *testing.T) {
	eachEntered(t, func(t *testing.T, p *publishable) {
		set := func(ns *topo.NS, name string) {
			if out, err := ns.Run("", "sh", "-c", "echo 0 >/proc/sys/net/ipv4/"+name); err != nil {
				missing(t, "%s: %v: %s", name, err, out)
			}
		}
		set(p.net.World, "tcp_max_tw_buckets") // whoever closes first there may come again
		serve(t, p.ns, "[::]:94", func(c *net.TCPConn) {
			defer c.Close()
			fmt.Fprintln(c, unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort()))
			c.CloseWrite()
			io.Copy(io.Discard, c)
		})
		for _, f := range families {
			for _, own := range []int{23458, 45678} { // the kernel may choose the second itself
				p.comeAgain(t, f, own, 18080, true, endFirst)
				p.comeAgain(t, f, own, 18081, true, endFirst)
				p.comeAgain(t, f, own, 18081, true, func(c *net.TCPConn) { c.SetLinger(0); c.Close() })
				p.comeAgain(t, f, own, 18094, true, func(c *net.TCPConn) { io.Copy(io.Discard, c); c.Close() })
			}
		}
		if n := counters(t, p.engine); n["kernel.unentered"] != 0 {
			t.Errorf("%d did not enter", n["kernel.unentered"])
		}
		set(p.ns, "tcp_timestamps")
		for _, f := range families {
			p.comeAgain(t, f, 23459, 18081, false, endFirst)
		}
		if n := counters(t, p.engine); n["kernel.unentered"] == 0 {
			t.Error("all have entered, in spite of TIME_WAIT")
		}
	})
}

// comeAgain connects a few times from one port, each time as soon as end has returned.
func (p *publishable) comeAgain(t *testing.T, f family, own, port int, kept bool, end func(*net.TCPConn)) {
	t.Helper()
	for range 4 {
		c, err := p.dialAgain(at(f.world, own), at(hostOf(f), port))
		if err != nil {
			t.Fatalf("port %d, %s: %v", port, f.name, err)
		}
		s, err := seenBy(c)
		if err != nil || kept && s.seen != s.own {
			t.Errorf("port %d, %s: the guest sees %v, the client is %v, %v", port, f.name, s.seen, s.own, err)
		}
		end(c.(*net.TCPConn))
	}
}

// dialAgain dials from another machine, as soon as it lets us have the port again.
func (p *publishable) dialAgain(from, to string) (c net.Conn, err error) {
	eventually(15*time.Second, func() bool {
		c, err = p.net.World.DialFrom("tcp", from, to)
		return !errors.Is(err, syscall.EADDRINUSE)
	})
	return c, err
}

// endFirst closes c before the other side does.
func endFirst(c *net.TCPConn) {
	c.CloseWrite()
	io.Copy(io.Discard, c)
	c.Close()
}

// TestPublishEnteredForgotten: the guest empties its table of connections, and its server
// is the first to say something.
func TestPublishEnteredForgotten(t *testing.T) {
	eachEntered(t, func(t *testing.T, p *publishable) {
		speak := make(chan bool)
		serve(t, p.ns, "[::]:94", func(c *net.TCPConn) {
			defer c.Close()
			fmt.Fprintln(c, unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort()))
			<-speak
			fmt.Fprintln(c, "still here")
			io.Copy(c, c)
		})
		for _, f := range families {
			talks, behind := p.enter(t, f, at(f.world, 0), 18094, "kernel"), p.enter(t, f, at(f.world, 0), 18080, "kernel")
			flushConntrack(t, p.ns)
			speak <- true
			talks.SetReadDeadline(time.Now().Add(10 * time.Second))
			if line, err := bufio.NewReader(talks).ReadString('\n'); line != "still here\n" {
				t.Errorf("%s: afterwards the server says %q, %v", f.name, line, err)
			}
			roundTrip(t, talks)
			roundTrip(t, behind)
		}
	})
}

// TestPublishEnteredFirewall: rules that let a router's packets in, but not those of a
// socket in the namespace: netstack takes the clients.
func TestPublishEnteredFirewall(t *testing.T) {
	for name, rule := range map[string]string{
		"INPUT":  "filter -I INPUT -p tcp ! --syn -i lo -j DROP",
		"OUTPUT": "filter -I OUTPUT -p tcp ! --syn -o lo -j DROP",
	} {
		t.Run(name, func(t *testing.T) {
			eachEntered(t, func(t *testing.T, p *publishable) {
				if err := p.bridge.tables.load(p.ns, rule); err != nil {
					t.Fatal(err)
				}
				for _, f := range families {
					for range 2 {
						roundTrip(t, p.enter(t, f, at(f.world, 0), 18081, "netstack"))
					}
				}
				if n := counters(t, p.engine)["kernel.unentered"]; n != 2 {
					t.Errorf("%d did not enter, expected one of each family", n)
				}
			})
		})
	}
}

// TestPublishEnteredDeferred: a server whose kernel passes over the first ACK of a client
// who has said nothing, and repeats its SYN-ACK, as one without room in its queue does.
func TestPublishEnteredDeferred(t *testing.T) {
	eachEntered(t, func(t *testing.T, p *publishable) {
		for _, f := range families {
			l, err := listenOnly(p.ns, netip.AddrPortFrom(anyOf(f), 94))
			if err != nil {
				t.Fatal(err)
			}
			raw, err := l.(*net.TCPListener).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			raw.Control(func(fd uintptr) {
				err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, 1)
			})
			if err != nil {
				t.Fatal(err)
			}
			serveOn(t, l, tell)
			roundTrip(t, p.enter(t, f, at(f.world, 0), 18094, "kernel"))
		}
	})
}

// TestPublishEnteredCookies: a server whose kernel answers with SYN cookies does not know
// the connection before the last ACK, so it cannot answer the probe. netstack takes the client.
func TestPublishEnteredCookies(t *testing.T) {
	eachEntered(t, func(t *testing.T, p *publishable) {
		if out, err := p.ns.Run("", "sh", "-c", "echo 2 >/proc/sys/net/ipv4/tcp_syncookies"); err != nil {
			missing(t, "syncookies: %v: %s", err, out)
		}
		var accepted atomic.Int32
		for _, f := range families {
			serveOnly(t, p.ns, netip.AddrPortFrom(anyOf(f), 94), func(c *net.TCPConn) {
				accepted.Add(1)
				tell(c)
			})
			roundTrip(t, p.enter(t, f, at(f.world, 0), 18094, "netstack"))
		}
		if n := accepted.Load(); n != 2 {
			t.Errorf("the server has seen %d clients, expected 2", n)
		}
	})
}

// TestPublishEnteredPlain: servers whose kernels agree on no timestamps, no SACK and no
// larger windows, and one whose engine does not, but its container does.
func TestPublishEnteredPlain(t *testing.T) {
	const off = "cd /proc/sys/net/ipv4; for f in tcp_timestamps tcp_sack tcp_window_scaling; do echo 0 >$f; done"
	const size = 2 << 20
	eachEntered(t, func(t *testing.T, p *publishable) {
		for _, ns := range []*topo.NS{p.ns, p.bridge.containers[1]} {
			if out, err := ns.Run("", "sh", "-ec", off); err != nil {
				missing(t, "settings of TCP: %v: %s", err, out)
			}
			for _, f := range families {
				for _, port := range []int{18080, 18081} {
					c := p.enter(t, f, at(f.world, 0), port, "kernel")
					go func() {
						c.Write(make([]byte, size))
						c.CloseWrite()
					}()
					if n, err := io.Copy(io.Discard, c); n != size || err != nil {
						t.Errorf("port %d, %s: %d bytes came back of %d, %v", port, f.name, n, size, err)
					}
				}
			}
		}
	})
}
