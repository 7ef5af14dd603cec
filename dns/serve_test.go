package dns

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Limits hold for one guest and for all, are counted, and go away with the load.
func TestQueryLimits(t *testing.T) {
	s := New(Config{})
	msg := packed(t, question("example.org", dns.TypeA).SetEdns0(1232, false))
	loud, other := netip.MustParseAddr("172.17.0.2"), netip.MustParseAddr("172.17.0.3")
	taken := 0
	fill := func(guest netip.Addr) (refusal []byte) {
		for range maxQueries + 1 {
			if _, now, _ := s.accept(guest, msg, overUDP); now != nil {
				return now
			}
			taken++
		}
		t.Fatal("no limit")
		return nil
	}
	if r := fill(loud); rcode(r) != rcodeRefused || taken != maxQueriesOfGuest {
		t.Errorf("guest refused after %d queries with %x, want REFUSED after %d", taken, r, maxQueriesOfGuest)
	}
	if fill(other); taken != maxQueries {
		t.Errorf("all refused after %d queries, want %d", taken, maxQueries)
	}
	if n := s.Stats(); n.Refused != 2 || n.InFlight != maxQueries {
		t.Errorf("stats %+v", n)
	}
	s.queries.put(loud)
	if _, now, _ := s.accept(loud, msg, overUDP); now != nil {
		t.Error("refused although a slot is free")
	}
	if _, now, _ := s.accept(loud, packed(t, question("x.example.org", dns.TypeA)), overUDP); now == nil {
		t.Error("accepted although no slot is free")
	}
}

// Built-in names need no slot.
func TestBuiltInWhenFull(t *testing.T) {
	s := New(Config{Names: builtIn})
	guest := netip.MustParseAddr("172.17.0.2")
	for s.queries.take(guest) {
	}
	if _, now, ok := s.accept(guest, packed(t, question("host.docker.internal", dns.TypeA)), overUDP); !ok || rcode(now) != rcodeSuccess {
		t.Errorf("got %x", now)
	}
}

func TestStreamLimit(t *testing.T) {
	s, addr := serve(t)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range maxStreamsOfGuest + 1 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	last := conns[len(conns)-1]
	last.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := last.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("connection beyond the limit: read %d, %v; want it closed", n, err)
	}
	if n := s.Stats(); n.StreamsCut != 1 || n.Streams != maxStreamsOfGuest {
		t.Errorf("stats %+v", n)
	}
	for _, c := range conns[:maxStreamsOfGuest] {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		writeMessage(c, packed(t, question("host.docker.internal", dns.TypeA)))
		if r, err := readMessage(c); err != nil || rcode(r) != rcodeSuccess {
			t.Fatalf("connection within the limit: %x, %v", r, err)
		}
	}
}

// Queries on one connection are answered as their answers come, and a guest that
// has sent its FIN still gets them.
func TestPipelining(t *testing.T) {
	release := make(chan struct{})
	up := upstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		if m.Question[0].Name == "slow.example.org." {
			<-release
		}
		w.WriteMsg(new(dns.Msg).SetReply(m))
	})
	_, addr := serve(t, up)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	slow, fast := question("slow.example.org", dns.TypeA), question("fast.example.org", dns.TypeA)
	writeMessage(c, packed(t, slow))
	writeMessage(c, packed(t, fast))
	c.(*net.TCPConn).CloseWrite()
	for i, want := range []*dns.Msg{fast, slow} {
		r, err := readMessage(c)
		if err != nil || id(r) != want.Id {
			t.Fatalf("answer %d: %x, %v; want ID %x", i, r, err, want.Id)
		}
		if i == 0 {
			close(release)
		}
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the last answer: %v, want EOF", err)
	}
}

// What is no query gets no answer, and ends a TCP connection.
func TestGarbage(t *testing.T) {
	s, addr := serve(t)
	response := packed(t, new(dns.Msg).SetReply(question("example.org", dns.TypeA)))
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	for _, msg := range [][]byte{{}, {1}, response[:headerLen-1], response} {
		c.Write(msg)
	}
	broken := append(packed(t, question("example.org", dns.TypeA))[:headerLen+3], 0xFF)
	c.Write(broken)
	buf := make([]byte, 512)
	n, err := c.Read(buf)
	if err != nil || id(buf) != id(broken) || rcode(buf[:n]) != rcodeFormatError {
		t.Errorf("first answer %x, %v; want the FORMERR for the last message", buf[:n], err)
	}
	if got := s.Stats().Malformed; got != 5 {
		t.Errorf("%d malformed messages counted, want 5", got)
	}
	tc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer tc.Close()
	tc.SetDeadline(time.Now().Add(10 * time.Second))
	writeMessage(tc, response)
	if _, err := tc.Read(buf); err != io.EOF {
		t.Errorf("tcp: %v, want EOF", err)
	}
}

// A listener that fails ends Serve with its error; the others are closed.
func TestListenerFails(t *testing.T) {
	s := New(Config{})
	pc, ln, _ := listen(t)
	pc.Close()
	err := s.Serve(t.Context(), []net.PacketConn{pc}, []net.Listener{ln})
	if !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v, want the closed socket", err)
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("other listener: %v, want it closed", err)
	}
}

// Many guests ask at the same time; each gets its own answer.
func TestConcurrent(t *testing.T) {
	s, addr := serve(t, upstream(t, txt(100)))
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for _, network := range []string{"udp", "tcp"} {
				m := question("example.org", dns.TypeTXT)
				c := dns.Client{Net: network, Timeout: 10 * time.Second}
				if r, _, err := c.Exchange(m, addr); err != nil || len(texts(r.Answer)) != 100 {
					t.Errorf("%s: %v, %v", network, r, err)
				}
			}
		})
	}
	wg.Wait()
	if n := s.Stats(); n.Upstream != 100 || n.Failed != 0 {
		t.Errorf("stats %+v", n)
	}
}
