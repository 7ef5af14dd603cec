package dns

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	gateway4 = netip.MustParseAddr("192.168.65.1")
	gateway6 = netip.MustParseAddr("fdc4:f303:9324::1")
	host4    = netip.MustParseAddr("192.168.65.2")
	host6    = netip.MustParseAddr("fdc4:f303:9324::2")

	builtIn = map[string][]netip.Addr{
		"host.slipway.internal":    {host4, host6},
		"gateway.slipway.internal": {gateway4, gateway6},
		"Host.Docker.Internal.":    {host4, host6},
		"only4.example.org":        {netip.MustParseAddr("192.0.2.4")},
	}
	subnets = []netip.Prefix{netip.MustParsePrefix("192.168.65.1/24"), netip.MustParsePrefix("fdc4:f303:9324::/64")}
)

// listen returns a UDP socket and a TCP listener on the same loopback port.
func listen(t testing.TB) (net.PacketConn, net.Listener, netip.AddrPort) {
	t.Helper()
	for range 100 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		pc, err := net.ListenPacket("udp", ln.Addr().String())
		if err == nil {
			return pc, ln, ln.Addr().(*net.TCPAddr).AddrPort()
		}
		ln.Close() // somebody else has the UDP port
	}
	t.Fatal("no port is free for both udp and tcp")
	return nil, nil, netip.AddrPort{}
}

// upstream runs a name server on loopback until the test ends.
func upstream(t testing.TB, h dns.HandlerFunc) netip.AddrPort {
	t.Helper()
	pc, ln, addr := listen(t)
	for _, s := range []*dns.Server{{PacketConn: pc}, {Listener: ln}} {
		s.Handler = h
		started, done := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		s.MsgAcceptFunc = func(dns.Header) dns.MsgAcceptAction { return dns.MsgAccept }
		go func() {
			defer close(done)
			s.ActivateAndServe()
		}()
		<-started
		t.Cleanup(func() { s.Shutdown(); <-done })
	}
	return addr
}

// refusing returns an address on which nobody listens.
func refusing(t testing.TB) netip.AddrPort {
	pc, ln, addr := listen(t)
	pc.Close()
	ln.Close()
	return addr
}

// serve runs a Server on loopback until the test ends and returns it with its
// address.
func serve(t testing.TB, servers ...netip.AddrPort) (*Server, string) {
	t.Helper()
	s := New(Config{Names: builtIn, Subnets: subnets, Upstreams: func() []netip.AddrPort { return servers }})
	pc, ln, addr := listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, []net.PacketConn{pc}, []net.Listener{ln}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s, addr.String()
}

// ask sends m over network and returns the answer.
func ask(t testing.TB, network, addr string, m *dns.Msg) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: network, Timeout: 10 * time.Second}
	r, _, err := c.Exchange(m, addr)
	if err != nil {
		t.Fatalf("ask %s over %s: %v", m.Question[0].String(), network, err)
	}
	return r
}

func question(name string, qtype uint16) *dns.Msg {
	return new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
}

// packed is m as bytes.
func packed(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}
