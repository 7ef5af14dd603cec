package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hostNet is what a guest's routing table copies from the host's. It is read once,
// when an engine starts.
type hostNet struct {
	Default4, Default6 bool           // the host has a default route of the family
	Routes             []netip.Prefix // every other destination, without repetition, sorted
}

// maxMirrored bounds the routes copied to a guest: a host with a full routing table
// of the internet has no use for the copy.
const maxMirrored = 512

// notMirrored are destinations that never leave a host, or not by routing.
var notMirrored = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// readHostNet reads the host's routes from every table but the local one: VPN clients
// such as wg-quick put theirs into a table of their own, behind a rule, and what
// matters to a guest is which addresses mean something on this host, not by which
// rule.
func readHostNet() (hostNet, error) {
	var h hostNet
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return h, fmt.Errorf("read routes on this host: %w", err)
		}
		for _, r := range routes {
			if r.Table != unix.RT_TABLE_LOCAL && r.Type == unix.RTN_UNICAST {
				h.add(destination(r, family))
			}
		}
	}
	slices.SortFunc(h.Routes, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	h.Routes = slices.Compact(h.Routes)
	return h, nil
}

// destination is a route's destination; netlink gives a default route none.
func destination(r netlink.Route, family int) netip.Prefix {
	if r.Dst == nil {
		if family == unix.AF_INET {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	a, _ := netip.AddrFromSlice(r.Dst.IP)
	ones, _ := r.Dst.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones).Masked() // package net may keep four bytes in sixteen
}

// widest is the shortest prefix that counts as a destination of its own. VPN clients
// that want all traffic install 0.0.0.0/1 and 128.0.0.0/1, or 2000::/3, instead of a
// default route; copied to a guest they would overlap every address pool that an
// engine could choose.
func widest(p netip.Prefix) int {
	if p.Addr().Is4() {
		return 8
	}
	return 7 // fc00::/7 is somebody's network
}

func (h *hostNet) add(p netip.Prefix) {
	if slices.ContainsFunc(notMirrored, p.Overlaps) && p.Bits() >= widest(p) {
		return
	}
	switch {
	case p.Bits() >= widest(p):
		h.Routes = append(h.Routes, p)
	case p.Addr().Is4():
		h.Default4 = true
	default:
		h.Default6 = true
	}
}

// mirror returns the routes to copy to a guest whose own networks are own, and how
// many were left out because there are too many.
func (h *hostNet) mirror(own ...netip.Prefix) (routes []netip.Prefix, left int) {
	for _, p := range h.Routes {
		if !slices.ContainsFunc(own, p.Overlaps) {
			routes = append(routes, p)
		}
	}
	if len(routes) > maxMirrored {
		return routes[:maxMirrored], len(routes) - maxMirrored
	}
	return routes, 0
}

// otherSubnets are taken, in order, when a default subnet overlaps a host route.
var otherSubnets = []netip.Prefix{
	netip.MustParsePrefix("192.168.165.0/24"),
	netip.MustParsePrefix("172.31.165.0/24"),
	netip.MustParsePrefix("10.165.65.0/24"),
	netip.MustParsePrefix("198.18.65.0/24"), // RFC 2544: never a real network
	netip.MustParsePrefix("fdc4:f303:9325::/64"),
	netip.MustParsePrefix("fdc4:f303:9326::/64"),
}

// freeSubnet returns want, or, when it overlaps a host route, the first of
// otherSubnets that does not; overlap is the route then. With nothing free it returns
// want.
func (h *hostNet) freeSubnet(want netip.Prefix) (got, overlap netip.Prefix) {
	taken := func(p netip.Prefix) (netip.Prefix, bool) {
		i := slices.IndexFunc(h.Routes, p.Overlaps)
		if i < 0 {
			return netip.Prefix{}, false
		}
		return h.Routes[i], true
	}
	overlap, bad := taken(want)
	if !bad {
		return want, netip.Prefix{}
	}
	for _, p := range otherSubnets {
		if _, bad := taken(p); !bad && p.Addr().Is4() == want.Addr().Is4() {
			return p, overlap
		}
	}
	return want, overlap
}
