package forward

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// fakePublished are the sockets of published ports, recording what is sent.
type fakePublished struct {
	mu      sync.Mutex // guards the fields below
	sent    []toClient
	plain   []toClient // through sockets of the guest's namespace; from is unused
	told    []clientError
	open    int // of all sockets
	sendErr error
}

type toClient struct {
	from    netip.Addr
	to      netip.AddrPort
	payload string
}

func (f *fakePublished) listen(*net.UDPConn, *udpPort) (publishedSocket, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open++
	return &fakePublishedSocket{f}, nil
}

func (f *fakePublished) adopt(int, bool, *udpClient) (udpSocket, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open++
	return &fakePublishedSocket{f}, nil
}

func (f *fakePublished) tell(e clientError) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	e.quote = slices.Clone(e.quote)
	f.told = append(f.told, e)
	return true
}

func (f *fakePublished) closeICMP() {}

type fakePublishedSocket struct{ all *fakePublished }

func (s *fakePublishedSocket) sendFrom(d flow.Datagram, from netip.Addr, to netip.AddrPort) error {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	s.all.sent = append(s.all.sent, toClient{from, to, string(d.Payload)})
	return s.all.sendErr
}

func (s *fakePublishedSocket) send(d flow.Datagram, to netip.AddrPort) error {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	s.all.plain = append(s.all.plain, toClient{to: to, payload: string(d.Payload)})
	return nil
}

func (s *fakePublishedSocket) close() {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	s.all.open--
}

// udpPublished are ports on fake sockets.
type udpPublished struct {
	*udpPorts
	t     *testing.T
	socks *fakePublished
	guest *fakeGuest
	own   *fakeUDP // of the guest's own mappings
	doors *testDoors
}

func publishUDP(t *testing.T) *udpPublished {
	t.Helper()
	maps, own, guest := fakeMaps(t, testPolicyConfig(), 0)
	socks := new(fakePublished)
	u := &udpPublished{newUDPPorts(maps, socks), t, socks, guest, own, dockerDoors(false)}
	t.Cleanup(func() {
		u.close()
		if u.n != 0 || len(u.flows) != 0 || len(u.from) != 0 || socks.open != 0 {
			t.Errorf("after close: %d mappings, %d flows, %d places, %d sockets; want none", u.n, len(u.flows), len(u.from), socks.open)
		}
	})
	return u
}

// counters makes in count.
func counters(in Inbound) *Inbound {
	in.Count = InboundCounters{new(atomic.Uint64), new(atomic.Uint64), new(atomic.Uint64), new(atomic.Uint64), new(atomic.Uint64)}
	return &in
}

// port publishes in on the loopback, which is never used, as if it were at at.
func (u *udpPublished) port(in Inbound, at string) *udpPort {
	u.t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		u.t.Fatal(err)
	}
	defer conn.Close()
	p, err := u.serve(conn, counters(in), u.doors)
	if err != nil {
		u.t.Fatal(err)
	}
	p.local = ap(at)
	return p
}

// client sends a datagram to p as a client of it would.
func (p *udpPort) client(client, asked, payload string) {
	p.fromClient(clientKey{ap(client), ip(asked)}, flow.Datagram{Payload: []byte(payload), Hops: 63})
}

func (u *udpPublished) guestSends(guest, target, payload string) bool {
	return u.datagram(flow.Datagram{Guest: ap(guest), Target: ap(target), Payload: []byte(payload)})
}

func (u *udpPublished) sent() toClient {
	u.t.Helper()
	u.socks.mu.Lock()
	defer u.socks.mu.Unlock()
	if len(u.socks.sent) == 0 {
		u.t.Fatal("nothing was sent to a client")
	}
	last := u.socks.sent[len(u.socks.sent)-1]
	u.socks.sent = nil
	return last
}

func TestInboundUDPSource(t *testing.T) {
	docker := inWildcard
	docker.Behind = ap("172.17.0.2:80")
	docker6 := inWildcard
	docker6.Behind = ap("172.17.0.2:80") // of an IPv6 listener, for the same container
	tests := []struct {
		name          string
		in            Inbound
		client, asked string
		to, seen      string // what the guest gets; seen "gateway" for any port of it
		gateway       uint64
	}{
		{"another_machine", docker, "198.51.100.7:5000", "192.0.2.1", "192.168.65.3:8080", "198.51.100.7:5000", 0},
		{"loopback", docker, "127.0.0.1:5000", "127.0.0.1", "192.168.65.3:8080", "gateway", 0},
		{"inside", docker, "10.9.0.7:5000", "10.9.0.1", "192.168.65.3:8080", "gateway", 1},
		{"other_family", docker6, "[2001:db8::7]:5000", "2001:db8::1", "192.168.65.3:8080", "gateway", 1},
		{"container", inSpecific, "198.51.100.7:5000", "192.0.2.1", "172.17.0.2:80", "198.51.100.7:5000", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u := publishUDP(t)
			p := u.port(tt.in, "0.0.0.0:8080")
			p.client(tt.client, tt.asked, "ping")
			d := take(t, u.guest, &u.guest.datagrams)
			if d.Guest != ap(tt.to) || string(d.Payload) != "ping" || d.Hops != 63 {
				t.Errorf("the guest gets %+v", d)
			}
			if tt.seen == "gateway" && d.Target.Addr() != ip("192.168.65.1") || tt.seen != "gateway" && d.Target != ap(tt.seen) {
				t.Errorf("the guest sees %v, want %v", d.Target, tt.seen)
			}
			f := &Forwarder{ports: u.udpPorts}
			if !f.Expects(flow.Tuple{Guest: d.Guest, Target: d.Target}) {
				t.Errorf("no answer from %v to %v is expected", d.Guest, d.Target)
			}
			if f.Expects(flow.Tuple{Guest: d.Guest, Target: netip.AddrPortFrom(d.Target.Addr(), 53)}) {
				t.Error("answers to the gateway's name server are expected")
			}
			for range 2 { // the way it goes does not change
				u.guestSends(tt.to, d.Target.String(), "pong")
				if got := u.sent(); got != (toClient{ip(tt.asked), ap(tt.client), "pong"}) {
					t.Errorf("the client gets %+v", got)
				}
			}
			if c, g := p.in.Count.Clients.Load(), p.in.Count.Gateway.Load(); c != 1 || g != tt.gateway {
				t.Errorf("counted %d clients and %d fallbacks, want 1 and %d", c, g, tt.gateway)
			}
		})
	}
}

// A client's port that the guest sees already is the gateway's the second time.
func TestInboundUDPSameClientTwice(t *testing.T) {
	u := publishUDP(t)
	p := u.port(inWildcard, "0.0.0.0:8080")
	p.client("198.51.100.7:5000", "192.0.2.1", "one")
	p.client("198.51.100.7:5000", "192.0.2.2", "two")
	first, second := take(t, u.guest, &u.guest.datagrams), take(t, u.guest, &u.guest.datagrams)
	if first.Target != ap("198.51.100.7:5000") || second.Target.Addr() != ip("192.168.65.1") {
		t.Fatalf("the guest sees %v and %v, want the client and the gateway", first.Target, second.Target)
	}
	for target, asked := range map[string]string{first.Target.String(): "192.0.2.1", second.Target.String(): "192.0.2.2"} {
		u.guestSends("192.168.65.3:8080", target, "answer")
		if got := u.sent(); got.from != ip(asked) {
			t.Errorf("the answer to %s comes from %v, want %s", target, got.from, asked)
		}
	}
	if g := p.in.Count.Gateway.Load(); g != 1 {
		t.Errorf("counted %d fallbacks, want 1", g)
	}
}

// Where the guest's conntrack has forgotten its translation the answer comes from the
// container itself, and must not leave with another port.
func TestInboundUDPLateAnswer(t *testing.T) {
	in := inWildcard
	in.Behind = ap("172.17.0.2:80")
	t.Run("mapping_lives", func(t *testing.T) {
		u := publishUDP(t)
		u.port(in, "0.0.0.0:8080").client("198.51.100.7:5000", "192.0.2.1", "question")
		u.guestSends("172.17.0.2:80", "198.51.100.7:5000", "late")
		if got := u.sent(); got != (toClient{ip("192.0.2.1"), ap("198.51.100.7:5000"), "late"}) {
			t.Errorf("the client gets %+v", got)
		}
	})
	t.Run("mapping_gone", func(t *testing.T) {
		u := publishUDP(t)
		p := u.port(in, "0.0.0.0:8080")
		for _, from := range []string{"172.17.0.2:80", "192.168.65.3:8080"} {
			if !u.guestSends(from, "198.51.100.7:5000", "late") {
				t.Fatalf("%s: the published port does not send it", from)
			}
			if got := u.sent(); got != (toClient{netip.Addr{}, ap("198.51.100.7:5000"), "late"}) {
				t.Errorf("the client gets %+v", got)
			}
		}
		// And the client's answer to that comes to where it was sent from.
		p.client("198.51.100.7:5000", "192.0.2.1", "answer")
		if d := take(t, u.guest, &u.guest.datagrams); d.Target != ap("198.51.100.7:5000") {
			t.Errorf("the guest gets %+v", d)
		}
	})
}

func TestInboundUDPGuestBegins(t *testing.T) {
	tests := []struct {
		name, guest, target, at string
		ours                    bool
	}{
		{"from_a_published_port", "192.168.65.3:8080", "198.51.100.7:4000", "0.0.0.0:8080", true},
		{"from_another_port", "192.168.65.3:8081", "198.51.100.7:4000", "0.0.0.0:8080", false},
		{"to_the_host", "192.168.65.3:8080", "192.168.65.2:4000", "0.0.0.0:8080", false},
		{"denied", "192.168.65.3:8080", "127.0.0.1:4000", "0.0.0.0:8080", false},
		{"published_on_loopback", "192.168.65.3:8080", "198.51.100.7:4000", "127.0.0.1:8080", false},
		{"other_family", "192.168.65.3:8080", "[2001:db8::7]:4000", "0.0.0.0:8080", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u := publishUDP(t)
			u.port(inWildcard, tt.at)
			if got := u.guestSends(tt.guest, tt.target, "x"); got != tt.ours {
				t.Errorf("the published port sends it: %v, want %v", got, tt.ours)
			}
		})
	}
	t.Run("talked_before", func(t *testing.T) {
		u := publishUDP(t)
		u.maps.Datagram(datagram(ap("192.168.65.3:8080"), peerA, "x"))
		u.port(inWildcard, "0.0.0.0:8080")
		if u.guestSends("192.168.65.3:8080", peerA.String(), "y") {
			t.Error("the host's port changes in the middle")
		}
		if !u.guestSends("192.168.65.3:8080", peerB.String(), "y") {
			t.Error("a new peer sees another port")
		}
	})
}

func TestInboundUDPIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := publishUDP(t)
		p := u.port(inWildcard, "0.0.0.0:8080")
		short := inWildcard
		short.Guest, short.UDPIdle = ap("192.168.65.3:9090"), 20*time.Second
		q := u.port(short, "0.0.0.0:9090")
		p.client("198.51.100.7:5000", "192.0.2.1", "x")
		q.client("198.51.100.7:5000", "192.0.2.1", "x")
		time.Sleep(18 * time.Second)
		if u.len() != 2 {
			t.Errorf("%d mappings after 18 s, want 2", u.len())
		}
		time.Sleep(5 * time.Second)
		if u.len() != 1 {
			t.Errorf("%d mappings after 23 s, want 1", u.len())
		}
		time.Sleep(60 * time.Second)
		u.guestSends("192.168.65.3:8080", "198.51.100.7:5000", "answer")
		time.Sleep(inboundIdle - udpSweep)
		if u.len() != 1 {
			t.Error("expired although a datagram passed")
		}
		time.Sleep(3 * udpSweep)
		if u.len() != 0 {
			t.Errorf("%d mappings left", u.len())
		}
	})
}

func TestInboundUDPLimits(t *testing.T) {
	u := publishUDP(t)
	p := u.port(inWildcard, "0.0.0.0:8080")
	p.client("198.51.100.7:5000", "192.0.2.1", "x")
	u.guestSends("192.168.65.3:8080", "198.51.100.7:5000", "answer")
	base := ip("203.0.113.0").As4()
	for i := range 2 * inboundPerPort {
		base[2], base[3] = byte(i>>8), byte(i)
		p.fromClient(clientKey{netip.AddrPortFrom(netip.AddrFrom4(base), 6000), ip("192.0.2.1")}, flow.Datagram{})
	}
	if u.len() != inboundPerPort || u.evicted.Load() != inboundPerPort+1 {
		t.Errorf("%d mappings and %d evicted, want %d and one more", u.len(), u.evicted.Load(), inboundPerPort)
	}
	if u.client(ap("192.168.65.3:8080"), ap("198.51.100.7:5000")) == nil {
		t.Error("a client that was answered had to go for some that were not")
	}
	// Other ports have room, and take none of this one's.
	other := inWildcard
	other.Guest = ap("192.168.65.3:9090")
	u.port(other, "0.0.0.0:9090").client("198.51.100.7:5000", "192.0.2.1", "x")
	if u.len() != inboundPerPort+1 {
		t.Errorf("%d mappings, want one more than %d", u.len(), inboundPerPort)
	}
}

// Ports with few clients do not pay for those with many.
func TestInboundUDPFloodOfPorts(t *testing.T) {
	u := publishUDP(t)
	server := inWildcard
	server.Guest = ap("192.168.65.3:9090")
	p := u.port(server, "0.0.0.0:9090")
	for _, c := range []string{"198.51.100.7:5000", "198.51.100.8:5000"} {
		p.client(c, "192.0.2.1", "x")
		u.guestSends("192.168.65.3:9090", c, "answer")
	}
	p.client("198.51.100.9:5000", "192.0.2.1", "not answered yet")
	base := ip("203.0.113.0").As4()
	flood := func(in Inbound, at string, n int) {
		q := u.port(in, at)
		for i := range n {
			base[1], base[2], base[3] = byte(i>>16), byte(i>>8), byte(i)
			q.fromClient(clientKey{netip.AddrPortFrom(netip.AddrFrom4(base), 6000), ip("192.0.2.1")}, flow.Datagram{})
		}
	}
	for i := range 5 {
		in := inWildcard
		in.Guest = netip.AddrPortFrom(in.Guest.Addr(), uint16(1000+i))
		flood(in, fmt.Sprintf("0.0.0.0:%d", 1000+i), inboundPerPort)
	}
	if u.len() != inboundMost {
		t.Fatalf("%d mappings, want %d", u.len(), inboundMost)
	}
	for _, c := range []string{"198.51.100.10:5000", "198.51.100.11:5000"} {
		p.client(c, "192.0.2.1", "x")
	}
	if n := len(p.clients); n != 5 {
		t.Errorf("%d clients of the port that is not flooded, want 5", n)
	}
	if u.len() != inboundMost {
		t.Errorf("%d mappings, want %d", u.len(), inboundMost)
	}
}

// Where descriptors are few, plain mappings beyond a part of them cost their own port's.
func TestInboundUDPPlainLimit(t *testing.T) {
	u := publishUDP(t)
	u.plains = 10
	local := Inbound{Guest: ap("127.0.0.1:53")}
	p, q := u.port(local, "0.0.0.0:53"), u.port(local, "0.0.0.0:54")
	for i := range 20 {
		p.client(fmt.Sprintf("198.51.100.7:%d", 5000+i), "192.0.2.1", "x")
	}
	q.client("198.51.100.7:5000", "192.0.2.1", "x") // one is always to be had
	q.client("198.51.100.7:5001", "192.0.2.1", "x")
	if len(p.clients) != 10 || len(q.clients) != 1 || u.plain != 11 {
		t.Errorf("%d and %d clients, %d plain", len(p.clients), len(q.clients), u.plain)
	}
}

func TestInboundUDPRefused(t *testing.T) {
	docker6 := inWildcard
	docker6.Behind = ap("172.17.0.2:80")
	prohibited4 := flow.ICMP{Type: typeUnreachable4, Code: 13}
	tests := []struct {
		name          string
		client, asked string
		icmp, want    flow.ICMP // zero: nothing
	}{
		{"closed", "198.51.100.7:5000", "192.0.2.1", portUnreachable4, portUnreachable4},
		{"prohibited", "198.51.100.7:5000", "192.0.2.1", prohibited4, prohibited4},
		{"closed_to_the_other_family", "[2001:db8::7]:5000", "2001:db8::1", portUnreachable4, portUnreachable6},
		{"prohibited_to_the_other_family", "[2001:db8::7]:5000", "2001:db8::1", prohibited4, flow.ICMP{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u := publishUDP(t)
			p := u.port(docker6, "0.0.0.0:8080")
			p.client(tt.client, tt.asked, "hello")
			d := take(t, u.guest, &u.guest.datagrams)
			f := &Forwarder{ports: u.udpPorts}
			e := flow.Error{Tuple: flow.Tuple{Proto: flow.UDP, Guest: d.Guest, Target: d.Target}, ICMP: tt.icmp, Quote: []byte("hello"), Size: 5}
			f.Rejected(e)
			e.Target = ap("198.51.100.99:1")
			f.Rejected(e) // of nobody's
			if n := p.in.Count.Refused.Load(); n != 1 {
				t.Errorf("counted %d, want 1", n)
			}
			if tt.want == (flow.ICMP{}) {
				if len(u.socks.told) != 0 {
					t.Errorf("told %+v", u.socks.told)
				}
				return
			}
			if len(u.socks.told) != 1 {
				t.Fatalf("told %+v, want one", u.socks.told)
			}
			got := u.socks.told[0]
			if got.ICMP != tt.want || got.client != ap(tt.client) || got.asked != netip.AddrPortFrom(ip(tt.asked), 8080) || string(got.quote) != "hello" || got.size != 5 {
				t.Errorf("told %+v", got)
			}
		})
	}
}

// Where nobody serves in the client's family the datagram goes to the engine's other address,
// and the answers come from the one that was asked.
func TestInboundUDPOtherFamily(t *testing.T) {
	const own4, own6, client, asked = "192.168.65.3:8080", "[fdc4:f303:9324::3]:8080", "198.51.100.7:5000", "192.0.2.1"
	in := with(inWildcard, func(in *Inbound) { in.Either = true })
	refuse := func(u *udpPublished, known string, size int) flow.Datagram {
		d := take(t, u.guest, &u.guest.datagrams)
		(&Forwarder{ports: u.udpPorts}).Rejected(flow.Error{
			Tuple: flow.Tuple{Proto: flow.UDP, Guest: d.Guest, Target: d.Target},
			ICMP:  portUnreachable(d.Guest.Addr()), Quote: []byte(known), Size: size,
		})
		return d
	}
	t.Run("served", func(t *testing.T) {
		u := publishUDP(t)
		u.doors.listens = aps(own6)
		p := u.port(in, "0.0.0.0:8080")
		p.client(client, asked, "hello")
		refuse(u, "hello", 5)
		d := take(t, u.guest, &u.guest.datagrams)
		if d.Guest != ap(own6) || d.Target.Addr() != ip("fdc4:f303:9324::1") || string(d.Payload) != "hello" {
			t.Fatalf("the guest gets %+v", d)
		}
		u.guestSends(own6, d.Target.String(), "answer")
		if got := u.sent(); got != (toClient{ip(asked), ap(client), "answer"}) {
			t.Errorf("the client gets %+v", got)
		}
		if c := p.in.Count; c.Clients.Load() != 1 || c.Refused.Load() != 0 || c.Gateway.Load() != 1 || len(u.socks.told) != 0 || u.len() != 1 {
			t.Errorf("%d clients, %d refused, %d as the gateway, told %+v, %d mappings", c.Clients.Load(), c.Refused.Load(), c.Gateway.Load(), u.socks.told, u.len())
		}
	})
	t.Run("not_all_is_quoted", func(t *testing.T) {
		u := publishUDP(t)
		u.doors.listens = aps(own6)
		p := u.port(in, "0.0.0.0:8080")
		p.client(client, asked, "hello")
		refuse(u, "hell", 5)
		p.client(client, asked, "again")
		if d := take(t, u.guest, &u.guest.datagrams); d.Guest != ap(own6) || string(d.Payload) != "again" {
			t.Errorf("the guest gets %+v", d)
		}
	})
	for name, listens := range map[string][]netip.AddrPort{"nobody": nil, "a_firewall": aps(own4, own6)} {
		t.Run(name, func(t *testing.T) {
			u := publishUDP(t)
			u.doors.listens = listens
			p := u.port(in, "0.0.0.0:8080")
			p.client(client, asked, "hello")
			refuse(u, "hello", 5)
			if len(u.socks.told) != 1 || p.in.Count.Refused.Load() != 1 {
				t.Errorf("told %+v", u.socks.told)
			}
		})
	}
	t.Run("answered_before", func(t *testing.T) {
		u := publishUDP(t)
		p := u.port(in, "0.0.0.0:8080")
		p.client(client, asked, "hello")
		u.guestSends(own4, client, "answer")
		u.doors.listens = aps(own6)
		refuse(u, "hello", 5)
		if len(u.socks.told) != 1 || u.client(ap(own4), ap(client)) == nil {
			t.Errorf("told %+v", u.socks.told)
		}
	})
	t.Run("loopback_nobody", func(t *testing.T) {
		u := publishUDP(t)
		p := u.port(in, "0.0.0.0:8080")
		p.client("127.0.0.1:5000", "127.0.0.1", "hello")
		first, second := refuse(u, "hello", 5), refuse(u, "hello", 5)
		if first.Guest != ap(own4) || second.Guest != ap(own6) || len(u.socks.told) != 1 || u.socks.told[0].ICMP != portUnreachable4 {
			t.Errorf("to %v, then to %v, told %+v", first.Guest, second.Guest, u.socks.told)
		}
	})
}

// A port that leads nowhere refuses, and keeps nothing.
func TestInboundUDPNoWay(t *testing.T) {
	u := publishUDP(t)
	p := u.port(Inbound{Guest: ap("203.0.113.5:80")}, "0.0.0.0:8080")
	p.client("198.51.100.7:5000", "192.0.2.1", "hello")
	if len(u.socks.told) != 1 || u.socks.told[0].ICMP != portUnreachable4 || p.in.Count.Refused.Load() != 1 || u.len() != 0 {
		t.Errorf("told %+v, %d mappings", u.socks.told, u.len())
	}
}

func TestInboundUDPClosed(t *testing.T) {
	u := publishUDP(t)
	p := u.port(inWildcard, "0.0.0.0:8080")
	p.client("198.51.100.7:5000", "192.0.2.1", "x")
	p.Close()
	p.Close()
	if u.len() != 0 || u.guestSends("192.168.65.3:8080", "198.51.100.7:5000", "answer") {
		t.Error("a port that is closed still answers")
	}
	p.client("198.51.100.7:5001", "192.0.2.1", "y")
	if u.len() != 0 || p.in.Count.Dropped.Load() != 1 {
		t.Error("a port that is closed takes clients")
	}
}

func TestInboundUDPTooBigForTheHost(t *testing.T) {
	u := publishUDP(t)
	u.port(inWildcard, "0.0.0.0:8080").client("198.51.100.7:5000", "192.0.2.1", "x")
	u.socks.sendErr = &tooBigError{1400}
	u.guestSends("192.168.65.3:8080", "198.51.100.7:5000", "long")
	if e := take(t, u.guest, &u.guest.errors); e.ICMP != fragNeeded4 || e.MTU != 1400 || e.Target != ap("198.51.100.7:5000") {
		t.Errorf("the guest gets %+v", e)
	}
	u.socks.sendErr = errors.New("anything else")
	u.guestSends("192.168.65.3:8080", "198.51.100.7:5000", "lost")
	if _, _, n := u.guest.lengths(); n != 0 {
		t.Error("the guest hears of something else")
	}
}
