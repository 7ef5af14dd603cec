package forward

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
)

// icmpCase is a packet into the topology and the error that must come back.
type icmpCase struct {
	name   string
	target string
	hops   uint8
	size   int
	again  bool // send it twice and look at the second error
	want   flow.ICMP
	from   string // "": the gateway
	mtu    uint32
}

// icmpCases hold for UDP and for pings; all of them have DF set.
var icmpCases = []icmpCase{
	{name: "ttl_ends_at_the_router_v4", target: "203.0.113.2", hops: 1, want: flow.ICMP{Type: 11}, from: "198.51.100.2"},
	{name: "ttl_ends_at_the_router_v6", target: "2001:db8:2::2", hops: 1, want: flow.ICMP{Type: 3}, from: "2001:db8:1::2"},
	{name: "too_big_for_the_router_v4", target: "203.0.113.2", hops: 63, size: 1450, want: fragNeeded4, from: "198.51.100.2", mtu: 1400},
	{name: "too_big_for_the_router_v6", target: "2001:db8:2::2", hops: 63, size: 1430, want: packetTooBig6, from: "2001:db8:1::2", mtu: 1400},
	{name: "too_big_as_known_now_v4", target: "203.0.113.2", hops: 63, size: 1450, again: true, want: fragNeeded4, mtu: 1400},
	{name: "too_big_as_known_now_v6", target: "2001:db8:2::2", hops: 63, size: 1430, again: true, want: packetTooBig6, mtu: 1400},
	{name: "too_big_for_the_hosts_route_v4", target: "192.0.2.8", hops: 63, size: 1350, want: fragNeeded4, mtu: 1300},
	{name: "too_big_for_the_hosts_route_v6", target: "2001:db8:f::8", hops: 63, size: 1350, want: packetTooBig6, mtu: 1300},
	{name: "unreachable_at_the_router_v4", target: "192.0.2.4", hops: 63, want: flow.ICMP{Type: 3, Code: 1}, from: "198.51.100.2"},
	{name: "unreachable_at_the_router_v6", target: "2001:db8:f::4", hops: 63, want: flow.ICMP{Type: 1, Code: 0}, from: "2001:db8:1::2"},
	{name: "prohibited_at_the_router_v4", target: "192.0.2.5", hops: 63, want: flow.ICMP{Type: 3, Code: 13}, from: "198.51.100.2"},
	{name: "prohibited_at_the_router_v6", target: "2001:db8:f::5", hops: 63, want: flow.ICMP{Type: 1, Code: 1}, from: "2001:db8:1::2"},
	{name: "prohibited_by_the_host_v4", target: "192.0.2.9", hops: 63, want: flow.ICMP{Type: 3, Code: 13}},
	{name: "prohibited_by_the_host_v6", target: "2001:db8:f::9", hops: 63, want: flow.ICMP{Type: 1, Code: 1}},
	{name: "no_route_v4", target: "192.88.99.7", hops: 63, want: flow.ICMP{Type: 3, Code: 0}},
	{name: "no_route_v6", target: "2001:db8:e::7", hops: 63, want: flow.ICMP{Type: 1, Code: 0}},
}

// guestFor returns the guest of a target's family.
func guestFor(target netip.Addr) netip.AddrPort {
	if target.Is4() {
		return guest1
	}
	return guest6
}

// check compares an error with the case.
func (c *icmpCase) check(t *testing.T, e flow.Error, payload []byte) {
	t.Helper()
	var from netip.Addr
	if c.from != "" {
		from = netip.MustParseAddr(c.from)
	}
	if e.ICMP != c.want || e.From != from || e.MTU != c.mtu || e.Target.Addr() != netip.MustParseAddr(c.target) {
		t.Errorf("guest got %v: %+v from %v, mtu %d; want %+v from %v, mtu %d", e.Tuple, e.ICMP, e.From, e.MTU, c.want, from, c.mtu)
	}
	if !bytes.HasPrefix(payload, e.Quote) {
		t.Errorf("%d bytes are quoted, not those that were sent", len(e.Quote))
	}
}

func TestUDPErrorsOnTheWay(t *testing.T) {
	if !routed(t) {
		return
	}
	for _, c := range icmpCases {
		t.Run(c.name, func(t *testing.T) {
			g := newFakeGuest()
			u := hostMaps(t, g, 0)
			target := netip.AddrPortFrom(netip.MustParseAddr(c.target), 33434)
			payload := bytes.Repeat([]byte("p"), c.size)
			d := flow.Datagram{Guest: guestFor(target.Addr()), Target: target, Payload: payload, Hops: c.hops, DontFragment: true}
			if c.again {
				u.Datagram(d)
				take(t, g, &g.errors)
			}
			u.Datagram(d)
			e := take(t, g, &g.errors)
			c.check(t, e, payload)
			if e.Guest != d.Guest || e.Target != target || e.Proto != flow.UDP {
				t.Errorf("error is about %v, want %v > %v", e.Tuple, d.Guest, target)
			}
		})
	}
}

func TestUDPAcrossTheRouter(t *testing.T) {
	if !routed(t) {
		return
	}
	port := worldEcho(t)
	for _, world := range []netip.Addr{world4, world6} {
		t.Run(world.String(), func(t *testing.T) {
			g := newFakeGuest()
			u := hostMaps(t, g, 0)
			target := netip.AddrPortFrom(world, port)
			d := flow.Datagram{Guest: guestFor(world), Target: target, Payload: []byte("hello"), Hops: 63, DontFragment: true}

			u.Datagram(d)
			if got := take(t, g, &g.datagrams); got.Hops != defaultHops-2 || got.Target != target { // the router and we
				t.Errorf("guest got %+v, want hops %d", got, defaultHops-2)
			}
			d.Target = netip.AddrPortFrom(world, 1)
			u.Datagram(d)
			if e := take(t, g, &g.errors); e.ICMP != portUnreachable(world) || e.From != world || e.Target != d.Target {
				t.Errorf("guest got %+v, want port unreachable from %v", e, world)
			}
			// Without DF the host's kernel cuts what is too long, also in a train.
			d = flow.Datagram{Guest: d.Guest, Target: target, Payload: make([]byte, 60000), Hops: 63}
			u.Datagram(d)
			if world.Is6() { // no router cuts IPv6 packets: the source has to know
				e := take(t, g, &g.errors)
				if e.ICMP != packetTooBig6 || e.MTU != 1400 {
					t.Errorf("guest got %+v, mtu %d, want packet too big, mtu 1400", e.ICMP, e.MTU)
				}
				u.Datagram(d)
			}
			if got := take(t, g, &g.datagrams); len(got.Payload) != len(d.Payload) {
				t.Errorf("%d bytes came back, want %d", len(got.Payload), len(d.Payload))
			}
			d.Segment = 1450
			u.Datagram(d)
			for left := len(d.Payload); left > 0; {
				left -= len(take(t, g, &g.datagrams).Payload)
			}
			// A train that fits goes and comes as one.
			d.Segment, d.DontFragment = 1200, true
			u.Datagram(d)
			for left := len(d.Payload); left > 0; {
				left -= len(take(t, g, &g.datagrams).Payload)
			}
			if s := u.stats(); s.Mappings != 1 || s.Failed+s.TooBig+s.Full != 0 {
				t.Errorf("%+v, want one mapping and nothing failed", s)
			}
		})
	}
}

// TestUDPTraceroute sends what traceroute does: many ports, rising TTL.
func TestUDPTraceroute(t *testing.T) {
	if !routed(t) {
		return
	}
	for _, world := range []netip.Addr{world4, world6} {
		g := newFakeGuest()
		u := hostMaps(t, g, 0)
		near := nearRouter4
		if world.Is6() {
			near = nearRouter6
		}
		for probe := range 6 {
			hop := uint8(1 + probe/3)
			target := netip.AddrPortFrom(world, uint16(33434+probe))
			u.Datagram(flow.Datagram{Guest: guestFor(world), Target: target, Hops: hop, Payload: []byte("probe"), DontFragment: true})
			want := near
			if hop > 1 {
				want = world
			}
			if e := take(t, g, &g.errors); e.From != want || e.Target != target {
				t.Errorf("probe %d with TTL %d: %+v, want from %v", probe, hop, e, want)
			}
		}
	}
}
