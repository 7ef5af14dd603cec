package forward

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/slipway-net/slipway/internal/flow"
)

// HostAccess says which ports of the host's loopback a guest reaches through the
// host address. The zero HostAccess denies all. It holds for TCP and UDP alike.
type HostAccess struct {
	All   bool
	Ports []PortRange // ignored when All is set
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// allows reports whether port may be reached.
func (h HostAccess) allows(port uint16) bool {
	return h.All || slices.ContainsFunc(h.Ports, func(r PortRange) bool { return r.First <= port && port <= r.Last })
}

// some reports whether any port may be reached.
func (h HostAccess) some() bool { return h.All || len(h.Ports) > 0 }

// HostAddresses says how the host's own addresses, other than its loopback, are
// treated when a guest names one.
type HostAddresses string

// The ways to treat the host's own addresses. The zero value is AllowHostAddresses.
const (
	AllowHostAddresses HostAddresses = "allow"          // like any address of the LAN
	AsHostAccess       HostAddresses = "as-host-access" // only the ports of HostAccess
)

// PolicyConfig is what a Policy is made of.
type PolicyConfig struct {
	// Gateway4 and Gateway6 are our own addresses towards the guest, Host4 and
	// Host6 the aliases of the host. A zero Addr means there is none.
	Gateway4, Gateway6 netip.Addr
	Host4, Host6       netip.Addr

	Subnets       []netip.Prefix // the guest's own networks
	HostAccess    HostAccess
	HostAddresses HostAddresses

	Log *slog.Logger // nil discards
}

// Policy decides what a guest may reach. It is constant and safe for concurrent use.
type Policy struct {
	cfg     PolicyConfig
	own     ownAddrs
	refusal refusalLog
}

// NewPolicy makes a Policy.
func NewPolicy(cfg PolicyConfig) *Policy {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Policy{cfg: cfg, own: ownAddrs{list: interfaceAddrs}, refusal: refusalLog{log: cfg.Log}}
}

// DeniedError says that policy refuses a target.
type DeniedError struct {
	Target netip.AddrPort // port 0 where the port does not matter
	Reason string         // what kind of address it is, in a few words
	Hint   string         // the setting that would allow it; empty if none does
	Answer flow.Answer    // what the guest gets: Silence, Reset or Unreachable
}

// Error implements error.
func (e *DeniedError) Error() string {
	if e.Target.Port() == 0 {
		return fmt.Sprintf("reach %v: %s", e.Target.Addr(), e.Reason)
	}
	return fmt.Sprintf("reach %v: %s", e.Target, e.Reason)
}

// Codes of "communication administratively prohibited" (RFC 1812 section 5.2.7.1,
// RFC 4443 section 3.1).
const (
	codeProhibited4 = 13
	codeProhibited6 = 1
)

// Verdict returns the answer to the guest. An Unreachable says that the
// communication is administratively prohibited.
func (e *DeniedError) Verdict() flow.Verdict {
	v := flow.Verdict{Answer: e.Answer}
	if e.Answer == flow.Unreachable {
		v.ICMP = flow.ICMP{Type: typeUnreachable6, Code: codeProhibited6}
		if e.Target.Addr().Is4() {
			v.ICMP = flow.ICMP{Type: typeUnreachable4, Code: codeProhibited4}
		}
	}
	return v
}

// asDenied returns the DeniedError in err, which comes from Route or Allowed.
func asDenied(err error, target netip.AddrPort) *DeniedError {
	var denied *DeniedError
	if errors.As(err, &denied) {
		return denied
	}
	return &DeniedError{Target: target, Reason: err.Error(), Answer: flow.Silence}
}

// never are the addresses that no socket of ours is ever pointed at, whatever the
// configuration says. The order matters where they overlap.
var never = []struct {
	prefix netip.Prefix
	reason string
	answer flow.Answer
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "address of this host (RFC 1122)", flow.Unreachable},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback address", flow.Unreachable},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local address", flow.Unreachable},
	{netip.MustParsePrefix("168.63.129.16/32"), "metadata service of a cloud", flow.Unreachable},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast address", flow.Silence},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast address", flow.Silence},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved address (RFC 1112)", flow.Unreachable},
	{netip.MustParsePrefix("::/128"), "unspecified address", flow.Unreachable},
	{netip.MustParsePrefix("::1/128"), "loopback address", flow.Unreachable},
	{netip.MustParsePrefix("fe80::/10"), "link-local address", flow.Unreachable},
	{netip.MustParsePrefix("fd00:ec2::254/128"), "metadata service of a cloud", flow.Unreachable},
	{netip.MustParsePrefix("ff00::/8"), "multicast address", flow.Silence},
}

// embeddings are the IPv6 networks whose addresses carry an IPv4 address, and where:
// a router that translates them would reach it for the guest. The octets are those of
// RFC 6052 section 2.2; octet 8 is skipped there.
var embeddings = []struct {
	prefix netip.Prefix
	octets [4]uint8
	guess  bool // one of several forms; 0.0.0.0/8 there says that it is another
}{
	{netip.MustParsePrefix("::ffff:0:0/96"), [4]uint8{12, 13, 14, 15}, false},   // mapped
	{netip.MustParsePrefix("::ffff:0:0:0/96"), [4]uint8{12, 13, 14, 15}, false}, // translated, RFC 7915
	{netip.MustParsePrefix("::/96"), [4]uint8{12, 13, 14, 15}, false},           // compatible, RFC 4291
	{netip.MustParsePrefix("64:ff9b::/96"), [4]uint8{12, 13, 14, 15}, false},    // NAT64, RFC 6052
	{netip.MustParsePrefix("64:ff9b:1::/48"), [4]uint8{12, 13, 14, 15}, true},   // NAT64, RFC 8215, any length
	{netip.MustParsePrefix("64:ff9b:1::/48"), [4]uint8{9, 10, 11, 12}, true},
	{netip.MustParsePrefix("64:ff9b:1::/48"), [4]uint8{7, 9, 10, 11}, true},
	{netip.MustParsePrefix("64:ff9b:1::/48"), [4]uint8{6, 7, 9, 10}, true},
	{netip.MustParsePrefix("2002::/16"), [4]uint8{2, 3, 4, 5}, false}, // 6to4, RFC 3056
}

// Allowed returns nil if a socket of the host may be pointed at target for a guest,
// and a *DeniedError otherwise. Every dial asks it, also after a name was resolved;
// the one thing it does not know is the host address, which Route translates.
func (p *Policy) Allowed(target netip.Addr) error {
	target = target.WithZone("")
	if denied := p.denied(target.Unmap()); denied != nil {
		denied.Target = netip.AddrPortFrom(target.Unmap(), 0)
		return denied
	}
	return nil
}

// denied says why a may not be dialled, nil if it may. The Target is the caller's.
func (p *Policy) denied(a netip.Addr) *DeniedError {
	if !a.IsValid() {
		return &DeniedError{Reason: "no address"}
	}
	for i := range never {
		if never[i].prefix.Contains(a) {
			return &DeniedError{Reason: never[i].reason, Answer: never[i].answer}
		}
	}
	for _, s := range p.cfg.Subnets {
		if !s.Contains(a) {
			continue
		}
		if a == lastAddr(s) {
			return &DeniedError{Reason: "broadcast address of the guest's own network", Answer: flow.Silence}
		}
		return &DeniedError{Reason: "address of the guest's own network", Answer: flow.Unreachable}
	}
	if a.Is4() {
		return nil
	}
	return p.deniedEmbedded(a)
}

// deniedEmbedded looks at the IPv4 addresses that a may carry.
func (p *Policy) deniedEmbedded(a netip.Addr) *DeniedError {
	b := a.As16()
	for i := range embeddings {
		e := &embeddings[i]
		if !e.prefix.Contains(a) || e.guess && b[e.octets[0]] == 0 {
			continue
		}
		v4 := netip.AddrFrom4([4]byte{b[e.octets[0]], b[e.octets[1]], b[e.octets[2]], b[e.octets[3]]})
		if denied := p.denied(v4); denied != nil {
			denied.Reason += " inside an IPv6 address"
			return denied
		}
	}
	return nil
}

// lastAddr returns the broadcast address of an IPv4 network, and the zero Addr for a
// network that has none.
func lastAddr(p netip.Prefix) netip.Addr {
	if !p.Addr().Is4() || p.Bits() > 30 {
		return netip.Addr{}
	}
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// Route says which addresses to dial for t, in this order until one answers, and why.
// The host address becomes both loopback addresses of the host, that of t's family
// first, if the port is allowed; any other target is itself, after Allowed. The error
// is a *DeniedError. A denied host access is logged with the setting that allows it.
func (p *Policy) Route(t flow.Tuple) (dials []netip.AddrPort, decision flow.Decision, err error) {
	r, err := p.route(t.Proto, t.Target)
	if err != nil {
		return nil, flow.Denied, err
	}
	return slices.Clone(r.dials[:r.n]), r.decision, nil
}

// route is what Route found, without an allocation.
type route struct {
	dials    [2]netip.AddrPort
	n        int
	decision flow.Decision
	anyPort  bool // the same holds for every port of this address
}

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// route is Route for the datapath.
func (p *Policy) route(proto flow.Proto, target netip.AddrPort) (route, error) {
	a, port := target.Addr().WithZone("").Unmap(), target.Port()
	if a.IsValid() && (a == p.cfg.Host4 || a == p.cfg.Host6) {
		if err := p.hostAllowed(proto, target, "the host address"); err != nil {
			return route{}, err
		}
		r := route{n: 2, decision: flow.ToHost}
		r.dials = [2]netip.AddrPort{netip.AddrPortFrom(loopback4, port), netip.AddrPortFrom(loopback6, port)}
		if a.Is6() {
			r.dials[0], r.dials[1] = r.dials[1], r.dials[0]
		}
		return r, nil
	}
	if err := p.Allowed(a); err != nil {
		return route{}, err
	}
	r := route{dials: [2]netip.AddrPort{netip.AddrPortFrom(a, port)}, n: 1, decision: flow.Direct, anyPort: true}
	if p.cfg.HostAddresses == AsHostAccess && p.own.contains(a) {
		if err := p.hostAllowed(proto, target, "an address of the host"); err != nil {
			return route{}, err
		}
		r.decision, r.anyPort = flow.ToHost, false
	}
	return r, nil
}

// hostAllowed returns nil if the guest may reach target's port on the host. A ping
// has no port: it may pass as soon as anything may.
func (p *Policy) hostAllowed(proto flow.Proto, target netip.AddrPort, what string) error {
	if proto == flow.Ping {
		if p.cfg.HostAccess.some() {
			return nil
		}
		return &DeniedError{
			Target: netip.AddrPortFrom(target.Addr(), 0), Answer: flow.Unreachable,
			Reason: what + " is not open to the guest",
			Hint:   `set host_access to a list of ports, or to "all"`,
		}
	}
	if p.cfg.HostAccess.allows(target.Port()) {
		return nil
	}
	e := &DeniedError{
		Target: target, Answer: flow.Reset,
		Reason: fmt.Sprintf("port %d of %s is not open to the guest", target.Port(), what),
		Hint:   fmt.Sprintf("add %d to host_access in slipway.toml, or start with --host-access %d", target.Port(), target.Port()),
	}
	p.refusal.note(proto, e)
	return e
}
