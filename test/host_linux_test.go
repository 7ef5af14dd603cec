package test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// Ports of services on the host.
const (
	port4    = 8084 // only on 127.0.0.1
	port6    = 8086 // only on ::1
	portBoth = 8080
	portShut = 8099 // never allowed
)

// hostServices listens on the host's loopback and names itself to who connects.
func hostServices(t testing.TB, g *guest) {
	t.Helper()
	for _, a := range []string{
		fmt.Sprintf("127.0.0.1:%d", port4), fmt.Sprintf("[::1]:%d", port6),
		fmt.Sprintf("127.0.0.1:%d", portBoth), fmt.Sprintf("[::1]:%d", portBoth), fmt.Sprintf("127.0.0.1:%d", portShut),
	} {
		serve(t, g.net.Host, a, func(c *net.TCPConn) {
			io.WriteString(c, "host service")
			c.Close()
		})
	}
}

// TestHostAccessDenied: by default nothing of the host's loopback can be reached,
// at once and with a hint in the log.
func TestHostAccessDenied(t *testing.T) {
	eachEngine(t, func(t *testing.T, g *guest) {
		hostServices(t, g)
		eachFamily(t, func(t *testing.T, f family) {
			if s, took := dialPromptly(g.ns, at(f.alias, portBoth), time.Second); s != "connection refused" || took > time.Second {
				t.Errorf("the host says %q after %v", s, took)
			}
		})
		if !eventually(10*time.Second, func() bool { return strings.Contains(g.engine.stderr.String(), "--host-access") }) {
			t.Errorf("the log does not say how to allow it:\n%s", g.engine.stderr.String())
		}
	})
}

// TestHostAccessAllowed: the listed ports are open, whichever loopback family the
// service listens on; the others stay shut.
func TestHostAccessAllowed(t *testing.T) {
	need(t, "ip", "nft")
	for _, k := range kinds {
		if k.native {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			list := fmt.Sprintf("%d,%d,%d", port4, portBoth, port6)
			g := newGuest(t, newTopology(t), k, engineOptions{flags: []string{"--host-access", list}})
			hostServices(t, g)
			eachFamily(t, func(t *testing.T, f family) {
				for _, port := range []int{port4, port6, portBoth} {
					c, err := g.ns.Dial("tcp", at(f.alias, port), 10*time.Second)
					if err != nil {
						t.Errorf("port %d: %v", port, err)
						continue
					}
					expectAll(t, c, "host service")
					c.Close()
				}
				if s := dialError(g.ns, at(f.alias, portShut), 10*time.Second); s != "connection refused" {
					t.Errorf("a port that is not listed: %s", s)
				}
			})
		})
	}
}

// TestHostAddresses: the host's own address on the network is an address like any
// other.
func TestHostAddresses(t *testing.T) {
	eachEngine(t, func(t *testing.T, g *guest) {
		for _, a := range []netip.Addr{topo.Host4, topo.Host6} {
			serve(t, g.net.Host, at(a, portBoth), func(c *net.TCPConn) {
				io.WriteString(c, "host service")
				c.Close()
			})
			c, err := g.ns.Dial("tcp", at(a, portBoth), 10*time.Second)
			if err != nil {
				t.Errorf("%v: %v", a, err)
				continue
			}
			expectAll(t, c, "host service")
			c.Close()
		}
	})
}

// neverDialled are targets that no socket of the host may be pointed at; the
// guest's kernel lets them out.
var neverDialled = []string{
	"169.254.169.254", "168.63.129.16", "192.168.65.1", "192.168.65.77", "240.0.0.1",
	"fd00:ec2::254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "fdc4:f303:9324::1", "fdc4:f303:9324::77",
	"2002:7f00:1::",
}

// TestNeverDialled: these are refused at once, over TCP, and no packet of any
// protocol leaves the host for them. Nets that would carry them to the host's
// loopback listeners exist in host, so a slip would connect.
func TestNeverDialled(t *testing.T) {
	eachEngine(t, func(t *testing.T, g *guest) {
		var hits atomic.Int32
		serve(t, g.net.Host, fmt.Sprintf(":%d", portBoth), func(c *net.TCPConn) {
			hits.Add(1)
			c.Close()
		})
		// Whatever is dialled wrongly ends at that listener.
		trap := func(verb string) error {
			var b strings.Builder
			for _, prefix := range []string{"169.254.0.0/16", "168.63.129.16", "192.168.65.0/24", "240.0.0.1",
				"64:ff9b::/32", "fd00:ec2::/64", "fdc4:f303:9324::/64", "2002::/16"} {
				fmt.Fprintf(&b, "route %s local %s dev lo\n", verb, prefix)
			}
			return g.net.Host.IP(b.String())
		}
		if err := trap("add"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { trap("del") })
		if s := dialError(g.net.Host, at(netip.MustParseAddr("64:ff9b::7f00:1"), portBoth), 10*time.Second); s != "ok" {
			t.Fatalf("the trap does not work: %s", s)
		}
		if !eventually(10*time.Second, func() bool { return hits.Swap(0) == 1 }) {
			t.Fatal("the trap does not count")
		}
		_, datagrams := echoUDP(t, g.net.Host, fmt.Sprintf(":%d", portBoth))
		for _, text := range neverDialled {
			s, took := dialPromptly(g.ns, at(netip.MustParseAddr(text), portBoth), time.Second)
			if s == "ok" || s == "silence" || took > time.Second {
				t.Errorf("%s: %s after %v", text, s, took)
			}
			if u, err := g.ns.Dial("udp", at(netip.MustParseAddr(text), portBoth), time.Second); err == nil {
				u.Write([]byte("x"))
				u.Close()
			}
		}
		if n := hits.Load(); n != 0 {
			t.Errorf("%d connections reached the host", n)
		}
		// One datagram that may pass shows that the others had time to.
		if err := ask(t, guestUDP(t, g, families[0]), netip.AddrPortFrom(topo.Host4, portBoth), []byte("last")); err != nil {
			t.Error(err)
		}
		if n := len(datagrams); n != 1 {
			t.Errorf("%d datagrams reached the host, expected one", n)
		}
	})
}
