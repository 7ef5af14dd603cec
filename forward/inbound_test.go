package forward

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
)

// testDoors are Doors that know where everything is and lead nowhere.
type testDoors struct {
	transparent bool
	ends        Ends
	places      map[netip.Addr]Place // Outside where it is not said
	listens     []netip.AddrPort
}

func (d *testDoors) Dial(context.Context, netip.AddrPort, netip.AddrPort) (flow.Conn, error) {
	return nil, errors.New("not in this test")
}

func (d *testDoors) Enters(netip.AddrPort) bool { return false }

func (d *testDoors) Enter(int, netip.AddrPort, netip.AddrPort, func(error)) (func(), error) {
	return nil, errors.New("not in this test")
}

func (d *testDoors) Has(k SocketKind) bool {
	return d.transparent || k != SocketTransparent4 && k != SocketTransparent6
}

func (d *testDoors) Socket(SocketKind, bool) (int, error) { return -1, ErrNoneReady }

func (d *testDoors) Where(a netip.Addr) Place {
	if p, ok := d.places[a]; ok {
		return p
	}
	return Outside
}

func (d *testDoors) Listens(_ flow.Proto, at netip.AddrPort) bool {
	return slices.Contains(d.listens, at)
}

func (d *testDoors) Ends() Ends { return d.ends }

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func aps(list ...string) (out []netip.AddrPort) {
	for _, s := range list {
		out = append(out, ap(s))
	}
	return out
}

// dockerDoors are those of an engine with a container behind docker0, and another
// network that hides the LAN's 10.9.0.0/16.
func dockerDoors(transparent bool) *testDoors {
	return &testDoors{
		transparent: transparent,
		ends: Ends{
			Gateway4: ip("192.168.65.1"), Host4: ip("192.168.65.2"), Guest4: ip("192.168.65.3"),
			Gateway6: ip("fdc4:f303:9324::1"), Host6: ip("fdc4:f303:9324::2"), Guest6: ip("fdc4:f303:9324::3"),
		},
		places: map[netip.Addr]Place{
			ip("192.168.65.3"): Local, ip("fdc4:f303:9324::3"): Local, ip("172.17.0.1"): Local,
			ip("172.17.0.2"): Inside, ip("fd17::2"): Inside, ip("10.9.0.7"): Inside,
			ip("203.0.113.5"): Unrouted, ip("10.8.0.1"): Unrouted,
		},
	}
}

// The ports of TestPassage.
var (
	inWildcard  = Inbound{Guest: ap("192.168.65.3:8080"), Wildcard: true, Preserve: true}
	inWildcard6 = Inbound{Guest: ap("[fdc4:f303:9324::3]:8080"), Wildcard: true, Preserve: true}
	inSpecific  = Inbound{Guest: ap("192.168.65.3:8080"), Behind: ap("172.17.0.2:80"), Preserve: true, Direct: true}
	inSpecific6 = Inbound{Guest: ap("[fdc4:f303:9324::3]:8080"), Behind: ap("[fd17::2]:80"), Preserve: true, Direct: true}
	inIndirect  = Inbound{Guest: ap("192.168.65.3:8080"), Behind: ap("172.17.0.2:80"), Preserve: true}
	inAddress   = Inbound{Guest: ap("172.17.0.2:80"), Preserve: true, Direct: true}
	inLoopback  = Inbound{Guest: ap("127.0.0.1:5432"), Preserve: true}
	inLoopback6 = Inbound{Guest: ap("[::1]:5432"), Preserve: true}
)

func with(in Inbound, change func(*Inbound)) Inbound {
	change(&in)
	return in
}

const (
	gateway4 = "192.168.65.1:0"
	gateway6 = "[fdc4:f303:9324::1]:0"
	theirs   = "" // from is the client
)

// TestPassage has a row for each combination of docs/publish.md, with and without the
// kernel path, and for every reason to fall back to the gateway.
func TestPassage(t *testing.T) {
	behind := func(s string) func(*Inbound) { return func(in *Inbound) { in.Behind = ap(s) } }
	gateway := func(in *Inbound) { in.Preserve = false }
	proxy := func(in *Inbound) { in.Proxy = true }
	for _, c := range []struct {
		name   string
		in     Inbound
		client string
		to     string
		from   string // theirs, or "none" with Plain
		tcp    Way    // with the kernel path
		slow   Way    // TCP without it
		udp    Way
		why    string
	}{
		// What the tables of docs/publish.md say.
		{"wildcard, loopback", inWildcard, "127.0.0.1:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, ""},
		{"wildcard, loopback, IPv6", inWildcard6, "[::1]:40000", "[fdc4:f303:9324::3]:8080", gateway6, Transparent, Wire, Wire, ""},
		{"wildcard, another loopback address", inWildcard, "127.9.9.9:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, ""},
		{"wildcard, another machine", inWildcard, "198.51.100.7:40000", "192.168.65.3:8080", theirs, Wire, Wire, Wire, ""},
		{"wildcard, another machine, IPv6", inWildcard6, "[2001:db8::7]:40000", "[fdc4:f303:9324::3]:8080", theirs, Wire, Wire, Wire, ""},
		{"wildcard, Docker's", with(inWildcard, behind("172.17.0.2:80")), "198.51.100.7:40000", "192.168.65.3:8080", theirs, Wire, Wire, Wire, ""},
		{"wildcard, Docker's, IPv6", with(inWildcard6, behind("[fd17::2]:80")), "[2001:db8::7]:40000", "[fdc4:f303:9324::3]:8080", theirs, Wire, Wire, Wire, ""},
		{"specific, direct, loopback", inSpecific, "127.0.0.1:40000", "172.17.0.2:80", gateway4, Transparent, Wire, Wire, ""},
		{"specific, direct, another machine", inSpecific, "198.51.100.7:40000", "172.17.0.2:80", theirs, Wire, Wire, Wire, ""},
		{"specific, direct, another machine, IPv6", inSpecific6, "[2001:db8::7]:40000", "[fd17::2]:80", theirs, Wire, Wire, Wire, ""},
		{"specific, not direct, loopback", inIndirect, "127.0.0.1:40000", "172.17.0.2:80", gateway4, Transparent, Plain, Plain, ""},
		{"specific, not direct, another machine", inIndirect, "198.51.100.7:40000", "172.17.0.2:80", gateway4, Transparent, Plain, Plain, whyIndirect},
		{"specific, nobody known behind", with(inWildcard, func(in *Inbound) { in.Wildcard = false }), "198.51.100.7:40000", "192.168.65.3:8080", theirs, Wire, Wire, Wire, ""},
		{"address, direct", inAddress, "198.51.100.7:40000", "172.17.0.2:80", theirs, Wire, Wire, Wire, ""},
		{"address, direct, loopback", inAddress, "127.0.0.1:40000", "172.17.0.2:80", gateway4, Transparent, Wire, Wire, ""},
		{"address of a container, all addresses", with(inAddress, func(in *Inbound) { in.Wildcard = true }), "198.51.100.7:40000", "172.17.0.2:80", theirs, Wire, Wire, Wire, ""},
		{"address, not direct", with(inAddress, func(in *Inbound) { in.Direct = false }), "198.51.100.7:40000", "172.17.0.2:80", gateway4, Transparent, Plain, Plain, whyIndirect},
		{"address of a bridge", Inbound{Guest: ap("172.17.0.1:53"), Preserve: true}, "198.51.100.7:40000", "172.17.0.1:53", theirs, Wire, Wire, Wire, ""},
		{"guest's loopback", inLoopback, "198.51.100.7:40000", "127.0.0.1:5432", "none", Plain, Plain, Plain, ""},
		{"guest's loopback from loopback", inLoopback, "127.0.0.1:40000", "127.0.0.1:5432", "none", Plain, Plain, Plain, ""},
		{"guest's loopback, IPv6", inLoopback6, "[2001:db8::7]:40000", "[::1]:5432", "none", Plain, Plain, Plain, ""},
		{"guest's loopback, other family", inLoopback, "[2001:db8::7]:40000", "127.0.0.1:5432", "none", Plain, Plain, Plain, ""},
		{"source_ip gateway", with(inWildcard, gateway), "198.51.100.7:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, ""},
		{"source_ip gateway, not direct", with(inIndirect, gateway), "198.51.100.7:40000", "172.17.0.2:80", gateway4, Transparent, Plain, Plain, ""},
		{"proxy_protocol", with(inWildcard, proxy), "198.51.100.7:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, ""},

		// The reasons to fall back.
		{"families differ behind a wildcard", with(inWildcard6, behind("172.17.0.2:80")), "[2001:db8::7]:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyFamily},
		{"families differ behind an address", inSpecific, "[2001:db8::7]:40000", "172.17.0.2:80", gateway4, Transparent, Wire, Wire, whyFamily},
		{"link-local", inWildcard6, "[fe80::7%eth0]:40000", "[fdc4:f303:9324::3]:8080", gateway6, Transparent, Wire, Wire, whyLinkLocal},
		{"link-local, IPv4", inWildcard, "169.254.7.7:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyLinkLocal},
		{"routed inside", inWildcard, "10.9.0.7:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyInside},
		{"the guest's own", inWildcard, "192.168.65.3:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyGuests},
		{"an address of the guest's bridge", inWildcard, "172.17.0.1:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyGuests},
		{"the gateway's", inWildcard, "192.168.65.1:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyGuests},
		{"the host alias", inWildcard, "192.168.65.2:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyGuests},
		{"no route back", inWildcard, "203.0.113.5:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyUnrouted},
		{"never on a wire", inWildcard, "240.0.0.1:40000", "192.168.65.3:8080", gateway4, Transparent, Wire, Wire, whyNeverWire},
		{"multicast", inWildcard6, "[ff02::1]:40000", "[fdc4:f303:9324::3]:8080", gateway6, Transparent, Wire, Wire, whyNeverWire},

		// Nothing of the host's, or of the world, is reached through a published port.
		{"an address outside", Inbound{Guest: ap("198.51.100.9:80"), Direct: true}, "198.51.100.7:40000", "198.51.100.9:80", "none", NoWay, NoWay, NoWay, whyNotInside},
		{"an address without a route", Inbound{Guest: ap("10.8.0.1:80"), Direct: true}, "127.0.0.1:40000", "10.8.0.1:80", "none", NoWay, NoWay, NoWay, whyNotInside},
		{"a container that is gone", Inbound{Guest: ap("192.168.65.3:80"), Behind: ap("172.18.0.2:80"), Direct: true}, "127.0.0.1:40000", "172.18.0.2:80", "none", NoWay, NoWay, NoWay, whyNotInside},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, kind := range []struct {
				name   string
				proto  flow.Proto
				kernel bool
				want   Way
			}{{"tcp", flow.TCP, true, c.tcp}, {"tcp without kernel path", flow.TCP, false, c.slow}, {"udp", flow.UDP, true, c.udp}} {
				p := c.in.passage(kind.proto, ap(c.client), dockerDoors(kind.kernel))
				var from netip.AddrPort
				switch {
				case kind.want == Plain || kind.want == NoWay:
				case c.from == theirs:
					from = ap(c.client)
				default:
					from = ap(c.from)
				}
				if p.way != kind.want || p.from != from || p.to != ap(c.to) || p.why != c.why {
					t.Errorf("%s: way %d from %v to %v (%q), want way %d from %v to %s (%q)",
						kind.name, p.way, p.from, p.to, p.why, kind.want, from, c.to, c.why)
				}
			}
		})
	}
}

// TestPassageOtherwise: every way but one has another behind it, and it comes to an end.
func TestPassageOtherwise(t *testing.T) {
	client, loop := ap("198.51.100.7:40000"), ap("127.0.0.1:40000")
	d := dockerDoors(true)
	for _, c := range []struct {
		name   string
		in     Inbound
		client netip.AddrPort
		ways   []Way
		froms  []string
		why    string
	}{
		{"the client's", inWildcard, client, []Way{Wire, Wire, NoWay}, []string{client.String(), gateway4}, whyInUse},
		{"the gateway's", inWildcard, loop, []Way{Transparent, Wire, NoWay}, []string{gateway4, gateway4}, ""},
		{"not direct", inIndirect, client, []Way{Transparent, Plain, NoWay}, []string{gateway4, "invalid AddrPort"}, whyIndirect},
		{"guest's loopback", inLoopback, client, []Way{Plain, NoWay}, []string{"invalid AddrPort"}, ""},
	} {
		p := c.in.passage(flow.TCP, c.client, d)
		for i, want := range c.ways {
			if p.way != want {
				t.Fatalf("%s: try %d is way %d, want %d", c.name, i, p.way, want)
			}
			if i < len(c.froms) && p.from.String() != c.froms[i] {
				t.Errorf("%s: try %d is from %v, want %s", c.name, i, p.from, c.froms[i])
			}
			if want != NoWay {
				p = p.otherwise(c.client, d)
			}
		}
		if p.why != c.why {
			t.Errorf("%s: in the end %q, want %q", c.name, p.why, c.why)
		}
	}
}

// TestPassageSecond: where else a client is led that the guest has refused.
func TestPassageSecond(t *testing.T) {
	const own4, own6 = "192.168.65.3:8080", "[fdc4:f303:9324::3]:8080"
	either := func(in *Inbound) { in.Either = true }
	in4, in6 := with(inWildcard, either), with(inWildcard6, either)
	only4 := *dockerDoors(true)
	only4.ends.Guest6 = netip.Addr{}
	for _, c := range []struct {
		name    string
		in      Inbound
		client  string
		listens []netip.AddrPort
		doors   *testDoors
		want    passage
	}{
		{"server of IPv4", in6, "[2001:db8::7]:40000", aps(own4), nil, passage{Transparent, ap(gateway4), ap(own4), false, whyFamily}},
		{"server of IPv6", in4, "198.51.100.7:40000", aps(own6), nil, passage{Transparent, ap(gateway6), ap(own6), false, whyFamily}},
		{"without the kernel path", in4, "198.51.100.7:40000", aps(own6), dockerDoors(false), passage{Wire, ap(gateway6), ap(own6), false, whyFamily}},
		{"both families by one socket", in4, "[2001:db8::7]:40000", aps(own6), nil, passage{Wire, ap("[2001:db8::7]:40000"), ap(own6), false, ""}},
		{"loopback", in6, "[::1]:40000", nil, nil, passage{Transparent, ap(gateway4), ap(own4), false, ""}},
		{"loopback, IPv4", in4, "127.0.0.1:40000", nil, nil, passage{Transparent, ap(gateway6), ap(own6), false, ""}},
		{"nobody", in4, "198.51.100.7:40000", nil, nil, passage{}},
		{"a firewall", in4, "198.51.100.7:40000", aps(own4, own6), nil, passage{}},
		{"a firewall, IPv6", in6, "[2001:db8::7]:40000", aps(own4, own6), nil, passage{}},
		{"guest without IPv6", in4, "127.0.0.1:40000", nil, &only4, passage{}},
		{"an address was asked", inWildcard, "127.0.0.1:40000", aps(own6), nil, passage{}},
	} {
		d := c.doors
		if d == nil {
			d = dockerDoors(true)
		}
		d.listens = c.listens
		client := ap(c.client)
		p := c.in.after(c.in.passage(flow.TCP, client, d), syscall.ECONNREFUSED, flow.TCP, client, d)
		if p != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, p, c.want)
		}
		if again := c.in.after(p, syscall.ECONNREFUSED, flow.TCP, client, d); again.way != NoWay {
			t.Errorf("%s: then %+v, want no other", c.name, again)
		}
	}
}

// TestPassageSilence: who gets no answer from within comes by the wire, once, unless the wire
// leads to nobody.
func TestPassageSilence(t *testing.T) {
	d, loopback := dockerDoors(true), ap("127.0.0.1:40000")
	for _, c := range []struct {
		name   string
		in     Inbound
		client netip.AddrPort
		want   passage
	}{
		{"from within", inWildcard, loopback, passage{Wire, ap(gateway4), ap("192.168.65.3:8080"), false, ""}},
		{"by the wire", with(inWildcard, func(in *Inbound) { in.Either = true }), ap("198.51.100.7:40000"), passage{}},
		{"not direct", inIndirect, loopback, passage{}},
		{"guest's loopback", inLoopback, loopback, passage{}},
	} {
		for _, silence := range []error{os.ErrDeadlineExceeded, context.DeadlineExceeded} {
			p := c.in.after(c.in.passage(flow.TCP, c.client, d), silence, flow.TCP, c.client, d)
			if p != c.want {
				t.Errorf("%s: %+v, want %+v", c.name, p, c.want)
			}
			if again := c.in.after(p, silence, flow.TCP, c.client, d); again.way != NoWay {
				t.Errorf("%s: then %+v, want no other", c.name, again)
			}
		}
	}
}
