package topo

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// Topology is the network of the package's picture.
type Topology struct {
	Host, Router, World *NS

	native *NS // made by Native
}

// New builds a Topology. The caller closes it.
func New() (*Topology, error) {
	t := new(Topology)
	if err := t.build(); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (t *Topology) build() (err error) {
	for _, n := range []struct {
		name string
		ns   **NS
	}{{"host", &t.Host}, {"router", &t.Router}, {"world", &t.World}} {
		if *n.ns, err = NewNS(n.name); err != nil {
			return err
		}
	}
	// An unprivileged slipway sends pings only where the host lets it.
	if err := t.Host.Sysctl("net.ipv4.ping_group_range", "0 2147483647"); err != nil {
		// In a user namespace only mapped groups can be named.
		if err := t.Host.Sysctl("net.ipv4.ping_group_range", "0 0"); err != nil {
			return err
		}
	}
	if err := errors.Join(veth(t.Host, "host0", t.Router, "rtr0"), veth(t.Router, "rtr1", t.World, "world0")); err != nil {
		return err
	}
	if err := forwarding(t.Router); err != nil {
		return err
	}
	// A router that answers each of ten traceroute probes at once.
	if err := errors.Join(t.Router.Sysctl("net.ipv4.icmp_ratelimit", "0"), t.Router.Sysctl("net.ipv6.icmp.ratelimit", "0"),
		t.World.Sysctl("net.ipv4.icmp_ratelimit", "0"), t.World.Sysctl("net.ipv6.icmp.ratelimit", "0")); err != nil {
		return err
	}
	return errors.Join(t.Host.IP(hostRoutes()), t.Router.IP(routerRoutes()), t.World.IP(worldRoutes()),
		t.Host.awaitLocal(Host6), t.Router.awaitLocal(Router6), t.World.awaitLocal(World6, Other6, DNS6))
}

// Close lets go of all namespaces.
func (t *Topology) Close() {
	for _, n := range []*NS{t.native, t.Host, t.Router, t.World} {
		n.Close()
	}
}

// veth joins two namespaces.
func veth(a *NS, aName string, b *NS, bName string) error {
	cmd := exec.Command("ip", "link", "add", aName, "type", "veth", "peer", "name", bName, "netns", "/proc/self/fd/3")
	cmd.ExtraFiles = append(cmd.ExtraFiles, b.file)
	if _, err := a.output(cmd); err != nil {
		return err
	}
	return errors.Join(a.IP("link set "+aName+" up"), b.IP("link set "+bName+" up"))
}

func forwarding(n *NS) error {
	return errors.Join(n.Sysctl("net.ipv4.ip_forward", "1"), n.Sysctl("net.ipv6.conf.all.forwarding", "1"))
}

func lines(format string, args ...any) string {
	return strings.TrimLeft(strings.ReplaceAll(fmt.Sprintf(format, args...), "\t", ""), "\n")
}

func hostRoutes() string {
	return lines(`
		addr add %v/24 dev host0
		addr add %v/64 dev host0 nodad
		route add default via %v
		route add default via %v
		route add prohibit %v
		route add prohibit %v
		route add unreachable %v
		route add unreachable %v
		route add blackhole %v
		route add blackhole %v
		`, Host4, Host6, Router4, Router6, HostProhibited4, HostProhibited6,
		HostUnreachable4, HostUnreachable6, HostBlackHole4, HostBlackHole6)
}

func routerRoutes() string {
	return lines(`
		addr add %v/24 dev rtr0
		addr add %v/64 dev rtr0 nodad
		addr add 203.0.113.1/24 dev rtr1
		addr add 2001:db8:3::1/64 dev rtr1 nodad
		route add blackhole %v
		route add blackhole %v
		route add prohibit %v
		route add prohibit %v
		route add unreachable %v
		route add unreachable %v
		`, Router4, Router6, BlackHole4, BlackHole6, Prohibited4, Prohibited6, Unreachable4, Unreachable6)
}

func worldRoutes() string {
	var b strings.Builder
	for _, a := range []any{World4, Other4, DNS4} {
		fmt.Fprintf(&b, "addr add %v/24 dev world0\n", a)
	}
	for _, a := range []any{World6, Other6, DNS6} {
		fmt.Fprintf(&b, "addr add %v/64 dev world0 nodad\n", a)
	}
	b.WriteString("route add default via 203.0.113.1\nroute add default via 2001:db8:3::1\n")
	return b.String()
}

// Native returns the guest that any guest of slipway is compared with: a veth to
// host, which forwards and masquerades as a plain Docker host does. It has the
// addresses of a guest of slipway.
func (t *Topology) Native() (*NS, error) {
	if t.native != nil {
		return t.native, nil
	}
	n, err := NewNS("guest")
	if err != nil {
		return nil, err
	}
	t.native = n
	if err := errors.Join(veth(n, "guest0", t.Host, "native0"), forwarding(t.Host)); err != nil {
		return nil, err
	}
	err = errors.Join(
		n.Sysctl("net.ipv4.ping_group_range", "0 0"),
		// The router's errors pass through us at the rate they come.
		t.Host.Sysctl("net.ipv4.icmp_ratelimit", "0"), t.Host.Sysctl("net.ipv6.icmp.ratelimit", "0"),
		t.Host.IP(lines("addr add %v/24 dev native0\naddr add %v/64 dev native0 nodad\n", Gateway4, Gateway6)),
		n.IP(lines(`
			addr add %v/24 dev guest0
			addr add %v/64 dev guest0 nodad
			route add default via %v
			route add default via %v
			`, Guest4, Guest6, Gateway4, Gateway6)),
		t.Host.NFT(`table inet native {
			chain post {
				type nat hook postrouting priority srcnat;
				oifname "host0" masquerade
			}
		}`),
		t.Host.awaitLocal(Gateway6), n.awaitLocal(Guest6),
	)
	return n, err
}
