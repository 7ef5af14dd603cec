// Package topo builds the network the end to end tests and measurements run on,
// from network namespaces joined by veth:
//
//	guest                   host                router               world
//	slipway0            host0 --- veth --- rtr0    rtr1 --- veth --- world0
//	192.168.65.3   198.51.100.2    198.51.100.1    203.0.113.1    203.0.113.10, .11, .53
//	               2001:db8:2::2  2001:db8:2::1  2001:db8:3::1  2001:db8:3::10, ::11, ::53
//
// slipway runs in host. The guest is slipway's own, or, as the measure of what
// a guest should see, a plain veth with masquerading in host (Native).
//
// Nothing is named in the file system: a namespace lives as long as a descriptor
// of this process, so a killed test leaves none behind.
package topo

import "net/netip"

// The addresses of the topology. Documentation ranges (RFC 5737, RFC 3849), so
// that a packet that escapes goes nowhere.
var (
	Host4   = netip.MustParseAddr("198.51.100.2")
	Host6   = netip.MustParseAddr("2001:db8:2::2")
	Router4 = netip.MustParseAddr("198.51.100.1")
	Router6 = netip.MustParseAddr("2001:db8:2::1")

	World4 = netip.MustParseAddr("203.0.113.10") // servers of the tests
	World6 = netip.MustParseAddr("2001:db8:3::10")
	Other4 = netip.MustParseAddr("203.0.113.11") // a second peer on the same machine
	Other6 = netip.MustParseAddr("2001:db8:3::11")
	DNS4   = netip.MustParseAddr("203.0.113.53") // where /etc/resolv.conf of the tests points
	DNS6   = netip.MustParseAddr("2001:db8:3::53")

	// Nobody answers at Dead: the router's neighbour discovery for it fails.
	Dead4 = netip.MustParseAddr("203.0.113.200")
	Dead6 = netip.MustParseAddr("2001:db8:3::200")
	// Nor at HostDead, on the host's own link.
	HostDead4 = netip.MustParseAddr("198.51.100.200")
	HostDead6 = netip.MustParseAddr("2001:db8:2::200")
	// BlackHole is dropped by the router without a word.
	BlackHole4 = netip.MustParseAddr("203.0.113.66")
	BlackHole6 = netip.MustParseAddr("2001:db8:3::66")
	// Prohibited and Unreachable are refused by the router with ICMP.
	Prohibited4  = netip.MustParseAddr("203.0.113.77")
	Prohibited6  = netip.MustParseAddr("2001:db8:3::77")
	Unreachable4 = netip.MustParseAddr("203.0.113.78")
	Unreachable6 = netip.MustParseAddr("2001:db8:3::78")
	// HostProhibited and HostUnreachable are refused by the host's own routes.
	HostProhibited4  = netip.MustParseAddr("203.0.113.87")
	HostProhibited6  = netip.MustParseAddr("2001:db8:3::87")
	HostUnreachable4 = netip.MustParseAddr("203.0.113.88")
	HostUnreachable6 = netip.MustParseAddr("2001:db8:3::88")
	HostBlackHole4   = netip.MustParseAddr("203.0.113.89")
	HostBlackHole6   = netip.MustParseAddr("2001:db8:3::89")
)

// The addresses of the guest's side, slipway's defaults.
var (
	Gateway4   = netip.MustParseAddr("192.168.65.1")
	Gateway6   = netip.MustParseAddr("fdc4:f303:9324::1")
	HostAlias4 = netip.MustParseAddr("192.168.65.2")
	HostAlias6 = netip.MustParseAddr("fdc4:f303:9324::2")
	Guest4     = netip.MustParseAddr("192.168.65.3")
	Guest6     = netip.MustParseAddr("fdc4:f303:9324::3")
)
