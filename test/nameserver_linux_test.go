package test

import (
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
	"github.com/slipway-net/slipway/test/topo"
)

// nameServer is the world's name server, at the addresses that /etc/resolv.conf
// of the tests names. It counts, and can play dead.
type nameServer struct {
	silent atomic.Bool // hear, and say nothing
	udp    atomic.Int32
	tcp    atomic.Int32
}

// zone is what the name server knows.
var zone = []string{
	"www.example.test. 60 IN A 203.0.113.10",
	"www.example.test. 60 IN AAAA 2001:db8:3::10",
	"registry.example.test. 60 IN A 203.0.113.11",
	"alias.example.test. 60 IN CNAME www.example.test.",
	"text.example.test. 60 IN TXT \"hello\" \"world\"",
	"_http._tcp.example.test. 60 IN SRV 1 2 80 www.example.test.",
	"example.test. 60 IN MX 10 www.example.test.",
	"example.test. 60 IN CAA 0 issue \"ca.example.test\"",
	"odd.example.test. 60 IN TYPE65280 \\# 4 0A000001",
	"10.113.0.203.in-addr.arpa. 60 IN PTR www.example.test.",
}

// bigName has an answer of several kilobytes.
const bigName = "big.example.test."

// startNameServer serves until the end of the test.
func startNameServer(t testing.TB, ns *topo.NS) *nameServer {
	t.Helper()
	s := new(nameServer)
	group := newGroup(t)
	for _, a := range []string{at(topo.DNS4, 53), at(topo.DNS6, 53)} {
		c, err := ns.ListenUDP(a)
		if err != nil {
			t.Fatal(err)
		}
		l, err := ns.Listen(a)
		if err != nil {
			t.Fatal(err)
		}
		group.add(c)
		group.add(l)
		for _, server := range []*dns.Server{
			{PacketConn: c, Handler: s.handler(&s.udp), UDPSize: 4096},
			{Listener: l, Handler: s.handler(&s.tcp)},
		} {
			group.Go(func() {
				if err := server.ActivateAndServe(); err != nil && !errors.Is(err, net.ErrClosed) {
					t.Logf("name server: %v", err)
				}
			})
		}
	}
	return s
}

func (s *nameServer) handler(count *atomic.Int32) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		count.Add(1)
		if s.silent.Load() {
			return
		}
		r := answer(q)
		if w.RemoteAddr().Network() == "udp" {
			size := dns.MinMsgSize
			if e := q.IsEdns0(); e != nil {
				size = int(e.UDPSize())
			}
			r.Truncate(size)
		}
		w.WriteMsg(r)
	}
}

func answer(q *dns.Msg) *dns.Msg {
	r := new(dns.Msg).SetReply(q)
	r.RecursionAvailable = true
	if e := q.IsEdns0(); e != nil {
		r.SetEdns0(1232, e.Do())
	}
	known := false
	for _, rr := range records() {
		h := rr.Header()
		if !strings.EqualFold(h.Name, q.Question[0].Name) {
			continue
		}
		known = true
		if h.Rrtype == q.Question[0].Qtype || h.Rrtype == dns.TypeCNAME {
			r.Answer = append(r.Answer, rr)
		}
	}
	if !known {
		r.Rcode = dns.RcodeNameError
	}
	return r
}

func records() []dns.RR {
	var all []dns.RR
	for _, line := range zone {
		rr, err := dns.NewRR(line)
		if err != nil {
			panic(err)
		}
		all = append(all, rr)
	}
	for i := range 20 {
		all = append(all, &dns.TXT{
			Hdr: dns.RR_Header{Name: bigName, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60},
			Txt: []string{strings.Repeat(string(rune('a'+i)), 200)},
		})
	}
	return all
}
