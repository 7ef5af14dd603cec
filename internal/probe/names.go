package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// maxServers is how many name servers of resolv.conf are asked, as many as the C
// library uses (MAXNS of resolv.conf(5)).
const maxServers = 3

// names asks every name server for the gateway, then the first that answers for
// everything else.
func (p *prober) names(ctx context.Context) {
	servers, err := p.servers()
	if err != nil {
		p.check(ctx, "dns", p.resolvConf, func(context.Context) (string, error) { return "", err })
		return
	}
	for _, server := range servers {
		p.check(ctx, "dns server", server, func(ctx context.Context) (string, error) {
			addrs, err := ask(ctx, "udp", server, gatewayName, dns.TypeA)
			var answer *rcodeError
			if p.server == "" && (err == nil || errors.As(err, &answer)) {
				p.server = server
			}
			if errors.As(err, &answer) && answer.rcode == dns.RcodeNameError {
				return "", fmt.Errorf("%w for %s: is this inside an engine of slipway, and does resolv.conf here name its gateway?", err, gatewayName)
			}
			return gatewayName + " " + join(addrs), err
		})
	}
	for _, name := range p.targets.allNames() {
		p.name(ctx, name)
	}
	p.reverse(ctx)
	p.check(ctx, "dns tcp", gatewayName, func(ctx context.Context) (string, error) {
		if p.server == "" {
			return "", errNoServer
		}
		addrs, err := ask(ctx, "tcp", p.server, gatewayName, dns.TypeA)
		return join(addrs), err
	})
}

// errNoServer skips what needs a name server.
const errNoServer = skip("no name server answered")

// servers reads addresses and ports of the name servers.
func (p *prober) servers() ([]string, error) {
	c, err := dns.ClientConfigFromFile(p.resolvConf)
	if err != nil {
		return nil, err
	}
	if len(c.Servers) == 0 {
		return nil, errors.New("it names no server")
	}
	port := c.Port
	if p.dnsPort != "" {
		port = p.dnsPort
	}
	var servers []string
	for _, s := range c.Servers[:min(len(c.Servers), maxServers)] {
		servers = append(servers, net.JoinHostPort(s, port))
	}
	return servers, nil
}

// name asks for both families' addresses of a name, which must have some.
func (p *prober) name(ctx context.Context, name string) {
	for _, t := range []struct {
		check string
		qtype uint16
		last  bool
	}{{"dns a", dns.TypeA, false}, {"dns aaaa", dns.TypeAAAA, true}} {
		p.check(ctx, t.check, name, func(ctx context.Context) (string, error) {
			if p.server == "" {
				return "", errNoServer
			}
			addrs, err := ask(ctx, "udp", p.server, name, t.qtype)
			p.known[name] = append(p.known[name], addrs...)
			switch {
			case err != nil:
				return "", err
			case len(addrs) > 0:
				return join(addrs), nil
			case t.last && len(p.known[name]) == 0:
				return "", errors.New("the name has no address in either family")
			}
			return "", skip("the name has no address in this family")
		})
	}
}

// reverse asks for the names of the addresses that were found, which must lead back
// to them.
func (p *prober) reverse(ctx context.Context) {
	var done []netip.Addr
	for _, name := range p.targets.allNames() {
		for _, a := range p.known[name] {
			if slices.Contains(done, a) {
				continue
			}
			done = append(done, a)
			p.check(ctx, "dns ptr", a.String(), func(ctx context.Context) (string, error) { return p.confirm(ctx, a) })
		}
	}
	if len(done) == 0 {
		p.skip(ctx, "dns ptr", "", "no address is known")
	}
}

// confirm returns the name of a, having made sure that it is a name of a.
func (p *prober) confirm(ctx context.Context, a netip.Addr) (string, error) {
	name, err := askPTR(ctx, p.server, a)
	if err != nil {
		return "", err
	}
	addrs, ok := p.known[name]
	if !ok {
		qtype := dns.TypeA
		if a.Is6() {
			qtype = dns.TypeAAAA
		}
		if addrs, err = ask(ctx, "udp", p.server, name, qtype); err != nil {
			return "", err
		}
	}
	if !slices.Contains(addrs, a) {
		return "", fmt.Errorf("%s is not a name of it", name)
	}
	return name, nil
}

// rcodeError is an answer that is none.
type rcodeError struct{ rcode int }

func (e *rcodeError) Error() string {
	if e.rcode == dns.RcodeNameError {
		return "no such name (NXDOMAIN)"
	}
	return "the server says " + dns.RcodeToString[e.rcode]
}

// ask returns the addresses of name, those of one family.
func ask(ctx context.Context, network, server, name string, qtype uint16) ([]netip.Addr, error) {
	r, err := exchange(ctx, network, server, new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype))
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for _, rr := range r.Answer {
		var ip net.IP
		switch rr := rr.(type) {
		case *dns.A:
			ip = rr.A
		case *dns.AAAA:
			ip = rr.AAAA
		}
		if a, ok := netip.AddrFromSlice(ip); ok {
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs, nil
}

// askPTR returns the first name of a, in lower case and without the last dot.
func askPTR(ctx context.Context, server string, a netip.Addr) (string, error) {
	reverse, err := dns.ReverseAddr(a.String())
	if err != nil {
		return "", err
	}
	r, err := exchange(ctx, "udp", server, new(dns.Msg).SetQuestion(reverse, dns.TypePTR))
	if err != nil {
		return "", err
	}
	for _, rr := range r.Answer {
		if ptr, ok := rr.(*dns.PTR); ok {
			return strings.TrimSuffix(strings.ToLower(ptr.Ptr), "."), nil
		}
	}
	return "", errors.New("the address has no name")
}

// exchange sends m, again if it stays unanswered over UDP, and returns a good answer.
func exchange(ctx context.Context, network, server string, m *dns.Msg) (*dns.Msg, error) {
	c := dns.Client{Net: network, Timeout: checkLimit}
	if network == "udp" {
		c.Timeout = repeatAt
	}
	for {
		r, _, err := c.ExchangeContext(ctx, m, server)
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() && ctx.Err() == nil {
			continue
		}
		if err != nil {
			return nil, err
		}
		if r.Rcode != dns.RcodeSuccess {
			return nil, &rcodeError{r.Rcode}
		}
		return r, nil
	}
}

func join(addrs []netip.Addr) string {
	var s []string
	for _, a := range addrs {
		s = append(s, a.String())
	}
	return strings.Join(s, ", ")
}
