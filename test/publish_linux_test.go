package test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// Published ports. A server in the guest tells each client which address it sees, so that
// one question proves the way there, the way back and the source address.

// portDoc is what the tests read of a published port, in `slipway ports ls --json` and in
// answers of the API.
type portDoc struct {
	ID   uint64 `json:"id"`
	Spec struct {
		Proto      string `json:"proto"`
		ParentIP   string `json:"parentIP"`
		ParentPort int    `json:"parentPort"`
		ChildIP    string `json:"childIP"`
		ChildPort  int    `json:"childPort"`
	} `json:"spec"`
	Owner    string           `json:"owner"`
	Listens  []netip.AddrPort `json:"listens"`
	Counters struct {
		Clients, Refused, Gateway, Dropped, Errors int
	} `json:"counters"`
}

// readPorts lists the engine's published ports.
func readPorts(t testing.TB, e *engine) []portDoc {
	t.Helper()
	r := e.call(t, "ports", "ls", e.name, "--json")
	var list struct {
		Ports []portDoc `json:"ports"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil || r.code != 0 {
		t.Errorf("ports ls --json: status %d, %v: %s%s", r.code, err, r.stdout, r.stderr)
	}
	return list.Ports
}

// portAt returns the published port that listens on a port number.
func portAt(t testing.TB, e *engine, number int) (p portDoc) {
	t.Helper()
	all := readPorts(t, e)
	i := slices.IndexFunc(all, func(p portDoc) bool { return p.Spec.ParentPort == number })
	if i < 0 {
		t.Errorf("port %d is not listed in %v", number, all)
		return p
	}
	return all[i]
}

// publish adds ports with the command and wants no error.
func (e *engine) publish(t testing.TB, args ...string) string {
	t.Helper()
	r := e.call(t, append([]string{"ports", "add", e.name}, args...)...)
	if r.code != 0 {
		t.Errorf("ports add %s: status %d: %s", strings.Join(args, " "), r.code, r.stderr)
	}
	return r.stdout
}

// listeners are the sockets that take clients in a namespace, as "tcp 0.0.0.0:80". What
// listens on all addresses of both families would be "tcp *:80". Flows of UDP have ports
// of the ephemeral range and are left out.
func listeners(t testing.TB, ns *topo.NS) []string {
	t.Helper()
	out, err := ns.Run("", "ss", "-Htuln")
	if err != nil {
		t.Error(err)
		return nil
	}
	const ephemeral = 32768
	all := []string{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if _, port, err := splitAddress(f[4]); err == nil && port < ephemeral {
			all = append(all, f[0]+" "+f[4])
		}
	}
	slices.Sort(all)
	return all
}

// splitAddress takes ss's "0.0.0.0:80", "[::]:80" and "*:80".
func splitAddress(s string) (host string, port int, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", 0, errors.New("no port")
	}
	_, err = fmt.Sscan(s[i+1:], &port)
	return s[:i], port, err
}

// onAll is the two listeners of a port without an address.
func onAll(proto string, port int) []string {
	return []string{fmt.Sprintf("%s 0.0.0.0:%d", proto, port), fmt.Sprintf("%s [::]:%d", proto, port)}
}

// expectListeners wants exactly these listeners in host, soon.
func expectListeners(t testing.TB, n *topo.Topology, when string, want ...[]string) {
	t.Helper()
	expectListenersIn(t, n.Host, when, want...)
}

func expectListenersIn(t testing.TB, ns *topo.NS, when string, want ...[]string) {
	t.Helper()
	all := slices.Sorted(slices.Values(slices.Concat(want...)))
	var now []string
	if !eventually(60*time.Second, func() bool {
		now = listeners(t, ns)
		return slices.Equal(now, all)
	}) {
		t.Errorf("%s: the listeners are\n\t%s\nexpected\n\t%s", when, strings.Join(now, "\n\t"), strings.Join(all, "\n\t"))
	}
}

// tellSource serves on a port: each client is told its address, over TCP and UDP, IPv4
// and IPv6. A connection is echoed after that until its end.
func tellSource(t testing.TB, ns *topo.NS, port int) {
	t.Helper()
	for _, f := range families {
		tellSourceAt(t, ns, netip.AddrPortFrom(anyOf(f), uint16(port)))
	}
}

// tellSourceAt does so on one address.
func tellSourceAt(t testing.TB, ns *topo.NS, address netip.AddrPort) {
	t.Helper()
	serveOnly(t, ns, address, tell)
	var u *net.UDPConn
	err := ns.Do(func() (err error) {
		u, err = net.ListenUDP("udp"+familyDigit(address.Addr()), net.UDPAddrFromAddrPort(address))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	group := newGroup(t, u)
	group.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			_, from, err := u.ReadFromUDPAddrPort(buf)
			switch {
			case errors.Is(err, net.ErrClosed):
				return
			case err == nil:
				u.WriteToUDPAddrPort([]byte(unmap(from).String()), from)
			}
		}
	})
}

// tell is the server of tellSource.
func tell(c *net.TCPConn) {
	defer c.Close()
	fmt.Fprintln(c, unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort()))
	io.Copy(c, c)
}

// serveOnly is serve on one family: Go's "tcp" takes both on [::].
func serveOnly(t testing.TB, ns *topo.NS, address netip.AddrPort, handle func(*net.TCPConn)) {
	t.Helper()
	l, err := listenOnly(ns, address)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, handle)
}

// serveOn serves on a listener.
func serveOn(t testing.TB, l net.Listener, handle func(*net.TCPConn)) {
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
}

// listenOnly listens on one family.
func listenOnly(ns *topo.NS, address netip.AddrPort) (l net.Listener, err error) {
	err = ns.Do(func() (err error) {
		l, err = net.Listen("tcp"+familyDigit(address.Addr()), address.String())
		return err
	})
	return l, err
}

func familyDigit(a netip.Addr) string {
	if a.Is6() {
		return "6"
	}
	return "4"
}

// client is a place that clients of published ports are at.
type client struct {
	name string
	ns   *topo.NS
	from netip.Addr
}

// sighting is what a server said, and what the client's own address was.
type sighting struct{ seen, own netip.AddrPort }

// ask asks a published port which address the guest sees.
func (c client) ask(proto string, to netip.AddrPort) (s sighting, err error) {
	if proto == "udp" {
		return c.askUDP(to)
	}
	return c.askTCP(to)
}

func (c client) askTCP(to netip.AddrPort) (s sighting, err error) {
	conn, err := c.ns.DialFrom("tcp", at(c.from, 0), to.String())
	if err != nil {
		return s, err
	}
	defer conn.Close()
	return seenBy(conn)
}

// seenBy reads what the server of tellSource says first.
func seenBy(conn net.Conn) (s sighting, err error) {
	s.own = unmap(conn.LocalAddr().(*net.TCPAddr).AddrPort())
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	line, err := bufio.NewReaderSize(conn, 64).ReadString('\n')
	if err != nil {
		return s, fmt.Errorf("connected, then: %w", err)
	}
	s.seen, err = netip.ParseAddrPort(strings.TrimSpace(line))
	return s, err
}

// askUDP has a socket of its own that hears everybody: an answer from elsewhere shows.
func (c client) askUDP(to netip.AddrPort) (s sighting, err error) {
	conn, err := c.ns.ListenUDP(at(c.from, 0))
	if err != nil {
		return s, err
	}
	defer conn.Close()
	return seenByUDP(conn, to)
}

// seenByUDP asks a few times, because a datagram may get lost on a busy machine.
func seenByUDP(conn *net.UDPConn, to netip.AddrPort) (s sighting, err error) {
	s.own = unmap(conn.LocalAddr().(*net.UDPAddr).AddrPort())
	buf := make([]byte, 256)
	for range 3 {
		if _, err = conn.WriteToUDPAddrPort([]byte("who am I?"), to); err != nil {
			return s, err
		}
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		var n int
		var from netip.AddrPort
		if n, from, err = conn.ReadFromUDPAddrPort(buf); err != nil {
			continue
		}
		if from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port()); from != netip.AddrPortFrom(to.Addr().WithZone(""), to.Port()) {
			return s, fmt.Errorf("answer from %v, asked %v", from, to)
		}
		s.seen, err = netip.ParseAddrPort(string(buf[:n]))
		return s, err
	}
	return s, err
}

// dockerPort are the rules that dockerd loads when a container publishes a port.
func dockerPort(port, containerPort int) (rules []string) {
	for _, proto := range []string{"tcp", "udp"} {
		rules = append(rules,
			fmt.Sprintf("nat -A DOCKER ! -i docker0 -p %s --dport %d -j DNAT --to-destination [{second}]:%d", proto, port, containerPort),
			fmt.Sprintf("filter -A DOCKER -d {second} ! -i docker0 -o docker0 -p %s --dport %d -j ACCEPT", proto, containerPort))
	}
	return rules
}

// publishable is a guest with what the tests of published ports reach in it: a server
// in a container, behind rules as dockerd's, one in the namespace and one on its loopback.
type publishable struct {
	*guest
	bridge *bridge
	direct bool // its rules let packets from outside in to containers, and slipway knows
}

const (
	containerPort = 80 // of the server in the second container
	enginePort    = 81 // in the engine's namespace
	loopbackPort  = 82 // there, on the loopback
)

func newPublishable(t testing.TB, k kind, o engineOptions) *publishable {
	t.Helper()
	g := newGuest(t, newTopology(t), k, o)
	p := &publishable{guest: g, bridge: newBridge(t, g, "nft")}
	if err := p.bridge.tables.load(g.ns, "nat -A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER"); err != nil {
		t.Fatal(err)
	}
	tellSource(t, p.bridge.containers[1], containerPort)
	tellSource(t, g.ns, enginePort)
	for _, f := range families {
		tellSourceAt(t, g.ns, netip.AddrPortFrom(loopbackOf(f), loopbackPort))
	}
	return p
}

func loopbackOf(f family) netip.Addr {
	if f.v6 {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

func hostOf(f family) netip.Addr {
	if f.v6 {
		return topo.Host6
	}
	return topo.Host4
}

// container is the address of the container with the server.
func container(f family) netip.Addr {
	second4, second6 := topo.ContainerAddr(2)
	if f.v6 {
		return second6
	}
	return second4
}

// bridgeOf is the engine's address on the container's network.
func bridgeOf(f family) netip.Addr {
	if f.v6 {
		return topo.Bridge6
	}
	return topo.Bridge4
}

// clientsOf are the three places of docs/publish.md.
func clientsOf(n *topo.Topology, f family) (loopback, own, other client) {
	return client{"the host's loopback", n.Host, loopbackOf(f)},
		client{"an address of the host", n.Host, hostOf(f)},
		client{"another machine", n.World, f.world}
}

// sourceForm is a row of docs/publish.md.
type sourceForm struct {
	name     string
	port     int
	specific bool // listens on the host's address, not on all
	loopback bool // listens on the loopback
	inside   bool // leads to a container's address, not to the engine's
	self     bool // leads to the guest's own loopback
}

// want is what the guest sees of a client, by docs/publish.md.
func (form sourceForm) want(k kind, direct bool, proto string, c client) string {
	switch {
	case form.self:
		return "loopback"
	case form.inside && !direct && proto == "tcp" && k.kernel():
		return "gateway"
	case form.inside && !direct:
		return "bridge"
	case c.from.IsLoopback():
		return "gateway"
	}
	return "client"
}

// TestPublishSourceAddress: the table of docs/publish.md, every row for TCP and UDP, IPv4
// and IPv6, with ports of the command line and with the real slipway-docker-proxy.
func TestPublishSourceAddress(t *testing.T) {
	eachPublishable(t, engineOptions{}, func(t *testing.T, p *publishable) {
		forms := []sourceForm{
			{name: "all addresses, a container behind DNAT", port: 18080},
			{name: "all addresses, the namespace", port: 18081},
			{name: "an address, a container", port: 18082, specific: true, inside: true},
			{name: "the loopback, a container", port: 18083, loopback: true, inside: true},
			{name: "all addresses, the guest's loopback", port: 18084, self: true},
			{name: "docker-proxy, all addresses", port: 18085},
			{name: "docker-proxy, an address", port: 18086, specific: true, inside: true},
			{name: "docker-proxy, the loopback", port: 18087, loopback: true, inside: true},
		}
		p.publishForms(t)
		var wg sync.WaitGroup
		for _, form := range forms {
			for _, f := range families {
				for _, proto := range []string{"tcp", "udp"} {
					wg.Go(func() { p.expectForm(t, form, f, proto) })
				}
			}
		}
		wg.Wait()
	})
}

// eachPublishable runs the suite over all kinds at the same time: what it does is wait.
func eachPublishable(t *testing.T, o engineOptions, suite func(t *testing.T, p *publishable)) {
	t.Helper()
	need(t, "ip", "nft", "ss")
	var all []*publishable
	for _, k := range kinds {
		if !k.native {
			all = append(all, newPublishable(t, k, o))
		}
	}
	var wg sync.WaitGroup
	for _, p := range all {
		wg.Go(func() { t.Run(p.kind.name, func(t *testing.T) { suite(t, p) }) })
	}
	wg.Wait()
}

// publishForms publishes what TestPublishSourceAddress asks for.
func (p *publishable) publishForms(t *testing.T) {
	t.Helper()
	if err := p.bridge.tables.load(p.ns, slices.Concat(dockerPort(18080, containerPort), dockerPort(18085, containerPort))...); err != nil {
		t.Fatal(err)
	}
	specs := []string{"18080:18080", "18081:81"}
	for _, f := range families {
		specs = append(specs,
			fmt.Sprintf("%s:18082:%s:80", inBrackets(hostOf(f)), inBrackets(container(f))),
			fmt.Sprintf("%s:18083:%s:80", inBrackets(loopbackOf(f)), inBrackets(container(f))),
			fmt.Sprintf("%s:18084:%s:82", inBrackets(anyOf(f)), inBrackets(loopbackOf(f))))
		for _, proto := range []string{"tcp", "udp"} {
			for port, host := range map[int]netip.Addr{18085: anyOf(f), 18086: hostOf(f), 18087: loopbackOf(f)} {
				p.engine.dockerProxy(t, proto, netip.AddrPortFrom(host, uint16(port)), netip.AddrPortFrom(container(f), containerPort)).mustServe(t)
			}
		}
	}
	for _, s := range slices.Clone(specs) {
		specs = append(specs, s+"/udp")
	}
	p.engine.publish(t, specs...)
}

func inBrackets(a netip.Addr) string {
	if a.Is6() {
		return "[" + a.String() + "]"
	}
	return a.String()
}

// expectForm asks from every place that a form has clients at.
func (p *publishable) expectForm(t *testing.T, form sourceForm, f family, proto string) {
	loopback, own, other := clientsOf(p.net, f)
	if !form.specific {
		p.expectSource(t, form, f, proto, loopback, loopbackOf(f))
	}
	if !form.loopback {
		p.expectSource(t, form, f, proto, own, hostOf(f))
		p.expectSource(t, form, f, proto, other, hostOf(f))
	}
}

// expectSource compares what the guest saw with the row.
func (p *publishable) expectSource(t *testing.T, form sourceForm, f family, proto string, c client, to netip.Addr) {
	s, err := c.ask(proto, netip.AddrPortFrom(to, uint16(form.port)))
	if problem := s.differs(form.want(p.kind, p.direct, proto, c), f); err != nil || problem != "" {
		t.Errorf("%s, %s, %s, from %s: %s %v", form.name, proto, f.name, c.name, problem, err)
	}
}

// differs says what is wrong with a sighting, if anything is.
func (s sighting) differs(want string, f family) string {
	ok := false
	switch want {
	case "client":
		ok = s.seen == s.own
	case "gateway":
		ok = s.seen.Addr() == f.gateway && s.seen.Port() != 0
	case "loopback":
		ok = s.seen.Addr() == loopbackOf(f)
	case "bridge":
		ok = s.seen.Addr() == bridgeOf(f)
	}
	if ok {
		return ""
	}
	return fmt.Sprintf("the guest sees %v, the client is %v, expected is the %s", s.seen, s.own, want)
}

// proxyPath is slipway under the name that makes it dockerd's proxy.
const proxyPath = "/run/slipway-docker-proxy"

// proxy is a slipway-docker-proxy that runs in an engine as dockerd starts it.
type proxy struct {
	answer string // on its descriptor 3: "0\n", or "1\n" and an error
	stop   func() // as dockerd does
}

// dockerProxy starts one and reads its answer.
func (e *engine) dockerProxy(t testing.TB, proto string, host, container netip.AddrPort) *proxy {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := e.slipway("exec", e.name, "--", "sh", "-c", `exec "$@" 3>&1 >/dev/null`, "sh", proxyPath, "-proto", proto,
		"-host-ip", host.Addr().String(), "-host-port", fmt.Sprint(host.Port()),
		"-container-ip", container.Addr().String(), "-container-port", fmt.Sprint(container.Port()))
	cmd.Stdout, cmd.Stderr = w, &e.stderr
	err = e.net.Host.Start(cmd)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{stop: sync.OnceFunc(func() {
		cmd.Process.Signal(unix.SIGTERM)
		timer := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		if !timer.Stop() {
			t.Errorf("%v did not end within 10 s of TERM", cmd.Args)
		}
	})}
	t.Cleanup(p.stop)
	r.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 4096)
	n, err := r.Read(buf)
	p.answer = string(buf[:n])
	if err == nil && !strings.HasPrefix(p.answer, "0") {
		rest, _ := io.ReadAll(r)
		p.answer += string(rest)
	}
	return p
}

// mustServe wants the proxy to be serving.
func (p *proxy) mustServe(t testing.TB) {
	t.Helper()
	if p.answer != "0\n" {
		t.Errorf("slipway-docker-proxy answers %q", p.answer)
	}
}
