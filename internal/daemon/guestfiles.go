package daemon

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// hostNames and gatewayNames are the names of our two addresses inside an engine. The
// first is ours, the others are what programs written for Docker and Podman look up.
var (
	hostNames    = []string{"host.slipway.internal", "host.docker.internal", "host.containers.internal"}
	gatewayNames = []string{"gateway.slipway.internal", "gateway.docker.internal"}
)

// guestAddrs are an engine's addresses; those of a family without a subnet are
// invalid.
type guestAddrs struct {
	Gateway4, Host4, Guest4 netip.Addr
	Gateway6, Host6, Guest6 netip.Addr
}

// addrsOf takes the first, second and third address of each subnet.
func addrsOf(subnet4, subnet6 netip.Prefix) guestAddrs {
	first := func(p netip.Prefix) (a, b, c netip.Addr) {
		a = p.Masked().Addr().Next()
		b = a.Next()
		return a, b, b.Next()
	}
	var g guestAddrs
	g.Gateway4, g.Host4, g.Guest4 = first(subnet4)
	g.Gateway6, g.Host6, g.Guest6 = first(subnet6)
	return g
}

// names maps the built-in names, without a final dot, to their addresses.
func (g guestAddrs) names() map[string][]netip.Addr {
	m := make(map[string][]netip.Addr)
	for _, n := range hostNames {
		m[n] = []netip.Addr{g.Host4, g.Host6}
	}
	for _, n := range gatewayNames {
		m[n] = []netip.Addr{g.Gateway4, g.Gateway6}
	}
	return m
}

// hostsFile is the guest's hosts file: the host's own, without lines about names that
// are ours, and then ours.
func hostsFile(host []byte, g guestAddrs) []byte {
	ours := slices.Concat(hostNames, gatewayNames)
	var b bytes.Buffer
	lines := bufio.NewScanner(bytes.NewReader(host))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		if fields := strings.Fields(line); len(fields) > 1 && slices.ContainsFunc(fields[1:], func(n string) bool {
			return slices.Contains(ours, strings.ToLower(n))
		}) {
			continue
		}
		b.WriteString(lines.Text())
		b.WriteByte('\n')
	}
	if !bytes.Contains(b.Bytes(), []byte("localhost")) {
		b.WriteString("127.0.0.1 localhost\n::1 localhost\n")
	}
	b.WriteString("# Added by slipway.\n")
	for _, l := range []struct {
		addr  netip.Addr
		names []string
	}{{g.Host4, hostNames}, {g.Host6, hostNames}, {g.Gateway4, gatewayNames}, {g.Gateway6, gatewayNames}} {
		fmt.Fprintf(&b, "%v %s\n", l.addr, strings.Join(l.names, " "))
	}
	return b.Bytes()
}
