package test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// Published UDP ports: mappings, sizes, errors, and answers that come late or unasked.

// TestPublishUDP: datagrams of every size, many clients at a time, each with its own
// mapping.
func TestPublishUDP(t *testing.T) {
	const clients = 40
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		echoUDP(t, p.bridge.containers[1], "[::]:86")
		if err := p.bridge.tables.load(p.ns, dockerPort(18086, 86)...); err != nil {
			t.Fatal(err)
		}
		p.engine.publish(t, "18086:18086/udp")
		for _, f := range families {
			loopback, own, other := clientsOf(p.net, f)
			for _, c := range []client{loopback, own, other} {
				to := hostOf(f)
				if c.from.IsLoopback() {
					to = c.from
				}
				target := netip.AddrPortFrom(to, 18086)
				for _, size := range []int{0, 1, 1200, 1452, 1473, 8000, 65507} {
					if err := c.exchange(t, target, pattern(size)); err != nil {
						t.Errorf("%d bytes from %s, %s: %v", size, c.name, f.name, err)
					}
				}
				var wg sync.WaitGroup
				for i := range clients {
					wg.Go(func() {
						if err := c.exchange(t, target, pattern(100+i)); err != nil {
							t.Errorf("client %d of %d from %s, %s: %v", i, clients, c.name, f.name, err)
						}
					})
				}
				wg.Wait()
			}
		}
		if port := portAt(t, p.engine, 18086); port.Counters.Clients < 6*clients || port.Counters.Dropped != 0 {
			t.Errorf("counters: %+v", port.Counters)
		}
	})
}

// exchange sends a datagram from a socket of its own and wants it back, from whom it was
// sent to. On a busy machine one may get lost.
func (c client) exchange(t testing.TB, target netip.AddrPort, payload []byte) (err error) {
	t.Helper()
	conn, err := c.ns.ListenUDP(at(c.from, 0))
	if err != nil {
		return err
	}
	defer conn.Close()
	for range 3 {
		if err = ask(t, conn, target, payload); err == nil || !errors.Is(err, syscall.ETIMEDOUT) && !isTimeout(err) {
			return err
		}
	}
	return err
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// TestPublishUDPUnreachable: a client learns that nobody listens, where slipway may tell
// it; it is counted everywhere.
func TestPublishUDPUnreachable(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		p.engine.publish(t, "18083:83/udp", "18084:172.17.0.3:83/udp")
		var wg sync.WaitGroup
		for _, f := range families {
			for _, port := range []uint16{18083, 18084} {
				if port == 18084 && f.v6 {
					continue
				}
				loopback, _, other := clientsOf(p.net, f)
				for _, c := range []client{loopback, other} {
					to := hostOf(f)
					if c.from.IsLoopback() {
						to = c.from
					}
					want := syscall.ECONNREFUSED
					if p.kind.rootless && isRoot() { // a user namespace of the tests has raw sockets
						want = 0
					}
					wg.Go(func() {
						if err := c.knock(netip.AddrPortFrom(to, port), want); err != nil {
							t.Errorf("port %d, from %s, %s: %v", port, c.name, f.name, err)
						}
					})
				}
			}
		}
		wg.Wait()
		for _, port := range []uint16{18083, 18084} {
			if !eventually(15*time.Second, func() bool { return portAt(t, p.engine, int(port)).Counters.Refused > 0 }) {
				t.Errorf("counters of %d: %+v", port, portAt(t, p.engine, int(port)).Counters)
			}
		}
	})
}

// knock sends from a connected socket until it is told the error. With 0 none may come.
func (c client) knock(to netip.AddrPort, want syscall.Errno) error {
	conn, err := c.ns.DialFrom("udp", at(c.from, 0), to.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	tries := 5
	if want == 0 {
		tries = 1
	}
	for range tries {
		if _, err = conn.Write([]byte("anybody?")); err == nil {
			conn.SetReadDeadline(time.Now().Add(2 * time.Second))
			_, err = conn.Read(make([]byte, 10))
		}
		switch {
		case isTimeout(err) && want == 0:
			return nil
		case isTimeout(err):
		case want != 0 && errors.Is(err, want):
			return nil
		default:
			return fmt.Errorf("%v, expected %v", err, want)
		}
	}
	return err
}

// cue is a UDP server that answers when the test says so.
type cue struct {
	conn *net.UDPConn
	from chan netip.AddrPort
}

func newCue(t testing.TB, ns *topo.NS, address string) *cue {
	t.Helper()
	conn, err := ns.ListenUDP(address)
	if err != nil {
		t.Fatal(err)
	}
	c := &cue{conn, make(chan netip.AddrPort, 16)}
	g := newGroup(t, conn)
	g.Go(func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := conn.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.from <- from
			}
		}
	})
	return c
}

// hears wants a datagram from exactly that address, within some tries of send.
func hears(conn *net.UDPConn, want netip.AddrPort, send func()) error {
	buf := make([]byte, 2048)
	var err error
	for range 4 {
		send()
		conn.SetReadDeadline(time.Now().Add(3 * time.Second))
		var from netip.AddrPort
		if _, from, err = conn.ReadFromUDPAddrPort(buf); err == nil {
			if unmap(from) != want {
				return fmt.Errorf("a datagram from %v, expected %v", from, want)
			}
			return nil
		}
	}
	return err
}

// TestPublishUDPForgotten: the guest's conntrack forgets a client while its mapping lives,
// and the container answers then: from the port that was asked.
func TestPublishUDPForgotten(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		if err := p.bridge.tables.load(p.ns, dockerPort(18087, 87)...); err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			server := newCue(t, p.bridge.containers[1], at(container(f), 87))
			p.engine.dockerProxy(t, "udp", netip.AddrPortFrom(anyOf(f), 18087), netip.AddrPortFrom(container(f), 87)).mustServe(t)
			loopback, own, other := clientsOf(p.net, f)
			for _, c := range []client{loopback, own, other} {
				to := netip.AddrPortFrom(hostOf(f), 18087)
				if c.from.IsLoopback() {
					to = netip.AddrPortFrom(c.from, 18087)
				}
				conn, err := c.ns.ListenUDP(at(c.from, 0))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				conn.WriteToUDPAddrPort([]byte("ask"), to)
				seen := receive(t, server.from)
				flushConntrack(t, p.ns)
				if err := hears(conn, to, func() { server.conn.WriteToUDPAddrPort([]byte("late"), seen) }); err != nil {
					t.Errorf("%s, %s, seen as %v: %v", c.name, f.name, seen, err)
				}
				// And the mapping still is one.
				if err := hears(conn, to, func() {
					conn.WriteToUDPAddrPort([]byte("again"), to)
					server.conn.WriteToUDPAddrPort([]byte("answer"), receive(t, server.from))
				}); err != nil {
					t.Errorf("%s, %s, after that: %v", c.name, f.name, err)
				}
			}
		}
	})
}

// TestPublishUDPUnasked: what a published guest port sends to somebody without a mapping
// leaves by the published port.
func TestPublishUDPUnasked(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		for _, f := range families {
			inside := newCue(t, p.bridge.containers[1], at(container(f), 88))
			engine := newCue(t, p.ns, at(f.guest, 89))
			p.engine.publish(t, fmt.Sprintf("%s:18088:%s:88/udp", inBrackets(hostOf(f)), inBrackets(container(f))),
				fmt.Sprintf("%s:18089:89/udp", inBrackets(anyOf(f))))
			for port, server := range map[uint16]*cue{18088: inside, 18089: engine} {
				conn, err := p.net.World.ListenUDP(at(f.world, 0))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				to := conn.LocalAddr().(*net.UDPAddr).AddrPort()
				if err := hears(conn, netip.AddrPortFrom(hostOf(f), port), func() { server.conn.WriteToUDPAddrPort([]byte("unasked"), to) }); err != nil {
					t.Errorf("port %d, %s: %v", port, f.name, err)
				}
			}
		}
	})
}

// TestPublishUDPShortMemory: a namespace whose conntrack forgets after two seconds has
// mappings that last no longer, and answers after that come from the published port.
func TestPublishUDPShortMemory(t *testing.T) {
	needPublish(t)
	var wg sync.WaitGroup
	for _, path := range []string{"netstack", "kernel"} {
		n := newTopology(t)
		a := newAttachable(t, n)
		for _, name := range []string{"udp_timeout", "udp_timeout_stream"} {
			if err := a.Sysctl("net.netfilter.nf_conntrack_"+name, "2"); err != nil {
				missing(t, "settings of conntrack: %v", err)
			}
		}
		e := a.attach(t, "--path", path)
		server := newCue(t, a.NS, at(topo.Guest4, 89))
		e.publish(t, "18089:89/udp")
		wg.Go(func() { t.Run(path, func(t *testing.T) { answerLate(t, n, e, server) }) })
	}
	wg.Wait()
}

// answerLate answers when the mapping is gone.
func answerLate(t *testing.T, n *topo.Topology, e *engine, server *cue) {
	conn, err := n.World.ListenUDP(at(topo.World4, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	to := netip.AddrPortFrom(topo.Host4, 18089)
	conn.WriteToUDPAddrPort([]byte("ask"), to)
	seen := receive(t, server.from)
	mapped := func() bool {
		return slices.ContainsFunc(readFlows(t, e), func(f flowDoc) bool { return f.Proto == "udp" && f.Target == seen })
	}
	if !mapped() {
		t.Error("the mapping is not listed")
	}
	if !eventually(30*time.Second, func() bool { return !mapped() }) {
		t.Error("the mapping lives longer than the guest's conntrack")
	}
	if err := hears(conn, to, func() { server.conn.WriteToUDPAddrPort([]byte("late"), seen) }); err != nil {
		t.Errorf("a late answer: %v", err)
	}
}

// TestLongPublishUDPIdle: a mapping is gone 90 s after its last datagram, not before, and
// the client goes on all the same.
func TestLongPublishUDPIdle(t *testing.T) {
	long(t)
	needPublish(t)
	var wg sync.WaitGroup
	for _, g := range allGuests(t) {
		if g.engine == nil {
			continue
		}
		tellSource(t, g.ns, enginePort)
		g.engine.publish(t, "18081:81/udp")
		wg.Go(func() { g.idleMapping(t) })
	}
	wg.Wait()
}

func (g *guest) idleMapping(t *testing.T) {
	conn, err := g.net.World.ListenUDP(at(topo.World4, 0))
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	to := netip.AddrPortFrom(topo.Host4, 18081)
	listed := func() bool {
		return slices.ContainsFunc(readFlows(t, g.engine), func(f flowDoc) bool { return f.Proto == "udp" && f.Guest.Port() == enginePort })
	}
	s, err := seenByUDP(conn, to)
	begin := time.Now()
	if err != nil || s.seen != s.own || !listed() {
		t.Errorf("%s: seen as %v, own %v, %v, listed %v", g.kind.name, s.seen, s.own, err, listed())
		return
	}
	if !eventually(150*time.Second, func() bool { time.Sleep(500 * time.Millisecond); return !listed() }) {
		t.Errorf("%s: the mapping is still there after 150 s", g.kind.name)
	}
	if lasted := time.Since(begin); lasted < 85*time.Second {
		t.Errorf("%s: the mapping lasted %v", g.kind.name, lasted)
	}
	if s, err := seenByUDP(conn, to); err != nil || s.seen != s.own {
		t.Errorf("%s: after that: seen as %v, own %v, %v", g.kind.name, s.seen, s.own, err)
	}
}
