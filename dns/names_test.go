package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func TestBuiltInNames(t *testing.T) {
	s, addr := serve(t, refusing(t))
	reverse := func(a netip.Addr) string {
		r, err := dns.ReverseAddr(a.String())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	tests := []struct {
		name  string
		qtype uint16
		rcode int
		want  string // of the answer section
	}{
		{"host.slipway.internal", dns.TypeA, dns.RcodeSuccess, "192.168.65.2"},
		{"host.slipway.internal", dns.TypeAAAA, dns.RcodeSuccess, "fdc4:f303:9324::2"},
		{"host.docker.internal", dns.TypeA, dns.RcodeSuccess, "192.168.65.2"},
		{"HOST.docker.INTERNAL", dns.TypeAAAA, dns.RcodeSuccess, "fdc4:f303:9324::2"},
		{"gateway.slipway.internal", dns.TypeANY, dns.RcodeSuccess, "192.168.65.1 fdc4:f303:9324::1"},
		{"host.slipway.internal", dns.TypeTXT, dns.RcodeSuccess, ""},
		{"host.slipway.internal", dns.TypeHTTPS, dns.RcodeSuccess, ""},
		{"only4.example.org", dns.TypeAAAA, dns.RcodeSuccess, ""},
		{reverse(host4), dns.TypePTR, dns.RcodeSuccess, "host.slipway.internal."},
		{reverse(host6), dns.TypePTR, dns.RcodeSuccess, "host.slipway.internal."},
		{strings.ToUpper(reverse(gateway6)), dns.TypePTR, dns.RcodeSuccess, "gateway.slipway.internal."},
		{reverse(netip.MustParseAddr("192.0.2.4")), dns.TypePTR, dns.RcodeSuccess, "only4.example.org."},
		{reverse(host4), dns.TypeA, dns.RcodeSuccess, ""},
		{reverse(netip.MustParseAddr("192.168.65.77")), dns.TypePTR, dns.RcodeNameError, ""},
		{reverse(netip.MustParseAddr("fdc4:f303:9324::77")), dns.TypePTR, dns.RcodeNameError, ""},
	}
	for _, network := range []string{"udp", "tcp"} {
		for _, tt := range tests {
			t.Run(fmt.Sprintf("%s/%s/%s", network, tt.name, dns.TypeToString[tt.qtype]), func(t *testing.T) {
				r := ask(t, network, addr, question(tt.name, tt.qtype))
				if r.Rcode != tt.rcode || !r.Authoritative || r.Truncated {
					t.Errorf("header %v, want rcode %v, authoritative", r.MsgHdr, dns.RcodeToString[tt.rcode])
				}
				if got := texts(r.Answer); got != tt.want {
					t.Errorf("answer %q, want %q", got, tt.want)
				}
				if _, isSOA := first(r.Ns).(*dns.SOA); isSOA != (tt.want == "") {
					t.Errorf("authority %v: a SOA belongs to, and only to, an empty answer", r.Ns)
				}
			})
		}
	}
	if n := s.Stats(); n.Tries != 0 || int(n.BuiltIn) != 2*len(tests) {
		t.Errorf("stats %+v, want %d built-in answers and no tries upstream", n, 2*len(tests))
	}
}

func first(rrs []dns.RR) dns.RR {
	if len(rrs) == 0 {
		return nil
	}
	return rrs[0]
}

// texts joins the values of records.
func texts(rrs []dns.RR) string {
	var out []string
	for _, rr := range rrs {
		switch rr := rr.(type) {
		case *dns.A:
			out = append(out, rr.A.String())
		case *dns.AAAA:
			out = append(out, rr.AAAA.String())
		case *dns.PTR:
			out = append(out, rr.Ptr)
		case *dns.TXT:
			out = append(out, strings.Join(rr.Txt, ""))
		}
	}
	return strings.Join(out, " ")
}

func TestBuiltInEDNS(t *testing.T) {
	_, addr := serve(t)
	m := question("host.slipway.internal", dns.TypeA).SetEdns0(4096, true)
	r := ask(t, "udp", addr, m)
	if o := r.IsEdns0(); o == nil || !o.Do() {
		t.Errorf("OPT %v, want one with the DO bit", o)
	}
	m.IsEdns0().SetVersion(7)
	if r := ask(t, "udp", addr, m); r.Rcode != dns.RcodeBadVers || len(r.Answer) != 0 {
		t.Errorf("version 7: %v with %d answers, want BADVERS with none", dns.RcodeToString[r.Rcode], len(r.Answer))
	}
}

// Names near the built-in ones belong to the host's servers.
func TestNotBuiltIn(t *testing.T) {
	table := newNameTable(builtIn, subnets)
	chaos := question("host.slipway.internal", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	notify := question("host.slipway.internal", dns.TypeSOA)
	notify.Opcode = dns.OpcodeNotify
	two := question("host.slipway.internal", dns.TypeA)
	two.Question = append(two.Question, two.Question[0])
	tests := map[string]*dns.Msg{
		"below":          question("a.host.slipway.internal", dns.TypeA),
		"above":          question("slipway.internal", dns.TypeA),
		"escaped dot":    question(`host\.slipway.internal`, dns.TypeA),
		"other subnet":   question("2.66.168.192.in-addr.arpa", dns.TypePTR),
		"part of addr":   question("65.168.192.in-addr.arpa", dns.TypePTR),
		"five octets":    question("1.2.65.168.192.in-addr.arpa", dns.TypePTR),
		"leading zero":   question("02.65.168.192.in-addr.arpa", dns.TypePTR),
		"not a number":   question("256.65.168.192.in-addr.arpa", dns.TypePTR),
		"reverse zone":   question("in-addr.arpa", dns.TypePTR),
		"v6 zone":        question("ip6.arpa", dns.TypePTR),
		"v6 part":        question("2.0.0.0.ip6.arpa", dns.TypePTR),
		"v6 long labels": question(strings.Repeat("00.", 21)+"0.ip6.arpa", dns.TypePTR),
		"root":           question(".", dns.TypeNS),
		"other class":    chaos,
		"other opcode":   notify,
		"two questions":  two,
	}
	for name, m := range tests {
		q, err := parseQuery(packed(t, m))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if reply, ok := table.answer(&q, maxMessage); ok {
			t.Errorf("%s: answered %x as a built-in name", name, reply)
		}
	}
}
