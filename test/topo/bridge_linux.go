package topo

import (
	"errors"
	"fmt"
	"net/netip"
)

// The addresses behind a bridge: Docker's own for IPv4.
var (
	Bridge4 = netip.MustParseAddr("172.17.0.1")
	Bridge6 = netip.MustParseAddr("fd00:172:17::1")
)

// BridgeDevice is the bridge's name.
const BridgeDevice = "docker0"

// Bridge is what a container engine makes in its namespace: a bridge that the
// namespace routes for.
//
//	container                 the engine's namespace
//	eth0 -------- veth ------ docker0 ......... slipway0
//	172.17.0.2 and on         172.17.0.1/16
//	fd00:172:17::2            fd00:172:17::1/64
type Bridge struct {
	ns         *NS
	containers []*NS
}

// NewBridge makes the bridge in ns. The caller closes it.
func NewBridge(ns *NS) (*Bridge, error) {
	return &Bridge{ns: ns}, errors.Join(forwarding(ns),
		// Containers hear of each REJECT.
		ns.Sysctl("net.ipv4.icmp_ratelimit", "0"), ns.Sysctl("net.ipv6.icmp.ratelimit", "0"), ns.IP(lines(`
		link add %[1]s type bridge
		addr add %[2]v/16 dev %[1]s
		addr add %[3]v/64 dev %[1]s nodad
		link set %[1]s up
		`, BridgeDevice, Bridge4, Bridge6)))
}

// Container makes the next container.
func (b *Bridge) Container() (*NS, error) {
	n := len(b.containers) + 1
	c, err := NewNS(fmt.Sprintf("container %d", n))
	if err != nil {
		return nil, err
	}
	b.containers = append(b.containers, c)
	a4, a6 := ContainerAddr(n)
	port := fmt.Sprintf("port%d", n)
	return c, errors.Join(
		veth(b.ns, port, c, "eth0"),
		b.ns.IP(lines("link set %s master %s\n", port, BridgeDevice)),
		c.IP(lines(`
			addr add %v/16 dev eth0
			addr add %v/64 dev eth0 nodad
			route add default via %v
			route add default via %v
			`, a4, a6, Bridge4, Bridge6)),
		b.ns.awaitLocal(Bridge6), c.awaitLocal(a6), // the bridge is ready with its first port
	)
}

// ContainerAddr is the addresses of the n-th container, from 1.
func ContainerAddr(n int) (v4, v6 netip.Addr) {
	v4, v6 = Bridge4, Bridge6
	for range n {
		v4, v6 = v4.Next(), v6.Next()
	}
	return v4, v6
}

// Close lets go of the containers; the bridge goes with its namespace.
func (b *Bridge) Close() {
	for _, c := range b.containers {
		c.Close()
	}
}
