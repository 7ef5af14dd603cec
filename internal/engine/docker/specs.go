package docker

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/slipway-net/slipway/internal/flow"
)

// container is one of GET /containers/json.
type container struct {
	ID              string   `json:"Id"`
	Names           []string // "/web"; "/other/alias" is a link's
	Ports           []port
	NetworkSettings struct{ Networks map[string]endpoint }
}

// port is a container's, published if PublicPort is set.
type port struct {
	IP          string // where on the host; empty for everywhere
	PrivatePort int
	PublicPort  int
	Type        string // protocol
}

// endpoint is where a container is in a network.
type endpoint struct {
	IPAddress, GlobalIPv6Address string
	Gateway, IPv6Gateway         string
	GwPriority                   int
}

// inspection is the part of GET /containers/ID/json that lists ports: by "80/tcp".
type inspection struct {
	NetworkSettings struct {
		Ports map[string][]struct{ HostIP, HostPort string } // HostIp, in truth: names match in any case
	}
}

// ports returns them as a list of containers has them.
func (i inspection) ports() (list []port) {
	for _, private := range slices.Sorted(maps.Keys(i.NetworkSettings.Ports)) {
		number, proto, _ := strings.Cut(private, "/")
		for _, b := range i.NetworkSettings.Ports[private] {
			p := port{IP: b.HostIP, Type: proto}
			p.PrivatePort, _ = strconv.Atoi(number)
			p.PublicPort, _ = strconv.Atoi(b.HostPort) // 0 is published nowhere
			list = append(list, p)
		}
	}
	return list
}

// specs returns what a container has published.
func (c container) specs() (specs []flow.PortSpec) {
	for _, p := range c.Ports {
		proto, ok := protoOf(p.Type)
		host, known := hostOf(p.IP)
		if !ok || !known || !isPort(p.PublicPort) {
			continue
		}
		s := flow.PortSpec{
			Proto: proto,
			Host:  netip.AddrPortFrom(host, uint16(p.PublicPort)),
			Guest: netip.AddrPortFrom(netip.Addr{}, uint16(p.PublicPort)),
		}
		if a := c.address(host); a.IsValid() && isPort(p.PrivatePort) {
			s.Behind = netip.AddrPortFrom(a, uint16(p.PrivatePort))
		}
		specs = append(specs, s)
	}
	return specs
}

// address returns where the engine reaches the container, of the family of host if there
// is a choice; the zero Addr when nowhere. In a network without a gateway it does not: the
// network is internal, or an overlay.
func (c container) address(host netip.Addr) (best netip.Addr) {
	networks := c.NetworkSettings.Networks
	names := slices.SortedFunc(maps.Keys(networks), func(a, b string) int {
		return cmp.Or(cmp.Compare(networks[b].GwPriority, networks[a].GwPriority), cmp.Compare(a, b))
	})
	for _, name := range names {
		n := networks[name]
		for _, way := range [][2]string{{n.IPAddress, n.Gateway}, {n.GlobalIPv6Address, n.IPv6Gateway}} {
			a, err := netip.ParseAddr(way[0])
			if err != nil || way[1] == "" || a.IsUnspecified() || a.Zone() != "" {
				continue
			}
			if a = a.Unmap(); a.Is6() == host.Is6() {
				return a
			}
			if !best.IsValid() {
				best = a
			}
		}
	}
	return best
}

// service is one of GET /services.
type service struct {
	Endpoint struct {
		Ports []struct {
			Protocol      string
			PublishedPort int
			PublishMode   string
		}
	}
}

// specs returns what the swarm publishes on every node for a service: its ingress is IPv4.
// Ports of mode "host" are those of the containers.
func (s service) specs() (specs []flow.PortSpec) {
	for _, p := range s.Endpoint.Ports {
		proto, ok := protoOf(p.Protocol)
		if !ok || !isPort(p.PublishedPort) || p.PublishMode != "ingress" {
			continue
		}
		specs = append(specs, flow.PortSpec{
			Proto: proto,
			Host:  netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(p.PublishedPort)),
			Guest: netip.AddrPortFrom(netip.Addr{}, uint16(p.PublishedPort)),
		})
	}
	return specs
}

// protoOf leaves out what slipway does not carry, such as sctp.
func protoOf(s string) (p flow.Proto, ok bool) {
	switch s {
	case "tcp":
		return flow.TCP, true
	case "udp":
		return flow.UDP, true
	}
	return 0, false
}

// hostOf reads where a port is published; the zero Addr for everywhere.
func hostOf(s string) (a netip.Addr, ok bool) {
	if s == "" {
		return a, true
	}
	a, err := netip.ParseAddr(s)
	return a.Unmap(), err == nil && a.Zone() == ""
}

func isPort(n int) bool { return n >= 1 && n <= 65535 }
