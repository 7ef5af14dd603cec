package dns

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// txt returns a handler that answers with size bytes of text, truncated as a
// real server does it.
func txt(size int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, m *dns.Msg) {
		r := new(dns.Msg).SetReply(m)
		for left := size; left > 0; left -= 250 {
			r.Answer = append(r.Answer, &dns.TXT{
				Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60},
				Txt: []string{strings.Repeat("x", min(left, 250))},
			})
		}
		limit := dns.MaxMsgSize
		if w.LocalAddr().Network() == "udp" {
			limit = dns.MinMsgSize
			if o := m.IsEdns0(); o != nil {
				limit = min(int(o.UDPSize()), 1232) // what public servers do
			}
		}
		if o := m.IsEdns0(); o != nil {
			r.SetEdns0(1232, o.Do())
		}
		r.Truncate(limit)
		w.WriteMsg(r)
	}
}

// rawUpstream answers each datagram with what reply returns, and hands over what
// came from where.
func rawUpstream(t *testing.T, reply func(msg []byte, send func([]byte))) netip.AddrPort {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, maxMessage)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			reply(bytes.Clone(buf[:n]), func(b []byte) { pc.WriteTo(b, from) })
		}
	}()
	t.Cleanup(func() { pc.Close(); <-done })
	return pc.LocalAddr().(*net.UDPAddr).AddrPort()
}

// exchange sends raw bytes over UDP and returns the raw answer.
func exchange(t *testing.T, addr string, msg []byte) []byte {
	t.Helper()
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	c.Write(msg)
	buf := make([]byte, maxMessage)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatalf("no answer to %x: %v", msg, err)
	}
	return buf[:n]
}

// What goes upstream and what comes back is the same but for the ID.
func TestPassesMessagesUntouched(t *testing.T) {
	var mu sync.Mutex
	var seen [][]byte
	up := rawUpstream(t, func(msg []byte, send func([]byte)) {
		mu.Lock()
		seen = append(seen, msg)
		mu.Unlock()
		r := bytes.Clone(msg)
		r[2] |= flagQR
		send(append(r, "trailing bytes nobody understands"...))
	})
	_, addr := serve(t, up)
	withOption := question("example.org", dns.TypeA).SetEdns0(1400, true)
	withOption.IsEdns0().Option = append(withOption.IsEdns0().Option,
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("x")})
	update := new(dns.Msg).SetUpdate("example.org.")
	update.Insert([]dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "a.example.org.", Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(192, 0, 2, 1)}})
	odd := question("MiXeD.example.org", dns.TypeA)
	odd.Opcode, odd.Zero, odd.AuthenticatedData, odd.CheckingDisabled = 11, true, true, true
	chaos := question("version.bind", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	tests := map[string][]byte{
		"a":             packed(t, question("example.org", dns.TypeA)),
		"unknown type":  packed(t, question("example.org", 65280)),
		"https":         packed(t, question("example.org", dns.TypeHTTPS)),
		"options":       packed(t, withOption),
		"update":        packed(t, update),
		"odd header":    packed(t, odd),
		"chaos":         packed(t, chaos),
		"stateful":      {0, 1, 6 << 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 4, 0, 0, 0, 0}, // DSO, RFC 8490
		"trailing junk": append(packed(t, question("example.org", dns.TypeA)), 1, 2, 3),
	}
	for name, msg := range tests {
		got := exchange(t, addr, msg)
		mu.Lock()
		sent := seen[len(seen)-1]
		mu.Unlock()
		if !bytes.Equal(sent[2:], msg[2:]) {
			t.Errorf("%s: upstream got %x, want %x but for the ID", name, sent, msg)
		}
		want := bytes.Clone(msg)
		want[2] |= flagQR
		if want = append(want, "trailing bytes nobody understands"...); !bytes.Equal(got, want) {
			t.Errorf("%s: guest got %x, want %x", name, got, want)
		}
	}
}

// IDs and source ports are fresh for every try.
func TestUnpredictableSource(t *testing.T) {
	ids, ports := map[uint16]bool{}, map[uint16]bool{}
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, addr := serve(t, pc.LocalAddr().(*net.UDPAddr).AddrPort())
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 512)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			ids[id(buf)] = true
			ports[from.(*net.UDPAddr).AddrPort().Port()] = true
			buf[2] |= flagQR
			pc.WriteTo(buf[:n], from)
		}
	}()
	const queries = 64
	for range queries {
		exchange(t, addr, packed(t, question("example.org", dns.TypeA)))
	}
	pc.Close()
	<-done
	if len(ids) < queries-2 || len(ports) < queries/2 { // a few repetitions are chance
		t.Errorf("%d queries used %d IDs and %d ports", queries, len(ids), len(ports))
	}
}

// Answers to other questions, with other IDs, or that are no answers, do not count.
func TestIgnoresForgedAnswers(t *testing.T) {
	up := rawUpstream(t, func(msg []byte, send func([]byte)) {
		forge := func(change func(b []byte)) {
			b := bytes.Clone(msg)
			b[2] |= flagQR
			b[3] = rcodeNameError
			change(b)
			send(b)
		}
		forge(func(b []byte) { b[0]++ })              // ID
		forge(func(b []byte) { b[2] &^= flagQR })     // not a response
		forge(func(b []byte) { b[2] |= 4 << 3 })      // opcode
		forge(func(b []byte) { b[headerLen+1]++ })    // name
		forge(func(b []byte) { b[len(b)-3]++ })       // type
		forge(func(b []byte) { b[len(b)-1]++ })       // class
		forge(func(b []byte) { b[5] = 0 })            // no question, and NXDOMAIN
		forge(func(b []byte) { b[5] = 2 })            // two questions
		send(msg[:headerLen-1])                       // short
		forge(func(b []byte) { b[headerLen] = 0xC0 }) // pointer as a name
		forge(func(b []byte) { b[headerLen] = 63 })   // label beyond the end
		forge(func(b []byte) { copy(b[3:], "\x00") }) // at last
	})
	s, addr := serve(t, up)
	got := exchange(t, addr, packed(t, question("example.org", dns.TypeA)))
	if rcode(got) != rcodeSuccess {
		t.Errorf("a forged answer came through: %x", got)
	}
	// More than one try is a machine that had no time for us.
	if n := s.Stats(); n.Mismatched < 11 || n.Tries == 1 && n.Mismatched > 11 {
		t.Errorf("%d mismatched answers counted, want 11", n.Mismatched)
	}
}

// An error without a question is an answer all the same.
func TestErrorWithoutQuestion(t *testing.T) {
	up := rawUpstream(t, func(msg []byte, send func([]byte)) {
		send([]byte{msg[0], msg[1], msg[2] | flagQR, rcodeFormatError, 0, 0, 0, 0, 0, 0, 0, 0})
	})
	_, addr := serve(t, up)
	if got := exchange(t, addr, packed(t, question("example.org", dns.TypeA))); rcode(got) != rcodeFormatError {
		t.Errorf("got %x, want the FORMERR", got)
	}
}

func TestSizes(t *testing.T) {
	tests := []struct {
		network   string
		edns      uint16 // 0: none
		size      int    // of the text
		whole     bool
		wantLimit int
	}{
		{"udp", 0, 250, true, 512},
		{"udp", 0, 1000, false, 512},
		{"udp", 100, 250, true, 512}, // less than 512 counts as 512
		{"udp", 1232, 1000, true, 1232},
		{"udp", 1232, 3000, false, 1232},
		{"udp", 4096, 3000, true, 4096}, // upstream truncates at 1232: fetched over TCP
		{"udp", 16384, 10000, true, 16384},
		{"tcp", 0, 250, true, dns.MaxMsgSize},
		{"tcp", 0, 40000, true, dns.MaxMsgSize},
		{"tcp", 1232, 40000, true, dns.MaxMsgSize},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s/edns %d/%d bytes", tt.network, tt.edns, tt.size), func(t *testing.T) {
			_, addr := serve(t, upstream(t, txt(tt.size)))
			m := question("example.org", dns.TypeTXT)
			if tt.edns != 0 {
				m.SetEdns0(tt.edns, false)
			}
			c := dns.Client{Net: tt.network, UDPSize: dns.MaxMsgSize, Timeout: 10 * time.Second}
			r, _, err := c.Exchange(m, addr)
			if err != nil {
				t.Fatal(err)
			}
			if got := len(texts(r.Answer)) - len(r.Answer) + 1; r.Truncated == tt.whole || tt.whole && got != tt.size {
				t.Errorf("%d of %d bytes, TC %v", got, tt.size, r.Truncated)
			}
			if n := r.Len(); n > tt.wantLimit && len(packed(t, r)) > tt.wantLimit {
				t.Errorf("answer of %d bytes, limit %d", n, tt.wantLimit)
			}
			if (r.IsEdns0() != nil) != (tt.edns != 0) {
				t.Errorf("OPT %v for a query with size %d", r.IsEdns0(), tt.edns)
			}
		})
	}
}

// A server that ignores the guest's size does not break the guest.
func TestOversizedDatagram(t *testing.T) {
	for _, size := range []int{600, udpBuffer, udpBuffer + 1, 9000} {
		up := rawUpstream(t, func(msg []byte, send func([]byte)) {
			msg[2] |= flagQR
			send(append(msg, make([]byte, size-len(msg))...))
		})
		_, addr := serve(t, up)
		got := exchange(t, addr, packed(t, question("example.org", dns.TypeA)))
		if !truncated(got) || len(got) > minUDPSize {
			t.Errorf("%d bytes from upstream: guest got %d bytes, TC %v", size, len(got), truncated(got))
		}
	}
}

// A truncated answer is passed on when the server takes no TCP, and for a guest
// on TCP a server without TCP still serves what fits.
func TestServerWithoutTCP(t *testing.T) {
	reply := func(m *dns.Msg) *dns.Msg {
		r := new(dns.Msg).SetReply(m)
		r.Truncated = m.Question[0].Name == "long.example.org."
		return r
	}
	up := rawUpstream(t, func(msg []byte, send func([]byte)) {
		m := new(dns.Msg)
		if m.Unpack(msg) == nil {
			send(packed(t, reply(m)))
		}
	})
	_, addr := serve(t, up)
	if r := ask(t, "udp", addr, question("long.example.org", dns.TypeA)); !r.Truncated {
		t.Errorf("udp: %v, want the truncated answer", r.MsgHdr)
	}
	if r := ask(t, "tcp", addr, question("short.example.org", dns.TypeA)); r.Rcode != dns.RcodeSuccess {
		t.Errorf("tcp: %v, want the answer from udp", r.MsgHdr)
	}
	if r := ask(t, "tcp", addr, question("long.example.org", dns.TypeA)); r.Rcode != dns.RcodeServerFailure {
		t.Errorf("tcp, long: %v, want SERVFAIL", r.MsgHdr)
	}
}

func TestNextServer(t *testing.T) {
	good := upstream(t, txt(10))
	fails := func(rcode int) netip.AddrPort {
		return upstream(t, func(w dns.ResponseWriter, m *dns.Msg) { w.WriteMsg(new(dns.Msg).SetRcode(m, rcode)) })
	}
	tests := []struct {
		name    string
		servers []netip.AddrPort
		rcode   int
	}{
		{"refused by the kernel", []netip.AddrPort{refusing(t), good}, dns.RcodeSuccess},
		{"servfail", []netip.AddrPort{fails(dns.RcodeServerFailure), good}, dns.RcodeSuccess},
		{"refused", []netip.AddrPort{fails(dns.RcodeRefused), refusing(t), good}, dns.RcodeSuccess},
		{"nxdomain is an answer", []netip.AddrPort{fails(dns.RcodeNameError), good}, dns.RcodeNameError},
		{"first of the failures", []netip.AddrPort{refusing(t), fails(dns.RcodeRefused), fails(dns.RcodeServerFailure)}, dns.RcodeRefused},
		{"nobody", []netip.AddrPort{refusing(t), refusing(t)}, dns.RcodeServerFailure},
		{"no servers", nil, dns.RcodeServerFailure},
	}
	for _, network := range []string{"udp", "tcp"} {
		for _, tt := range tests {
			t.Run(network+"/"+tt.name, func(t *testing.T) {
				_, addr := serve(t, tt.servers...)
				start := time.Now()
				r := ask(t, network, addr, question("example.org", dns.TypeTXT))
				if r.Rcode != tt.rcode {
					t.Errorf("%v, want %v", dns.RcodeToString[r.Rcode], dns.RcodeToString[tt.rcode])
				}
				if d := time.Since(start); d > 3*time.Second {
					t.Errorf("took %v although every server answers at once", d)
				}
			})
		}
	}
}

func TestFailureTellsWhy(t *testing.T) {
	dead := refusing(t)
	_, addr := serve(t, dead)
	r := ask(t, "udp", addr, question("example.org", dns.TypeA).SetEdns0(1232, true))
	o := r.IsEdns0()
	if o == nil || !o.Do() || len(o.Option) != 1 {
		t.Fatalf("OPT %v, want DO and one option", o)
	}
	ede, ok := o.Option[0].(*dns.EDNS0_EDE)
	if !ok || ede.InfoCode != dns.ExtendedErrorCodeNetworkError || ede.ExtraText != noAnswer {
		t.Errorf("extended error %v", o.Option[0])
	}
	if strings.Contains(r.String(), fmt.Sprint(dead.Port())) {
		t.Errorf("the guest learns the host's server: %v", r)
	}
}

func TestTransfer(t *testing.T) {
	const messages = 5
	up := upstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		for range messages {
			w.WriteMsg(new(dns.Msg).SetReply(m))
		}
		w.Close()
	})
	_, addr := serve(t, refusing(t), up)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	m := question("example.org", dns.TypeAXFR)
	writeMessage(c, packed(t, m))
	for i := range messages {
		r, err := readMessage(c)
		if err != nil || id(r) != m.Id {
			t.Fatalf("message %d: %x, %v", i, r, err)
		}
	}
	// The connection serves on.
	writeMessage(c, packed(t, question("host.slipway.internal", dns.TypeA)))
	if _, err := readMessage(c); err != nil {
		t.Errorf("after the transfer: %v", err)
	}
	_, addr = serve(t, refusing(t))
	if r := ask(t, "tcp", addr, m); r.Rcode != dns.RcodeServerFailure {
		t.Errorf("no server: %v, want SERVFAIL", r.MsgHdr)
	}
}
