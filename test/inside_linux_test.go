package test

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// What is not for the world stays in the guest's namespace: slipway neither sees nor
// takes it.

// TestStaysInside talks to everybody inside, and to groups: none of it is a flow.
func TestStaysInside(t *testing.T) {
	for _, k := range kinds {
		if k.native || k.rootless {
			continue
		}
		for _, filter := range []string{"0", "1"} {
			if filter == "0" && !k.kernel() {
				continue
			}
			t.Run(k.name+", br_netfilter "+filter, func(t *testing.T) {
				need(t, "ip", "nft")
				g := newGuest(t, newTopology(t), k, engineOptions{})
				b := newBridge(t, g, "nft")
				bridgeFilter(t, g.ns, filter)
				r := &fwRun{g: g, b: b, tables: "nft", held: make(map[string]net.Conn)}
				t.Cleanup(r.close)
				testStaysInside(t, r)
			})
		}
	}
}

// bridgeFilter sets whether bridged packets pass iptables, where the kernel has that.
func bridgeFilter(t testing.TB, ns *topo.NS, on string) {
	t.Helper()
	for _, name := range []string{"net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"} {
		if err := ns.Sysctl(name, on); err != nil {
			t.Logf("%s: %v", name, err)
		}
	}
}

func testStaysInside(t *testing.T, r *fwRun) {
	for _, ns := range []*topo.NS{r.g.net.World, r.g.ns, r.b.containers[0], r.b.containers[1]} {
		serveName(t, ns, fwPort)
	}
	// What dockerd does for a published port.
	if err := r.tables.load(r.g.ns, "nat -A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER",
		"nat -A DOCKER ! -i docker0 -p tcp --dport 9000 -j DNAT --to-destination [{second}]:"+strconv.Itoa(fwPort),
		"filter -A DOCKER -d {second} ! -i docker0 -p tcp --dport "+strconv.Itoa(fwPort)+" -j ACCEPT"); err != nil {
		t.Fatal(err)
	}
	for _, p := range r.b.places() {
		for _, f := range families {
			for _, a := range insideAddresses(f, p) {
				c, name, err := greet(p.ns, at(a.Addr(), int(a.Port())), fwAnswer)
				if err != nil {
					t.Errorf("from %s to %v: %v", p.name, a, err)
					continue
				}
				defer c.Close()
				if name == "world" {
					t.Errorf("from %s to %v: it reached %s", p.name, a, name)
				}
			}
			for _, group := range groups(f) {
				if err := sendTo(p.ns, group); err != nil {
					t.Logf("from %s to %v: %v", p.name, group, err)
				}
			}
		}
	}
	// A connection to world shows that the listing is not empty for other reasons.
	if err := r.hold([]fwCase{{name: "world"}}); err != nil {
		t.Fatal(err)
	}
	for _, f := range readFlows(t, r.g.engine) {
		if a := f.Target.Addr(); a != topo.World4 && a != topo.World6 {
			t.Errorf("a flow to %v", f)
		}
	}
	if now := r.g.pathsOf(t); now != r.g.kind.path {
		t.Errorf("connections take %q", now)
	}
}

// insideAddresses are listeners in the guest, as somebody at p reaches them.
func insideAddresses(f family, p place) []netip.AddrPort {
	first4, first6 := topo.ContainerAddr(1)
	second4, second6 := topo.ContainerAddr(2)
	own, first, second, bridge := netip.MustParseAddr("127.0.0.1"), first4, second4, topo.Bridge4
	if f.v6 {
		own, first, second, bridge = netip.IPv6Loopback(), first6, second6, topo.Bridge6
	}
	var all []netip.AddrPort
	if p.name == "namespace" { // the rule is not for what comes from the bridge itself
		all = append(all, netip.AddrPortFrom(f.guest, 9000))
	}
	for _, a := range []netip.Addr{own, first, second, bridge, f.guest} {
		all = append(all, netip.AddrPortFrom(a, fwPort))
	}
	return all
}

// groups are multicast and broadcast addresses.
func groups(f family) []string {
	if f.v6 {
		return []string{"[ff02::fb]:5353", "[ff05::c]:1900"}
	}
	return []string{"224.0.0.251:5353", "239.255.255.250:1900", "255.255.255.255:67", "172.17.255.255:137"}
}

// sendTo sends a datagram to a group.
func sendTo(ns *topo.NS, group string) error {
	to, err := net.ResolveUDPAddr("udp", group)
	if err != nil {
		return err
	}
	return ns.Do(func() error {
		c, err := net.ListenUDP("udp", nil)
		if err != nil {
			return err
		}
		defer c.Close()
		raw, err := c.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1) })
		}
		_, serr := c.WriteTo([]byte("anybody?"), to)
		return errors.Join(err, serr)
	})
}

// TestOwnListener: whoever dials what slipway listens on inside is refused, with our
// mark on the packets, too.
func TestOwnListener(t *testing.T) {
	for _, k := range kinds {
		if !k.kernel() {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			need(t, "ip", "nft", "ss")
			g := newGuest(t, newTopology(t), k, engineOptions{})
			b := newBridge(t, g, "nft")
			listeners := listening(t, g)
			if len(listeners) < 2 {
				t.Fatalf("slipway listens only on %v", listeners)
			}
			for _, l := range listeners {
				for _, p := range b.places() {
					if s := dialError(p.ns, l.String(), fwAnswer); s != refused {
						t.Errorf("%v from %s: %s", l, p.name, s)
					}
				}
				if s := dialMarked(g.ns, l); s == goesOn {
					t.Errorf("%v with the mark is served", l)
				}
			}
			address := transferServer(t, g.net.World, families[0])
			for _, p := range b.places() {
				if err := transfer(p.ns, address, 1000, 1000); err != nil {
					t.Errorf("afterwards, from %s: %v", p.name, err)
				}
			}
		})
	}
}

// listening are the TCP listeners in the guest, which are all slipway's.
func listening(t testing.TB, g *guest) (all []netip.AddrPort) {
	t.Helper()
	out, err := g.ns.Run("", "ss", "-ltnH")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out) {
		if fields := strings.Fields(line); len(fields) > 3 {
			a, err := netip.ParseAddrPort(fields[3])
			if err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			all = append(all, a)
		}
	}
	return all
}

// ourMark is the bit that keeps packets inside (docs/paths.md).
const ourMark = 0x1000

// dialMarked connects with the mark, which routes the SYN to the namespace itself, and
// waits for what comes.
func dialMarked(ns *topo.NS, to netip.AddrPort) string {
	d := net.Dialer{Timeout: fwPatience / 5, Control: func(_, _ string, raw syscall.RawConn) (err error) {
		cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ourMark) })
		return errors.Join(err, cerr)
	}}
	err := ns.Do(func() error {
		c, err := d.Dial("tcp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		return exchange(c, fwPatience/2)
	})
	if err != nil {
		return inWords(err)
	}
	return goesOn
}

// fwSetting is how a namespace is when slipway is attached to it.
type fwSetting struct {
	name         string
	sysctls      map[string]string
	bridgeFilter string
	tables       iptables
	path         string
}

var fwSettings = []fwSetting{
	{"as it is", nil, "1", "nft", "kernel"},
	{"legacy rules, bridges not filtered", nil, "0", "legacy", "kernel"},
	{"strict reverse path", map[string]string{"net.ipv4.conf.all.rp_filter": "1"}, "1", "nft", "kernel"},
	{"loose reverse path", map[string]string{"net.ipv4.conf.all.rp_filter": "2"}, "1", "legacy", "kernel"},
	{"strict reverse path", map[string]string{"net.ipv4.conf.all.rp_filter": "1"}, "1", "nft", "netstack"},
}

// TestRulesBeforeStart: the cases of TestFirewall where rules, containers and settings
// are there before slipway.
func TestRulesBeforeStart(t *testing.T) {
	runs := make([]*fwRun, len(fwSettings))
	for i, s := range fwSettings {
		runs[i] = attached(t, s)
	}
	said := make([]map[string]string, len(runs))
	var wg sync.WaitGroup
	for i, r := range runs {
		wg.Go(func() { said[i] = r.probeAll(r.cases) })
	}
	wg.Wait()
	for i, s := range fwSettings {
		t.Run(s.name+", "+s.path, func(t *testing.T) {
			r := runs[i]
			differ(t, "a new connection", said[i], nil, expect(r.cases, fwCase.fresh))
			if err := r.hold(r.cases[:1]); err != nil {
				t.Fatal(err)
			}
			if now := r.g.pathsOf(t); now != s.path {
				t.Errorf("connections take %q", now)
			}
			for _, later := range []string{"1", "2"} {
				if err := r.g.ns.Sysctl("net.ipv4.conf.all.rp_filter", later); err != nil {
					t.Fatal(err)
				}
				all := make(map[string]string)
				for name := range r.held {
					all[name] = goesOn
				}
				for name, now := range r.exchangeAll(all) {
					if now != goesOn {
						t.Errorf("rp_filter %s was set, %s: %s", later, name, now)
					}
				}
				differ(t, "rp_filter "+later+" was set", r.probeAll(r.cases[:1]), nil, expect(r.cases[:1], fwCase.fresh))
			}
		})
	}
}

// attached makes a namespace with containers and the rules of all cases, and attaches
// slipway to it.
func attached(t *testing.T, s fwSetting) *fwRun {
	t.Helper()
	need(t, "ip", "nft", "nsenter")
	a := newAttachable(t, newTopology(t))
	for name, value := range s.sysctls {
		if err := a.Sysctl(name, value); err != nil {
			t.Fatal(err)
		}
	}
	g := &guest{net: a.net, ns: a.NS, kind: kind{name: s.name, path: s.path}}
	r := newFWRun(t, g, s.tables)
	bridgeFilter(t, g.ns, s.bridgeFilter)
	if err := s.tables.load(g.ns, r.rules()...); err != nil {
		t.Fatal(err)
	}
	g.engine = a.attach(t, "--path", s.path)
	return r
}
