package publish

import (
	"fmt"
	"net/netip"

	"github.com/slipway-net/slipway/internal/flow"
)

// normalize checks what can be told from s alone and gives it the one form in which
// specs are compared.
func normalize(s flow.PortSpec) (flow.PortSpec, error) {
	s.Host = unmap(s.Host)
	s.Guest = unmap(s.Guest)
	s.Behind = unmap(s.Behind)
	if s.Guest.Addr().IsUnspecified() {
		s.Guest = netip.AddrPortFrom(netip.Addr{}, s.Guest.Port())
	}
	if s.Guest.Port() == 0 {
		s.Guest = netip.AddrPortFrom(s.Guest.Addr(), s.Host.Port())
	}
	if why := invalid(s); why != "" {
		return s, &SpecError{s, why, ""}
	}
	return s, nil
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// invalid says what is wrong with a normalized spec.
func invalid(s flow.PortSpec) string {
	for _, a := range []netip.Addr{s.Host.Addr(), s.Guest.Addr(), s.Behind.Addr()} {
		if a.IsMulticast() || a == broadcast {
			return fmt.Sprintf("%v is not an address of one machine", a)
		}
	}
	behind := s.Behind.Addr()
	switch {
	case s.Proto != flow.TCP && s.Proto != flow.UDP:
		return "only tcp and udp ports can be published"
	case s.Behind != netip.AddrPort{} && (!behind.IsValid() || behind.IsUnspecified() || s.Behind.Port() == 0):
		return fmt.Sprintf("%v is not an address and port of a container", s.Behind)
	case s.Source != "" && s.Source != flow.SourcePreserve && s.Source != flow.SourceGateway:
		return fmt.Sprintf("source %q is not %q or %q", s.Source, flow.SourcePreserve, flow.SourceGateway)
	case s.ProxyProtocol && s.Proto != flow.TCP:
		return "a PROXY protocol header needs tcp"
	}
	return ""
}

// rules are the part of Config that may change.
type rules struct {
	bind    string
	allowed func(uint16) bool
	source  flow.Source
}

var (
	any4  = netip.IPv4Unspecified()
	any6  = netip.IPv6Unspecified()
	loop4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loop6 = netip.IPv6Loopback()
)

// claims returns where a spec is to listen, or the *PolicyError that it may not.
func (r rules) claims(asked flow.PortSpec) ([]netip.AddrPort, error) {
	host, port := asked.Host.Addr(), asked.Host.Port()
	if port != 0 && r.allowed != nil && !r.allowed(port) {
		return nil, &PolicyError{asked, fmt.Sprintf("port %d is not in publish_ports", port), "add it to publish_ports in slipway.toml"}
	}
	if !wildcard(asked) && r.bind != "" && r.bind != BindAsAsked && r.bind != BindLoopbackDefault && !host.IsLoopback() {
		return nil, &PolicyError{asked, "publish_bind allows loopback addresses only", "ask for 127.0.0.1 or [::1], or set publish_bind (--publish-bind) to something else"}
	}
	v4, v6 := any4, any6
	if r.bind != "" && r.bind != BindAsAsked {
		v4, v6 = loop4, loop6
	}
	var addrs []netip.Addr
	switch {
	case !host.IsValid():
		addrs = []netip.Addr{v4, v6}
	case host == any4:
		addrs = []netip.Addr{v4}
	case host == any6:
		addrs = []netip.Addr{v6}
	default:
		addrs = []netip.Addr{host}
	}
	claims := make([]netip.AddrPort, len(addrs))
	for i, a := range addrs {
		claims[i] = netip.AddrPortFrom(a, port)
	}
	return claims, nil
}

// wildcard reports whether a spec names no specific address of the host. 0.0.0.0 and [::]
// do not: dockerd says them for `-p 80:80`, too.
func wildcard(s flow.PortSpec) bool {
	return !s.Host.Addr().IsValid() || s.Host.Addr().IsUnspecified()
}

// Overlap reports whether sockets of one port cannot have both addresses.
func Overlap(a, b netip.Addr) bool {
	return a == b || a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified())
}

// means reports whether a normalized spec asks for just what e is, if perhaps in the
// words of e.port.Spec. The caller must know that e is not busy.
func (e *entry) means(s flow.PortSpec) bool {
	p := e.port.Spec
	if s == e.asked {
		return true
	}
	guest := s.Guest == p.Guest || s.Guest.Addr() == e.asked.Guest.Addr() && s.Guest.Port() == p.Guest.Port()
	return guest && s.Proto == p.Proto && s.Host == p.Host && s.Behind == p.Behind &&
		s.ProxyProtocol == p.ProxyProtocol && (s.Source == p.Source || s.Source == e.asked.Source)
}

// names reports whether somebody who says s can mean p.
func names(s, p flow.PortSpec) bool {
	return s.Proto == p.Proto && s.Host == p.Host && s.Guest.Port() == p.Guest.Port() &&
		(!s.Guest.Addr().IsValid() || s.Guest.Addr() == p.Guest.Addr())
}

// name is where a spec listens as errors have it: 0.0.0.0:8080/tcp.
func name(s flow.PortSpec) string {
	a := s.Host.Addr()
	if !a.IsValid() {
		a = any4
	}
	return fmt.Sprintf("%v/%v", netip.AddrPortFrom(a, s.Host.Port()), s.Proto)
}

// inside asks Config.Inside about the addresses of a spec.
func (b *Book) inside(s flow.PortSpec) error {
	if b.cfg.Inside == nil {
		return nil
	}
	for _, a := range []netip.Addr{s.Guest.Addr(), s.Behind.Addr()} {
		if !a.IsValid() || a.IsLoopback() || a == b.cfg.Guest4 || a == b.cfg.Guest6 {
			continue
		}
		if err := b.cfg.Inside(a); err != nil {
			bad := &SpecError{s, err.Error(), ""}
			if h, ok := err.(interface{ Hint() string }); ok {
				bad.hint = h.Hint()
			}
			return bad
		}
	}
	return nil
}
