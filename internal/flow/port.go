package flow

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// PortSpec asks for one published port: where the host listens, and which address and
// port of the guest its clients reach.
type PortSpec struct {
	Proto Proto // TCP or UDP

	// Host is where to listen. The unspecified address of a family stands for all
	// of that family's addresses, the zero Addr for all of both. Port 0 lets the
	// host's kernel choose.
	Host netip.AddrPort

	// Guest is what a client reaches. The zero Addr stands for the engine's own
	// address: what listens there beyond its loopback, and what the engine's own
	// rules lead elsewhere (dockerd's DNAT to a container). Port 0 stands for the
	// port of Host.
	Guest netip.AddrPort

	// Behind is the container's address and port where the one who publishes knows
	// them; the zero AddrPort otherwise. It is reached where Guest is not, see
	// docs/publish.md.
	Behind netip.AddrPort

	// Source says which address the guest sees.
	Source Source

	// ProxyProtocol has every TCP connection begin with a PROXY protocol header of
	// version 2 that names the client.
	ProxyProtocol bool
}

// Source says which client address a guest sees behind a published port.
type Source string

// The values of a Source. The zero Source is the engine's configured one.
const (
	SourcePreserve Source = "preserve" // the client's own, where docs/publish.md says it is possible
	SourceGateway  Source = "gateway"  // always the gateway's
)

// ParsePorts reads the notation of the command line,
//
//	[HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]
//
// where ports may be ranges of one length, a-b:c-d, HOSTPORT may be 0, IPv6 addresses
// are in brackets, and the protocol is tcp if there is none. It returns one PortSpec for
// each port.
func ParsePorts(s string) ([]PortSpec, error) {
	p, err := ParsePortSpecs(s)
	if err != nil {
		return nil, err
	}
	return p.All(), nil
}

// PortSpecs are those that one word in the notation of ParsePorts asks for, before they are
// written out: of a short word there may be 65535.
type PortSpecs struct {
	proto           Proto
	hostIP, guestIP netip.Addr
	host, guest     portRange
}

// ParsePortSpecs is ParsePorts for whoever minds how many there are.
func ParsePortSpecs(s string) (PortSpecs, error) {
	p, err := parsePorts(s)
	if err != nil {
		return PortSpecs{}, fmt.Errorf("port %q: %w", s, err)
	}
	return p, nil
}

// Len is how many there are.
func (p PortSpecs) Len() int { return p.guest.n() }

// All writes them out.
func (p PortSpecs) All() []PortSpec {
	specs := make([]PortSpec, p.Len())
	for i := range specs {
		specs[i] = PortSpec{
			Proto: p.proto,
			Host:  netip.AddrPortFrom(p.hostIP, p.host.at(i)),
			Guest: netip.AddrPortFrom(p.guestIP, p.guest.at(i)),
		}
	}
	return specs
}

// errNotation is what anything of another shape gets.
var errNotation = errors.New("must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]")

func parsePorts(s string) (p PortSpecs, err error) {
	rest, word, named := strings.Cut(s, "/")
	if p.proto, err = parseProto(word, named); err != nil {
		return p, err
	}
	words, err := splitColons(rest)
	if err != nil {
		return p, err
	}
	if err := checkHostname(words); err != nil {
		return p, err
	}
	if isAddr(words[0]) {
		if p.hostIP, err = parseAddr(words[0]); err != nil {
			return p, err
		}
		words = words[1:]
	}
	if len(words) == 3 {
		if p.guestIP, err = parseAddr(words[1]); err != nil {
			return p, err
		}
		if p.guestIP.IsValid() && p.guestIP.IsUnspecified() {
			return p, fmt.Errorf("%v is no address of a guest: leave it out for the engine's own", p.guestIP)
		}
		words = []string{words[0], words[2]}
	}
	if len(words) != 2 {
		return p, errNotation
	}
	p.host, p.guest, err = parseRanges(words[0], words[1])
	return p, err
}

func parseProto(word string, named bool) (Proto, error) {
	switch {
	case !named, word == "tcp":
		return TCP, nil
	case word == "udp":
		return UDP, nil
	}
	return 0, fmt.Errorf("protocol %q is not tcp or udp", word)
}

// splitColons splits at the colons outside of brackets into two to four words.
func splitColons(s string) ([]string, error) {
	var words []string
	depth, from := 0, 0
	for i, r := range s {
		switch r {
		case '[':
			depth++
		case ']':
			depth--
		case ':':
			if depth == 0 {
				words = append(words, s[from:i])
				from = i + 1
			}
		}
	}
	words = append(words, s[from:])
	if depth != 0 {
		return nil, errors.New("brackets do not match")
	}
	switch {
	case len(words) == 1 && allDigits(s):
		return nil, fmt.Errorf("%w; 0:%s is any port of the host", errNotation, s)
	case len(words) == 1 && isRange(s):
		return nil, fmt.Errorf("%w; %s:%s are the same ports of host and guest", errNotation, s, s)
	case len(words) > 4 && strings.Contains(s, "::"):
		return nil, fmt.Errorf("%w, IPv6 addresses in brackets", errNotation)
	case len(words) < 2 || len(words) > 4:
		return nil, errNotation
	}
	return words, nil
}

func allDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// isRange reports whether s is meant as a range of ports.
func isRange(s string) bool {
	first, last, found := strings.Cut(s, "-")
	return found && allDigits(first) && allDigits(last)
}

// checkHostname finds a name where the host's address belongs.
func checkHostname(words []string) error {
	if first := words[0]; len(words) > 2 && !isAddr(first) && strings.Trim(first, "0123456789-") != "" {
		return fmt.Errorf("%q is neither an IP address nor a port", first)
	}
	return nil
}

// isAddr reports whether a word is meant as an address: it has something that no
// port has.
func isAddr(s string) bool { return strings.ContainsAny(s, ".[]*") }

// parseAddr takes 192.0.2.1 or [2001:db8::1]; "*" is every address.
func parseAddr(s string) (netip.Addr, error) {
	if s == "*" {
		return netip.Addr{}, nil
	}
	bare := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		bare = s[1 : len(s)-1]
	}
	a, err := netip.ParseAddr(bare)
	if err != nil || a.Zone() != "" || a.Is6() != (bare != s) {
		return netip.Addr{}, fmt.Errorf("%q is not an IP address, IPv6 in brackets", s)
	}
	return a.Unmap(), nil
}

// portRange is a range of ports, both ends included; that of the zero portRange is any
// number of zeros.
type portRange struct{ first, last int }

func (r portRange) n() int { return r.last - r.first + 1 }

func (r portRange) at(i int) uint16 {
	if r == (portRange{}) {
		return 0
	}
	return uint16(r.first + i)
}

func parseRanges(hostPorts, guestPorts string) (host, guest portRange, err error) {
	if host, err = parseRange(hostPorts, 0); err != nil {
		return host, guest, err
	}
	if guest, err = parseRange(guestPorts, 1); err != nil {
		return host, guest, err
	}
	if host != (portRange{}) && host.n() != guest.n() {
		err = fmt.Errorf("%s and %s are of different length", hostPorts, guestPorts)
	}
	return host, guest, err
}

// parseRange takes N or N-M.
func parseRange(s string, least int) (r portRange, err error) {
	first, last, found := strings.Cut(s, "-")
	if !found {
		last = first
	}
	if r.first, err = parsePort(first, least); err != nil {
		return r, err
	}
	if r.last, err = parsePort(last, least); err != nil {
		return r, err
	}
	if r.last < r.first || found && r.first == 0 {
		return r, fmt.Errorf("%q is no range of ports", s)
	}
	return r, nil
}

func parsePort(s string, least int) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || int(n) < least {
		return 0, fmt.Errorf("%q is not a port in %d..65535", s, least)
	}
	return int(n), nil
}

// String returns s in the notation of ParsePorts, which has no place for Behind, Source
// and ProxyProtocol.
func (s PortSpec) String() string {
	var b strings.Builder
	if s.Host.Addr().IsValid() {
		b.WriteString(bracketed(s.Host.Addr()) + ":")
	}
	fmt.Fprintf(&b, "%d:", s.Host.Port())
	if s.Guest.Addr().IsValid() {
		b.WriteString(bracketed(s.Guest.Addr()) + ":")
	}
	port := s.Guest.Port()
	if port == 0 {
		port = s.Host.Port()
	}
	fmt.Fprintf(&b, "%d/%v", port, s.Proto)
	return b.String()
}

func bracketed(a netip.Addr) string {
	if a.Is6() {
		return "[" + a.String() + "]"
	}
	return a.String()
}
