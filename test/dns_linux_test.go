package test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/slipway-net/slipway/test/topo"
)

// query asks the server at address from inside ns.
func query(t testing.TB, ns *topo.NS, network string, server netip.Addr, q *dns.Msg, within time.Duration) (*dns.Msg, error) {
	t.Helper()
	c, err := ns.Dial(network, at(server, 53), within)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(within))
	conn := &dns.Conn{Conn: c, UDPSize: dns.MaxMsgSize}
	if err := conn.WriteMsg(q); err != nil {
		return nil, err
	}
	r, err := conn.ReadMsg()
	if err == nil && r.Id != q.Id {
		return nil, fmt.Errorf("answer %d to query %d", r.Id, q.Id)
	}
	return r, err
}

// ask3 is query, up to three times, as resolvers ask: a datagram may get lost on a busy
// machine.
func ask3(t testing.TB, ns *topo.NS, network string, server netip.Addr, q *dns.Msg) (r *dns.Msg, err error) {
	t.Helper()
	for range 3 {
		if r, err = query(t, ns, network, server, q, 10*time.Second); !isTimeout(err) {
			break
		}
		t.Logf("%s %v: %v", network, q.Question[0], err)
	}
	return r, err
}

func question(name string, kind uint16) *dns.Msg {
	return new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
}

// TestBuiltInNames: the gateway answers for itself and for the host, both ways.
func TestBuiltInNames(t *testing.T) {
	names := map[string][2]netip.Addr{
		"host.slipway.internal":    {topo.HostAlias4, topo.HostAlias6},
		"gateway.slipway.internal": {topo.Gateway4, topo.Gateway6},
		"host.docker.internal":     {topo.HostAlias4, topo.HostAlias6},
		"gateway.docker.internal":  {topo.Gateway4, topo.Gateway6},
		"host.containers.internal": {topo.HostAlias4, topo.HostAlias6},
		"HOST.Docker.Internal":     {topo.HostAlias4, topo.HostAlias6},
	}
	eachEngine(t, func(t *testing.T, g *guest) {
		s := startNameServer(t, g.net.World)
		eachFamily(t, func(t *testing.T, f family) {
			for name, want := range names {
				for i, kind := range []uint16{dns.TypeA, dns.TypeAAAA} {
					r, err := ask3(t, g.ns, "udp", f.gateway, question(name, kind))
					if err != nil || !slices.Equal(addresses(r), want[i:i+1]) {
						t.Errorf("%s %s: %v, %v", name, dns.TypeToString[kind], r, err)
					}
				}
			}
			for _, a := range []netip.Addr{topo.HostAlias4, topo.HostAlias6, topo.Gateway4, topo.Gateway6} {
				reverse, _ := dns.ReverseAddr(a.String())
				r, err := ask3(t, g.ns, "tcp", f.gateway, question(reverse, dns.TypePTR))
				if err != nil || len(r.Answer) == 0 || !strings.HasSuffix(r.Answer[0].(*dns.PTR).Ptr, ".slipway.internal.") {
					t.Errorf("PTR %v: %v, %v", a, r, err)
				}
			}
		})
		if n := s.udp.Load() + s.tcp.Load(); n != 0 {
			t.Errorf("%d queries for our own names left the host", n)
		}
	})
}

func addresses(r *dns.Msg) []netip.Addr {
	var all []netip.Addr
	for _, rr := range r.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			a, _ := netip.AddrFromSlice(rr.A.To4())
			all = append(all, a)
		case *dns.AAAA:
			a, _ := netip.AddrFromSlice(rr.AAAA)
			all = append(all, a)
		}
	}
	return all
}

// TestDNSPassThrough compares the gateway's answers with the server's own, for
// every kind of record, over UDP and TCP, with and without EDNS0.
func TestDNSPassThrough(t *testing.T) {
	questions := []*dns.Msg{
		question("www.example.test", dns.TypeA),
		question("www.example.test", dns.TypeAAAA),
		question("alias.example.test", dns.TypeA),
		question("text.example.test", dns.TypeTXT),
		question("_http._tcp.example.test", dns.TypeSRV),
		question("example.test", dns.TypeMX),
		question("example.test", dns.TypeCAA),
		question("odd.example.test", 65280),
		question("10.113.0.203.in-addr.arpa", dns.TypePTR),
		question("nobody.example.test", dns.TypeA),
		question("text.example.test", dns.TypeTXT).SetEdns0(1232, true),
		question(bigName, dns.TypeTXT),
		question(bigName, dns.TypeTXT).SetEdns0(1232, false),
		question(bigName, dns.TypeTXT).SetEdns0(8000, false),
	}
	eachEngine(t, func(t *testing.T, g *guest) {
		startNameServer(t, g.net.World)
		eachFamily(t, func(t *testing.T, f family) {
			for _, network := range []string{"udp", "tcp"} {
				for _, q := range questions {
					want, err := ask3(t, g.net.Host, network, topo.DNS4, q)
					if err != nil {
						t.Fatal(err)
					}
					got, err := ask3(t, g.ns, network, f.gateway, q)
					if err != nil {
						t.Errorf("%s %v: %v", network, q.Question[0], err)
						continue
					}
					if got.Truncated && want.Truncated {
						continue // how much fits is the server's choice
					}
					if got.String() != want.String() {
						t.Errorf("%s: got\n%v\nthe server says\n%v", network, got, want)
					}
				}
			}
		})
	})
}

// TestDeadNameServers: where no server answers, the guest is told within 6 s.
func TestDeadNameServers(t *testing.T) {
	eachEngineAtOnce(t, func(t *testing.T, g *guest) {
		s := startNameServer(t, g.net.World)
		s.silent.Store(true)
		var took time.Duration
		for range 3 { // a machine that stalls now and then is not always late
			start := time.Now()
			r, err := query(t, g.ns, "udp", topo.Gateway4, question("www.example.test", dns.TypeA), 20*time.Second)
			if err != nil || r.Rcode != dns.RcodeServerFailure {
				t.Fatalf("no server answers: %v, %v", r, err)
			}
			if took = time.Since(start); took <= 6*time.Second {
				break
			}
		}
		if took > 6*time.Second {
			t.Errorf("SERVFAIL took %v", took)
		}
		s.silent.Store(false)
		if r, err := ask3(t, g.ns, "udp", topo.Gateway4, question("www.example.test", dns.TypeA)); err != nil || len(r.Answer) != 1 {
			t.Errorf("after the servers came back: %v, %v", r, err)
		}
	})
}
