package netstack

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

// Addresses of the tests: the guest's subnet, and targets from the documentation
// ranges (RFC 5737, RFC 3849).
var (
	gw4     = netip.MustParseAddr("192.168.65.1")
	gw6     = netip.MustParseAddr("fdc4:f303:9324::1")
	guest4  = netip.MustParseAddr("192.168.65.3")
	guest6  = netip.MustParseAddr("fdc4:f303:9324::3")
	target4 = netip.MustParseAddr("198.51.100.7")
	target6 = netip.MustParseAddr("2001:db8::7")
)

// patience is how long tests wait for what must come.
const patience = 20 * time.Second

// recorder is a Forwarder that keeps what it is given.
type recorder struct {
	decide    func(context.Context, flow.Tuple) flow.Verdict
	relay     func(context.Context, flow.Conn, flow.Verdict)
	datagrams chan flow.Datagram
	echoes    chan flow.Echo
	expects   func(flow.Tuple) bool
	rejected  chan flow.Error

	mu        sync.Mutex
	discarded int
}

func (r *recorder) Decide(ctx context.Context, t flow.Tuple) flow.Verdict {
	if r.decide == nil {
		return flow.Verdict{Answer: flow.Reset}
	}
	v := r.decide(ctx, t)
	if v.Answer == flow.Connect && v.Host == nil {
		v.Host = &stalledHost{aborted: make(chan struct{})}
	}
	return v
}

func (r *recorder) Relay(ctx context.Context, c flow.Conn, v flow.Verdict) { r.relay(ctx, c, v) }

func (r *recorder) Discard(flow.Verdict) {
	r.mu.Lock()
	r.discarded++
	r.mu.Unlock()
}

func (r *recorder) Datagram(d flow.Datagram) {
	d.Payload = append([]byte{}, d.Payload...)
	r.datagrams <- d
}

func (r *recorder) Echo(e flow.Echo) {
	e.Payload = append([]byte{}, e.Payload...)
	r.echoes <- e
}

func (r *recorder) Expects(t flow.Tuple) bool { return r.expects != nil && r.expects(t) }

func (r *recorder) Rejected(e flow.Error) {
	e.Quote = append([]byte{}, e.Quote...)
	r.rejected <- e
}

// bench is a running Stack with the guest's end of its link.
type bench struct {
	*Stack
	t     *testing.T
	guest *link.Pipe
	fwd   *recorder
}

// start runs a Stack until the test ends.
func start(t *testing.T, mtu int, edit ...func(*Config)) *bench {
	t.Helper()
	ours, theirs := link.NewPipe(mtu)
	cfg := Config{Link: ours, Gateway4: gw4, Gateway6: gw6}
	for _, f := range edit {
		f(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{Stack: s, t: t, guest: theirs, fwd: &recorder{
		datagrams: make(chan flow.Datagram, 100), echoes: make(chan flow.Echo, 100),
		rejected: make(chan flow.Error, 100),
	}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, b.fwd) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
		theirs.Close()
	})
	return b
}

// send writes one packet as the guest.
func (b *bench) send(h link.Header, pkt []byte) {
	b.t.Helper()
	if err := b.guest.WritePacket(h, [][]byte{pkt}); err != nil {
		b.t.Fatal(err)
	}
}

// receive reads the next packet that the guest gets.
func (b *bench) receive() ([]byte, link.Header) {
	b.t.Helper()
	type result struct {
		pkt []byte
		h   link.Header
		err error
	}
	got := make(chan result, 1)
	go func() {
		buf := make([]byte, 2*link.MaxPacket)
		n, h, err := b.guest.ReadPacket(buf, nil)
		got <- result{buf[:n], h, err}
	}()
	select {
	case r := <-got:
		if r.err != nil {
			b.t.Fatal(r.err)
		}
		return r.pkt, r.h
	case <-time.After(patience):
		b.guest.Close()
		b.t.Fatalf("no packet within %v", patience)
		return nil, link.Header{}
	}
}

// next waits for a value.
func next[T any](t *testing.T, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("nothing within %v", patience)
		panic("unreachable")
	}
}

// ipPacket builds an IP packet around a transport payload; edit may break the
// header, whose checksum is made afterwards.
func ipPacket(src, dst netip.Addr, proto tcpip.TransportProtocolNumber, body []byte, edit ...func(header.IPv4)) []byte {
	if dst.Is6() {
		b := make([]byte, header.IPv6MinimumSize+len(body))
		header.IPv6(b).Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(body)), TransportProtocol: proto, HopLimit: 64,
			SrcAddr: toTCPIP(src), DstAddr: toTCPIP(dst),
		})
		copy(b[header.IPv6MinimumSize:], body)
		return b
	}
	b := make([]byte, header.IPv4MinimumSize+len(body))
	h := header.IPv4(b)
	h.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(proto), ID: 77,
		SrcAddr: toTCPIP(src), DstAddr: toTCPIP(dst),
	})
	copy(b[header.IPv4MinimumSize:], body)
	for _, f := range edit {
		f(h)
	}
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	return b
}

// udpBody is a UDP header with a complete checksum and its payload.
func udpBody(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, header.UDPMinimumSize+len(payload))
	h := header.UDP(b)
	h.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(len(b))})
	copy(b[header.UDPMinimumSize:], payload)
	h.SetChecksum(^checksum.Checksum(b, pseudo(src.Addr(), dst.Addr(), header.UDPProtocolNumber, len(b))))
	return b
}

func udpPacket(src, dst netip.AddrPort, payload []byte, edit ...func(header.IPv4)) []byte {
	return ipPacket(src.Addr(), dst.Addr(), header.UDPProtocolNumber, udpBody(src, dst, payload), edit...)
}

// echoBody is an ICMP echo message of the given type.
func echoBody(src, dst netip.Addr, typ uint8, id, seq uint16, payload []byte) []byte {
	b := append([]byte{typ, 0, 0, 0, byte(id >> 8), byte(id), byte(seq >> 8), byte(seq)}, payload...)
	sum := uint16(0)
	if src.Is6() {
		sum = pseudo(src, dst, header.ICMPv6ProtocolNumber, len(b))
	}
	sum = ^checksum.Checksum(b, sum)
	b[2], b[3] = byte(sum>>8), byte(sum)
	return b
}
