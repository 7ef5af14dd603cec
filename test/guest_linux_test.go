package test

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// guest is a place to speak from: a namespace behind slipway, or the native
// measure of all things. One suite runs over every kind.
type guest struct {
	net    *topo.Topology
	ns     *topo.NS
	kind   kind
	engine *engine // nil for native
}

// kind is a way for a guest's traffic to reach the world.
type kind struct {
	name string
	user
	native bool
	path   string // of slipway's --path
}

// kernel tells whether the guest's own kernel ends its connections.
func (k kind) kernel() bool { return k.path == "kernel" }

// kinds are all of them. A new path adds its rows here and has every test.
var kinds = []kind{
	{name: "native", native: true},
	{name: "netstack", path: "netstack"},
	{name: "netstack-rootless", user: user{rootless: true}, path: "netstack"},
	{name: "kernel", path: "kernel"},
	{name: "kernel-rootless", user: user{rootless: true}, path: "kernel"},
}

// eachGuest runs the suite once for every kind, on a fresh topology each.
func eachGuest(t *testing.T, suite func(t *testing.T, g *guest)) {
	t.Helper()
	need(t, "ip", "nft")
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) { suite(t, newGuest(t, newTopology(t), k, engineOptions{})) })
	}
}

// eachEngine is eachGuest without native, for what only slipway does.
func eachEngine(t *testing.T, suite func(t *testing.T, g *guest)) {
	t.Helper()
	need(t, "ip", "nft")
	for _, k := range kinds {
		if !k.native {
			t.Run(k.name, func(t *testing.T) { suite(t, newGuest(t, newTopology(t), k, engineOptions{})) })
		}
	}
}

// allGuests starts a guest of every kind, each on a topology of its own: for suites that
// mostly wait, and ask all of them at the same time.
func allGuests(t *testing.T) []*guest {
	t.Helper()
	need(t, "ip", "nft")
	var all []*guest
	for _, k := range kinds {
		all = append(all, newGuest(t, newTopology(t), k, engineOptions{}))
	}
	return all
}

// eachGuestAtOnce is eachGuest for such suites.
func eachGuestAtOnce(t *testing.T, suite func(t *testing.T, g *guest)) {
	t.Helper()
	together(t, allGuests(t), suite)
}

// eachEngineAtOnce is eachEngine for such suites.
func eachEngineAtOnce(t *testing.T, suite func(t *testing.T, g *guest)) {
	t.Helper()
	together(t, slices.DeleteFunc(allGuests(t), func(g *guest) bool { return g.kind.native }), suite)
}

func together(t *testing.T, guests []*guest, suite func(t *testing.T, g *guest)) {
	var wg sync.WaitGroup
	for _, g := range guests {
		wg.Go(func() { t.Run(g.kind.name, func(t *testing.T) { suite(t, g) }) })
	}
	wg.Wait()
}

// newTopology builds the network of one test, with a name server in world.
func newTopology(t testing.TB) *topo.Topology {
	t.Helper()
	n, err := topo.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

// newGuest starts a guest of kind k on n.
func newGuest(t testing.TB, n *topo.Topology, k kind, o engineOptions) *guest {
	t.Helper()
	if k.native {
		ns, err := n.Native()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if t.Failed() {
				dumpNS(t, ns)
			}
		})
		return &guest{net: n, ns: ns, kind: k}
	}
	o.user, o.path = k.user, k.path
	e := startEngine(t, n, o)
	return &guest{net: n, ns: e.guest, kind: k, engine: e}
}

// run runs a command in the guest: through `slipway exec`, or directly.
func (g *guest) run(t testing.TB, args ...string) result {
	t.Helper()
	if g.engine != nil {
		return g.engine.exec(t, args...)
	}
	cmd := user{}.slipway()
	cmd.Args = args
	cmd.Path = lookPath(t, args[0])
	return finish(t, g.ns, cmd, 60*time.Second)
}

// family is one IP version with its names for the tests.
type family struct {
	name    string
	v6      bool
	world   netip.Addr // servers
	other   netip.Addr // a second peer
	router  netip.Addr
	gateway netip.Addr
	alias   netip.Addr // the host, as the guest names it
	guest   netip.Addr
}

var families = []family{
	{"v4", false, topo.World4, topo.Other4, topo.Router4, topo.Gateway4, topo.HostAlias4, topo.Guest4},
	{"v6", true, topo.World6, topo.Other6, topo.Router6, topo.Gateway6, topo.HostAlias6, topo.Guest6},
}

// eachFamily runs the suite for IPv4 and IPv6.
func eachFamily(t *testing.T, suite func(t *testing.T, f family)) {
	t.Helper()
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) { suite(t, f) })
	}
}

// serve listens in ns and hands every connection to handle, which owns it, in a
// goroutine of its own. The test waits for all of them at its end.
func serve(t testing.TB, ns *topo.NS, address string, handle func(*net.TCPConn)) *net.TCPAddr {
	t.Helper()
	l, err := ns.Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	s := newGroup(t, l)
	s.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.add(c)
			s.Go(func() { handle(c.(*net.TCPConn)) })
		}
	})
	return l.Addr().(*net.TCPAddr)
}

// at returns "address:port" for an address of the family.
func at(a netip.Addr, port int) string { return netip.AddrPortFrom(a, uint16(port)).String() }
