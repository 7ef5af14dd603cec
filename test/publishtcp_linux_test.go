package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// What a client of a published TCP port sees beside the happy path, and every reason for
// the gateway as the source.

// TestPublishRefused: where the guest refuses or is silent, the client is reset.
func TestPublishRefused(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		tables := p.bridge.tables
		if err := tables.load(p.ns, "filter -I INPUT -p tcp --dport 84 -j DROP", "filter -I INPUT -p tcp --dport 85 -j REJECT"); err != nil {
			t.Fatal(err)
		}
		p.engine.publish(t, "18083-18085:83-85", "18086:172.17.0.3:83")
		var wg sync.WaitGroup
		for _, f := range families {
			loopback, _, other := clientsOf(p.net, f)
			for _, c := range []client{loopback, other} {
				for _, port := range []uint16{18083, 18084, 18085, 18086} {
					to := hostOf(f)
					if c.from.IsLoopback() {
						to = c.from
					}
					wg.Go(func() {
						// Silence takes the engine's patience, 10 s.
						if _, err := c.ask("tcp", netip.AddrPortFrom(to, port)); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
							t.Errorf("port %d, from %s, %s: %v, expected a reset", port, c.name, f.name, err)
						}
					})
				}
			}
		}
		wg.Wait()
		var port portDoc
		if !eventually(10*time.Second, func() bool { port = portAt(t, p.engine, 18083); return port.Counters.Refused >= 4 }) {
			t.Errorf("counters of a port whose clients are refused: %+v", port.Counters)
		}
	})
}

// TestPublishStreams: bytes, half close and resets pass both ways.
func TestPublishStreams(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		server := p.bridge.containers[1]
		transferServerAt(t, server, "[::]:90")
		heard := make(chan string, 16)
		serve(t, server, "[::]:91", func(c *net.TCPConn) {
			defer c.Close()
			all, _ := io.ReadAll(c) // ends with the client's FIN
			fmt.Fprintf(c, "got %s", all)
		})
		serve(t, server, "[::]:92", func(c *net.TCPConn) {
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			b := make([]byte, 1)
			io.ReadFull(c, b)
			if b[0] == 'r' {
				c.SetLinger(0)
				c.Close()
				return
			}
			defer c.Close()
			_, err := io.Copy(io.Discard, c)
			heard <- fmt.Sprint(errors.Is(err, syscall.ECONNRESET))
		})
		var rules, specs []string
		for i := range 3 {
			rules = append(rules, dockerPort(18090+i, 90+i)...)
			specs = append(specs, fmt.Sprintf("%d:%d", 18090+i, 18090+i))
		}
		if err := p.bridge.tables.load(p.ns, rules...); err != nil {
			t.Fatal(err)
		}
		p.engine.publish(t, specs...)
		for _, f := range families {
			loopback, _, other := clientsOf(p.net, f)
			for _, c := range []client{loopback, other} {
				to := hostOf(f)
				if c.from.IsLoopback() {
					to = c.from
				}
				address := func(port int) *net.TCPAddr { return &net.TCPAddr{IP: to.AsSlice(), Port: port} }
				for _, size := range [][2]int{{1, 1}, {1 << 20, 0}, {0, 1 << 20}, {8 << 20, 8 << 20}} {
					if err := transfer(c.ns, address(18090).String(), size[0], size[1]); err != nil {
						t.Errorf("from %s, %s, %d bytes up, %d down: %v", c.name, f.name, size[0], size[1], err)
					}
				}
				conn := dial(t, c.ns, address(18091))
				conn.Write([]byte("question"))
				conn.CloseWrite()
				expectAll(t, conn, "got question")
				conn = dial(t, c.ns, address(18092))
				conn.Write([]byte("r"))
				expectReset(t, conn)
				conn = dial(t, c.ns, address(18092))
				conn.Write([]byte("x"))
				conn.SetLinger(0)
				conn.Close()
				if s := receive(t, heard); s != "true" {
					t.Errorf("from %s, %s: the guest did not see the client's reset", c.name, f.name)
				}
			}
		}
	})
}

// TestPublishWithdrawn: a port that is withdrawn takes no clients any more, and those that
// are there go on.
func TestPublishWithdrawn(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		p.engine.publish(t, "18081:81")
		var conns []*net.TCPConn
		for _, f := range families {
			for _, to := range []netip.Addr{loopbackOf(f), hostOf(f)} {
				c := dial(t, p.net.Host, &net.TCPAddr{IP: to.AsSlice(), Port: 18081})
				if _, err := seenBy(c); err != nil {
					t.Fatal(err)
				}
				conns = append(conns, c)
			}
		}
		p.engine.withdraw(t, "18081:81")
		expectListeners(t, p.net, "withdrawn")
		if s := dialError(p.net.Host, "127.0.0.1:18081", 5*time.Second); s != refused {
			t.Errorf("a client of a withdrawn port: %s", s)
		}
		for _, c := range conns {
			roundTrip(t, c)
		}
		// With connections left over the port can be published again.
		p.engine.publish(t, "18081:81")
		for _, c := range conns {
			roundTrip(t, c)
		}
	})
}

// TestPublishFallback: every reason of docs/publish.md for the gateway as the source, each
// counted.
func TestPublishFallback(t *testing.T) {
	for _, k := range kinds {
		if !k.native && !k.rootless {
			t.Run(k.name, func(t *testing.T) { testPublishFallback(t, newPublishable(t, k, engineOptions{})) })
		}
	}
}

func testPublishFallback(t *testing.T, p *publishable) {
	n, v4, v6 := p.net, families[0], families[1]
	if err := p.bridge.tables.load(p.ns, dockerPort(18080, containerPort)...); err != nil {
		t.Fatal(err)
	}
	// As dockerd does for a container without IPv6.
	for _, proto := range []string{"tcp", "udp"} {
		for _, host := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			p.engine.dockerProxy(t, proto, netip.AddrPortFrom(host, 18080), netip.AddrPortFrom(container(v4), containerPort)).mustServe(t)
		}
	}
	p.engine.publish(t, "18081:81", "18081:81/udp")
	strange := map[string]netip.Addr{"an address of the guest's bridge": netip.MustParseAddr("172.17.9.9"), "the guest's own address": topo.Guest4}
	for _, a := range strange {
		if err := errors.Join(n.World.IP(fmt.Sprintf("addr add %v/32 dev world0", a)), n.Router.IP(fmt.Sprintf("route add %v dev rtr1", a))); err != nil {
			t.Fatal(err)
		}
	}
	for _, proto := range []string{"tcp", "udp"} {
		expect := func(name string, s sighting, err error, f family) {
			t.Helper()
			if problem := s.differs("gateway", f); err != nil || problem != "" {
				t.Errorf("%s, %s: %s %v", name, proto, problem, err)
			}
		}
		s, err := client{ns: n.World, from: v6.world}.ask(proto, netip.AddrPortFrom(topo.Host6, 18080))
		expect("an IPv6 client of an IPv4 container", s, err, v4)
		s, err = client{ns: n.Router, from: linkLocal(t, n.Router, "rtr0")}.ask(proto, zoned(t, linkLocal(t, n.Host, "host0"), n.Router, "rtr0", 18081))
		expect("a link-local client", s, err, v6)
		for name, a := range strange {
			s, err = client{ns: n.World, from: a}.ask(proto, netip.AddrPortFrom(topo.Host4, 18081))
			expect(name, s, err, v4)
		}
	}
	for port, least := range map[int]int{18081: 3} {
		for _, d := range readPorts(t, p.engine) {
			if d.Spec.ParentPort == port && d.Counters.Gateway < least {
				t.Errorf("gateway counts %d on %d/%s, expected %d or more", d.Counters.Gateway, port, d.Spec.Proto, least)
			}
		}
	}
	p.sameClientPort(t)
}

// TestPublishDialLimit: clients of a port that does not answer take no more than their part of
// the dials.
func TestPublishDialLimit(t *testing.T) {
	needPublish(t)
	for _, k := range kinds {
		if k.native || k.rootless {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			n := newTopology(t)
			e := startUp(t, n, k.user, "limits.dials = 6\npath = \""+k.path+"\"\n")
			tellSource(t, e.guest, enginePort)
			if err := (iptables("nft")).load(e.guest, "filter -I INPUT -p tcp --dport 84 -j DROP"); err != nil {
				t.Fatal(err)
			}
			e.publish(t, "18081:81", "18084:84")
			for _, f := range families {
				_, _, other := clientsOf(n, f)
				for range 10 {
					c, err := n.World.DialFrom("tcp", at(other.from, 0), at(hostOf(f), 18084))
					if err == nil {
						t.Cleanup(func() { c.Close() })
					} else if !errors.Is(err, syscall.ECONNRESET) { // those beyond the limit
						t.Fatal(err)
					}
				}
				if s, err := other.ask("tcp", netip.AddrPortFrom(hostOf(f), 18081)); err != nil || s.seen != s.own {
					t.Errorf("%s: beside a port that does not answer, seen as %v: %v", f.name, s.seen, err)
				}
			}
			var p portDoc
			if !eventually(10*time.Second, func() bool { p = portAt(t, e, 18084); return p.Counters.Refused > 0 }) {
				t.Errorf("nobody was refused at the limit: %+v", p.Counters)
			}
		})
	}
}

// TestPublishWithin: where the guest's rules know nothing of the gateway within, clients of the
// host's loopback come by the device.
func TestPublishWithin(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		if err := p.bridge.tables.load(p.ns, "filter -I INPUT -i lo -p tcp --dport 81 -j DROP"); err != nil {
			t.Fatal(err)
		}
		p.engine.publish(t, "18081:81")
		var wg sync.WaitGroup
		for _, f := range families {
			loopback, _, _ := clientsOf(p.net, f)
			wg.Go(func() {
				begin := time.Now()
				s, err := loopback.ask("tcp", netip.AddrPortFrom(loopback.from, 18081))
				if problem := s.differs("gateway", f); err != nil || problem != "" || time.Since(begin) > 8*time.Second {
					t.Errorf("%s, after %v: %s %v", f.name, time.Since(begin), problem, err)
				}
			})
		}
		wg.Wait()
	})
}

// TestPublishOtherFamily: a server of one family serves the clients of both, as the gateway,
// but for those whom the guest's firewall refuses.
func TestPublishOtherFamily(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		const guarded = 88
		for i, f := range families {
			tellSourceAt(t, p.ns, netip.AddrPortFrom(anyOf(f), uint16(86+i)))
		}
		tellSource(t, p.ns, guarded)
		if _, err := p.ns.Run("", p.bridge.tables.command(families[0]), "-I", "INPUT", "-p", "tcp", "--dport", fmt.Sprint(guarded), "-j", "REJECT"); err != nil {
			t.Fatal(err)
		}
		p.engine.publish(t, "18086-18088:86-88", "18086-18087:86-87/udp")
		for i, server := range families {
			f, port := families[1-i], 18086+i
			loopback, own, other := clientsOf(p.net, f)
			for _, c := range []client{loopback, own, other} {
				to := hostOf(f)
				if c.from.IsLoopback() {
					to = c.from
				}
				for _, proto := range []string{"tcp", "udp"} {
					s, err := c.ask(proto, netip.AddrPortFrom(to, uint16(port)))
					if problem := s.differs("gateway", server); err != nil || problem != "" {
						t.Errorf("a server of %s, asked over %s in %s, from %s: %s %v", server.name, proto, f.name, c.name, problem, err)
					}
				}
			}
			for _, d := range readPorts(t, p.engine) {
				if d.Spec.ParentPort == port && (d.Counters.Gateway != 2 || d.Counters.Refused != 0) {
					t.Errorf("counters of %d/%s: %+v", port, d.Spec.Proto, d.Counters)
				}
			}
			conn := dial(t, p.net.World, &net.TCPAddr{IP: hostOf(f).AsSlice(), Port: port})
			s, err := seenBy(conn)
			if err != nil {
				t.Fatal(err)
			}
			var flows []flowDoc
			if !eventually(10*time.Second, func() bool {
				flows = readFlows(t, p.engine)
				return slices.ContainsFunc(flows, func(d flowDoc) bool { return d.Target == s.own && strings.Contains(d.Reason, "other family") })
			}) {
				t.Errorf("flows does not say why the client is seen as the gateway: %+v", flows)
			}
		}
		_, _, other := clientsOf(p.net, families[0])
		if s, err := other.ask("tcp", netip.AddrPortFrom(topo.Host4, 18088)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a client that the firewall refuses is seen as %v: %v, expected a reset", s.seen, err)
		}
		_, _, other = clientsOf(p.net, families[1])
		if s, err := other.ask("tcp", netip.AddrPortFrom(topo.Host6, 18088)); err != nil || s.seen != s.own {
			t.Errorf("a client that it lets in is %v, seen as %v: %v", s.own, s.seen, err)
		}
	})
}

// linkLocal returns an interface's link-local address, with the number of the interface
// as the zone.
func linkLocal(t testing.TB, ns *topo.NS, dev string) (a netip.Addr) {
	t.Helper()
	err := ns.Do(func() error {
		ifi, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		all, err := ifi.Addrs()
		for _, one := range all {
			if p, err := netip.ParsePrefix(one.String()); err == nil && p.Addr().IsLinkLocalUnicast() {
				a = p.Addr().WithZone(fmt.Sprint(ifi.Index))
			}
		}
		return err
	})
	if err != nil || !a.IsValid() {
		t.Fatalf("no link-local address of %s: %v", dev, err)
	}
	return a
}

// zoned is an address as seen over the device dev of ns.
func zoned(t testing.TB, a netip.Addr, ns *topo.NS, dev string, port uint16) netip.AddrPort {
	t.Helper()
	return netip.AddrPortFrom(a.WithZone(linkLocal(t, ns, dev).Zone()), port)
}

// sameClientPort has one client use one port towards two addresses of the host: inside
// that is one and the same connection.
func (p *publishable) sameClientPort(t *testing.T) {
	second := netip.MustParseAddr("198.51.100.3")
	if err := p.net.Host.IP(fmt.Sprintf("addr add %v/24 dev host0", second)); err != nil {
		t.Fatal(err)
	}
	again := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: topo.World4.AsSlice(), Port: 23456},
		Control: func(_, _ string, c syscall.RawConn) (err error) {
			c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
			return err
		}}
	for i, to := range []netip.Addr{topo.Host4, second} {
		var conn net.Conn
		err := p.net.World.Do(func() (err error) {
			conn, err = again.Dial("tcp4", at(to, 18081))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		s, err := seenBy(conn)
		if problem := s.differs([]string{"client", "gateway"}[i], families[0]); err != nil || problem != "" {
			t.Errorf("a client's port towards %v: %s %v", to, problem, err)
		}
		var flows []flowDoc
		if !eventually(10*time.Second, func() bool {
			flows = readFlows(t, p.engine)
			return slices.ContainsFunc(flows, func(f flowDoc) bool {
				return f.Proto == "tcp" && f.Target == s.own && (f.Reason != "") == (i == 1)
			})
		}) {
			t.Errorf("flows does not say why a client is seen as the gateway: %+v", flows)
		}
	}
	// UDP knows who was asked.
	conn, err := p.net.World.ListenUDP(at(topo.World4, 23456))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 2 {
		for i, to := range []netip.Addr{topo.Host4, second} {
			s, err := seenByUDP(conn, netip.AddrPortFrom(to, 18081))
			if problem := s.differs([]string{"client", "gateway"}[i], families[0]); err != nil || problem != "" {
				t.Errorf("a client's UDP port towards %v: %s %v", to, problem, err)
			}
		}
	}
}

// TestPublishSourceGateway: with source_ip = "gateway" everybody is it; a port may say
// otherwise, and the PROXY protocol names the client all the same.
func TestPublishSourceGateway(t *testing.T) {
	needPublish(t)
	for _, k := range kinds {
		if k.native || k.rootless {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			n := newTopology(t)
			e := startUp(t, n, k.user, "source_ip = \"gateway\"\npath = \""+k.path+"\"\n")
			tellSource(t, e.guest, enginePort)
			serve(t, e.guest, "[::]:83", func(c *net.TCPConn) {
				defer c.Close()
				head, err := readProxyHeader(c)
				fmt.Fprintf(c, "%v %v %v\n", head, err, unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort()).Addr())
			})
			e.publish(t, "18081:81", "18081:81/udp")
			e.publish(t, "--source-ip", "preserve", "18082:81", "18082:81/udp")
			e.publish(t, "--proxy-protocol", "18083:83")
			for _, f := range families {
				loopback, own, other := clientsOf(n, f)
				for _, c := range []client{loopback, own, other} {
					to := hostOf(f)
					if c.from.IsLoopback() {
						to = c.from
					}
					for _, proto := range []string{"tcp", "udp"} {
						for port, want := range map[uint16]string{18081: "gateway", 18082: "client"} {
							if c.from.IsLoopback() {
								want = "gateway"
							}
							s, err := c.ask(proto, netip.AddrPortFrom(to, port))
							if problem := s.differs(want, f); err != nil || problem != "" {
								t.Errorf("%s, from %s, %s, port %d: %s %v", proto, c.name, f.name, port, problem, err)
							}
						}
					}
					c.expectProxyHeader(t, netip.AddrPortFrom(to, 18083), f)
				}
			}
		})
	}
}

// expectProxyHeader asks a port whose server says what header it got.
func (c client) expectProxyHeader(t testing.TB, to netip.AddrPort, f family) {
	t.Helper()
	conn, err := c.ns.DialFrom("tcp", at(c.from, 0), to.String())
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	all, err := io.ReadAll(conn)
	want := fmt.Sprintf("%v>%v <nil> %v\n", unmap(conn.LocalAddr().(*net.TCPAddr).AddrPort()), to, f.gateway)
	if err != nil || string(all) != want {
		t.Errorf("PROXY protocol, from %s, %s: %q, %v, expected %q", c.name, f.name, all, err, want)
	}
}

// readProxyHeader reads a header of the PROXY protocol, version 2, and returns "from>to".
func readProxyHeader(r io.Reader) (string, error) {
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return "", err
	}
	if !bytes.Equal(head[:12], []byte("\r\n\r\n\x00\r\nQUIT\n")) || head[12] != 0x21 {
		return "", fmt.Errorf("no header of version 2: %q", head)
	}
	rest := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, rest); err != nil {
		return "", err
	}
	size := map[byte]int{0x11: 4, 0x21: 16}[head[13]]
	if size == 0 || len(rest) < 2*size+4 {
		return "", fmt.Errorf("family %#x, %d bytes", head[13], len(rest))
	}
	end := func(i int) netip.AddrPort {
		a, _ := netip.AddrFromSlice(rest[i*size : (i+1)*size])
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(rest[2*size+2*i:]))
	}
	return fmt.Sprintf("%v>%v", end(0), end(1)), nil
}

// TestPublishFlows: a client of a published port is a flow, on the path it takes.
func TestPublishFlows(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		p.engine.publish(t, "18081:81")
		var clients []netip.AddrPort
		for _, to := range []netip.Addr{loopbackOf(families[0]), topo.Host4} {
			c := dial(t, p.net.Host, &net.TCPAddr{IP: to.AsSlice(), Port: 18081})
			s, err := seenBy(c)
			if err != nil {
				t.Fatal(err)
			}
			clients = append(clients, s.own)
		}
		var all []flowDoc
		if !eventually(10*time.Second, func() bool {
			all = readFlows(t, p.engine)
			var loopback, other bool
			for _, f := range all {
				at := f.Guest == netip.AddrPortFrom(topo.Guest4, enginePort) && f.Decision == "published"
				loopback = loopback || at && f.Target == clients[0] && f.Path == p.kind.path
				other = other || at && f.Target == clients[1] && f.Path == p.kind.path
			}
			return loopback && other
		}) {
			t.Errorf("flows lists %v, expected %v on %s", all, clients, p.kind.path)
		}
		if r := p.engine.call(t, "flows", p.engine.name); r.code != 0 || !strings.Contains(r.stdout, clients[0].String()) {
			t.Errorf("flows: status %d: %s%s", r.code, r.stdout, r.stderr)
		}
	})
}

// TestPublishNoDescriptors: a daemon that cannot accept any more waits, wastes no time,
// and goes on when it can.
func TestPublishNoDescriptors(t *testing.T) {
	needPublish(t, "prlimit")
	const limit = 400
	script := fmt.Sprintf("#!/bin/sh\nexec prlimit --nofile=%[1]d:%[1]d %[2]s \"$@\"\n", limit, os.Getenv(envBin))
	bin := filepath.Join(runTmp, "slipway-few-files")
	if err := os.WriteFile(bin, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(bin)
	t.Setenv(envBin, bin)
	for _, k := range kinds {
		if k.native || !k.rootless {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			p := newPublishable(t, k, engineOptions{})
			if n := fileLimit(t, p.engine.cmd.Process.Pid); n != limit {
				missing(t, "a user who may not raise a limit: it is %d", n)
			}
			p.engine.publish(t, "18081:81")
			p.exhaust(t, limit)
		})
	}
}

// exhaust holds connections until there are no descriptors left.
func (p *publishable) exhaust(t *testing.T, limit int) {
	var conns []net.Conn
	closeAll := func() {
		for _, c := range conns {
			c.Close()
		}
		conns = nil
	}
	defer closeAll()
	for lost := 0; lost < 3 && len(conns) < limit; {
		c, err := p.net.Host.Dial("tcp", "127.0.0.1:18081", 10*time.Second)
		if err != nil {
			lost++
			continue
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		if n, err := c.Read(make([]byte, 64)); n == 0 && err != nil {
			lost++
			c.Close()
			continue
		}
		conns = append(conns, c)
	}
	if n := len(conns); n < limit/8 || n >= limit {
		t.Errorf("%d clients with %d descriptors", n, limit)
	}
	t.Logf("%d clients with %d descriptors", len(conns), limit)
	// Somebody knocks meanwhile.
	knock, err := p.net.Host.Dial("tcp", "127.0.0.1:18081", 10*time.Second)
	if err == nil {
		defer knock.Close()
	}
	expectIdle(t, p.engine.cmd.Process.Pid)
	for _, c := range conns {
		roundTrip(t, c)
	}
	closeAll()
	if !eventually(30*time.Second, func() bool {
		_, err := client{ns: p.net.Host, from: loopbackOf(families[0])}.ask("tcp", netip.MustParseAddrPort("127.0.0.1:18081"))
		return err == nil
	}) {
		t.Error("no client is served 30 s after others ended")
	}
}
