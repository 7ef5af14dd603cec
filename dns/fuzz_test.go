package dns

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
)

// Whatever a guest sends is dropped, or answered by a response with its ID that
// fits its size.
func FuzzQuery(f *testing.F) {
	for _, m := range []*dns.Msg{
		question("host.docker.internal", dns.TypeA),
		question("host.docker.internal", dns.TypeANY).SetEdns0(1232, true),
		question("77.65.168.192.in-addr.arpa", dns.TypePTR),
		question("example.org", dns.TypeTXT).SetEdns0(100, false),
		new(dns.Msg).SetUpdate("example.org."),
	} {
		f.Add(packed(f, m))
	}
	s := New(Config{
		Names: builtIn, Subnets: subnets,
		Upstreams: func() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")} },
		Dial: func(context.Context, string, netip.AddrPort) (net.Conn, error) {
			return nil, errors.New("no network")
		},
	})
	f.Fuzz(func(t *testing.T, msg []byte) {
		q, reply, ok := s.accept(netip.Addr{}, msg, overUDP)
		if !ok {
			if isQuery(msg) {
				t.Fatal("a query was dropped")
			}
			return
		}
		if reply != nil {
			reply = q.fit(reply)
		} else {
			reply = s.resolve(t.Context(), &q, overUDP)
			s.queries.put(netip.Addr{})
		}
		if len(reply) < headerLen || id(reply) != id(msg) || reply[2]&flagQR == 0 || opcode(reply) != opcode(msg) {
			t.Fatalf("answered %x with %x", msg, reply)
		}
		if len(reply) > q.udpSize {
			t.Fatalf("answer of %d bytes for a guest that takes %d", len(reply), q.udpSize)
		}
	})
}

// Whatever an upstream sends is only taken for an answer if it repeats the
// question.
func FuzzAnswer(f *testing.F) {
	query := packed(f, question("example.org", dns.TypeA))
	f.Add(packed(f, new(dns.Msg).SetReply(question("EXAMPLE.org", dns.TypeA))))
	f.Add(query)
	f.Fuzz(func(t *testing.T, msg []byte) {
		q, err := parseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if len(msg) < headerLen || !q.answers(msg, id(msg)) || msg[5] == 0 {
			return
		}
		end := min(len(msg), len(query))
		if !bytes.EqualFold(msg[headerLen:end], query[headerLen:]) {
			t.Fatalf("%x was taken for an answer to %x", msg, query)
		}
	})
}

// Whatever the host's file holds, the guest's is one we can read back.
func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nsearch a.example b.example\noptions ndots:2 rotate\n"))
	f.Add([]byte("nameserver fe80::1%eth0\n# x\ndomain corp.example\noptions timeout:99 x:y use-vc edns0 attempts:3"))
	f.Fuzz(func(t *testing.T, file []byte) {
		c, err := parseResolvConf(bytes.NewReader(file))
		if err != nil {
			return
		}
		if len(c.Servers) == 0 {
			t.Fatal("no server")
		}
		again, err := parseResolvConf(bytes.NewReader(c.Guest(gateway4, gateway6)))
		if err != nil || len(again.Servers) != 2 || len(again.Ignored) != 0 {
			t.Fatalf("guest's file reads as %+v, %v", again, err)
		}
		if len(again.Search) != len(c.Search) || again.NDots != c.NDots || again.Timeout != c.Timeout {
			t.Fatalf("guest has %+v, host %+v", again, c)
		}
	})
}
