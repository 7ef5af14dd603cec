package probe

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
)

// internet is an address of each family that only a default route leads to:
// a.root-servers.net. Nothing is sent there.
var internet = []netip.Addr{netip.MustParseAddr("198.41.0.4"), netip.MustParseAddr("2001:503:ba3e::2:30")}

// routes says which families have a way out. A host without one is no fault of ours.
func (p *prober) routes(ctx context.Context) {
	for _, out := range internet {
		p.check(ctx, "route "+family(out), "default", func(ctx context.Context) (string, error) {
			source, err := sourceTowards(ctx, out)
			if err != nil {
				return "", skip("no default route: the host had none when the engine started (" + why(err) + ")")
			}
			return "from " + source.String(), nil
		})
	}
}

// sourceTowards is the address from which packets to a leave. Connecting a UDP socket
// asks for the route and sends nothing.
func sourceTowards(ctx context.Context, a netip.Addr) (netip.Addr, error) {
	const discard = 9 // RFC 863; any port would do
	c, err := new(net.Dialer).DialContext(ctx, "udp", netip.AddrPortFrom(a, discard).String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// gateway pings the gateway. That somebody may not ping, in a container for one, is no
// fault of the gateway; with a target given it is a failure.
func (p *prober) gateway(ctx context.Context) {
	p.eachOf(ctx, "gateway", gatewayName, func(ctx context.Context, a netip.Addr) (string, error) {
		kind, err := ping(ctx, a)
		if errors.Is(err, errNoPing) {
			return "", skip(why(err))
		}
		return kind, err
	})
}

// direct talks to services that are neither the gateway nor the host's loopback.
func (p *prober) direct(ctx context.Context) {
	t := &p.targets
	for _, s := range []struct {
		name, kind string
		target     netip.AddrPort
		try        func(context.Context, netip.AddrPort) (string, error)
	}{
		{"tcp v4", "tcp4", t.TCP4, echoTCP},
		{"tcp v6", "tcp6", t.TCP6, echoTCP},
		{"udp v4", "udp4", t.UDP4, echoUDP},
		{"udp v6", "udp6", t.UDP6, echoUDP},
	} {
		if !s.target.IsValid() {
			p.skip(ctx, s.name, "", t.missing(s.kind))
			continue
		}
		p.check(ctx, s.name, s.target.String(), func(ctx context.Context) (string, error) { return s.try(ctx, s.target) })
	}
	for _, s := range []struct {
		name, kind string
		target     netip.Addr
	}{{"ping v4", "ping4", t.Ping4}, {"ping v6", "ping6", t.Ping6}} {
		if !s.target.IsValid() {
			p.skip(ctx, s.name, "", t.missing(s.kind))
			continue
		}
		p.check(ctx, s.name, s.target.String(), func(ctx context.Context) (string, error) { return ping(ctx, s.target) })
	}
}

// host tries the services on the host's loopback or, if there are none, finds out
// whether any port is open.
func (p *prober) host(ctx context.Context) {
	t := &p.targets
	if t.HostTCP == 0 && t.HostUDP == 0 && t.Missing["host-tcp"] == "" && t.Missing["host-udp"] == "" {
		p.eachOf(ctx, "host", hostName, hostState)
		return
	}
	for _, s := range []struct {
		name, kind string
		port       uint16
		try        func(context.Context, netip.AddrPort) (string, error)
	}{{"host tcp", "host-tcp", t.HostTCP, echoTCP}, {"host udp", "host-udp", t.HostUDP, echoUDP}} {
		if s.port == 0 {
			p.skip(ctx, s.name, "", t.missing(s.kind))
			continue
		}
		if len(p.known[hostName]) == 0 {
			p.skip(ctx, s.name, hostName, "the name has no known address")
		}
		for _, a := range p.known[hostName] {
			to := netip.AddrPortFrom(a, s.port)
			p.check(ctx, s.name+" "+family(a), to.String(), func(ctx context.Context) (string, error) {
				if !haveFamily(a) {
					return "", errNoFamily
				}
				return s.try(ctx, to)
			})
		}
	}
}

// eachOf makes a check of every address of a name.
func (p *prober) eachOf(ctx context.Context, check, name string, try func(context.Context, netip.Addr) (string, error)) {
	if len(p.known[name]) == 0 {
		p.skip(ctx, check, name, "the name has no known address")
	}
	for _, a := range p.known[name] {
		p.check(ctx, check+" "+family(a), a.String(), func(ctx context.Context) (string, error) {
			if !haveFamily(a) {
				return "", errNoFamily
			}
			return try(ctx, a)
		})
	}
}

// errNoFamily skips what cannot work where IPv6 is off.
const errNoFamily = skip("this engine has no address of this family")

// haveFamily tells whether we have an address of a's family besides loopback and
// link-local ones.
func haveFamily(a netip.Addr) bool {
	return a.IsLoopback() || slices.ContainsFunc(ownAddrs(), func(own netip.Addr) bool {
		return own.Is4() == a.Is4() && own.IsGlobalUnicast()
	})
}

// ownAddrs are the addresses of this machine's, or namespace's, interfaces; none if
// they cannot be read.
func ownAddrs() []netip.Addr {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var addrs []netip.Addr
	for _, e := range list {
		n, ok := e.(*net.IPNet)
		if !ok {
			continue
		}
		if a, ok := netip.AddrFromSlice(n.IP); ok {
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs
}

// hostState pings the host address. A ping of it passes as soon as any port is open
// to the guest and is prohibited otherwise; both are fine.
func hostState(ctx context.Context, a netip.Addr) (string, error) {
	_, err := ping(ctx, a)
	switch {
	case err == nil:
		return "allowed: the guest may use ports of the host's loopback", nil
	// ICMP "administratively prohibited" as Linux shows it to a connected socket,
	// by family (net/ipv4/icmp.c: icmp_err_convert, net/ipv6/icmp.c: tab_unreach).
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EACCES):
		return "denied: no port of the host's loopback is open to the guest (host_access)", nil
	case errors.Is(err, errNoPing):
		return "", skip("cannot tell: " + why(err))
	case why(err) == why(context.DeadlineExceeded):
		return "", skip("cannot tell: the host answers no ping")
	}
	return "", err
}
