package daemon

import (
	"net/netip"

	"github.com/slipway-net/slipway/dns"
)

// hostResolvConf says who the host's name servers are.
const hostResolvConf = "/etc/resolv.conf"

// guestNet is an engine's network as it was laid out at its start.
type guestNet struct {
	guestAddrs
	subnet4, subnet6 netip.Prefix

	host      hostNet
	mirrored  []netip.Prefix
	resolv    dns.ResolvConf
	upstreams func() []netip.AddrPort
}

// readHost reads what the guest's network copies from the host's, and lays it out.
func (e *engine) readHost() error {
	n := &e.net
	var err error
	if n.host, err = readHostNet(); err != nil {
		return err
	}
	n.subnet4 = e.subnet("ipv4_subnet", e.cfg.IPv4Subnet)
	n.subnet6 = e.subnet("ipv6_subnet", e.cfg.IPv6Subnet)
	n.guestAddrs = addrsOf(n.subnet4, n.subnet6)
	var left int
	if n.mirrored, left = n.host.mirror(n.subnets()...); left > 0 {
		e.warn("%d of the host's routes are not shown to the guest: there are more than %d", left, maxMirrored)
	}
	e.readResolvConf()
	return nil
}

// subnet returns the guest's subnet, moved when it would hide one of the host's
// networks and nobody asked for this very one.
func (e *engine) subnet(key string, want netip.Prefix) netip.Prefix {
	got, overlap := e.net.host.freeSubnet(want)
	switch {
	case !overlap.IsValid():
	case e.opts.Config.Pinned(e.opts.Name, key):
		e.warn("%s %v overlaps the host's route %v, which the guest does not reach; it is set in the configuration and stays", key, want, overlap)
		return want
	case got == want:
		e.warn("%s %v overlaps the host's route %v, and so does every other that could be taken; set %s", key, want, overlap, key)
	default:
		e.warn("%s %v overlaps the host's route %v: the guest gets %v; set %s to choose another", key, want, overlap, got, key)
	}
	return got
}

// readResolvConf finds the servers behind the gateway. A host without a readable file
// has none: an engine without names is better than no engine.
func (e *engine) readResolvConf() {
	n := &e.net
	var err error
	if n.resolv, err = dns.ReadResolvConf(hostResolvConf); err != nil {
		e.warn("the guest resolves built-in names only: %v", err)
	}
	n.upstreams = n.resolv.Upstreams()
}

func (n *guestNet) subnets() []netip.Prefix { return []netip.Prefix{n.subnet4, n.subnet6} }

// guestAddresses are the guest's own, with the length of the subnet.
func (n *guestNet) guestAddresses() []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(n.Guest4, n.subnet4.Bits()),
		netip.PrefixFrom(n.Guest6, n.subnet6.Bits()),
	}
}
