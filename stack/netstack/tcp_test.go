package netstack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

// guestStack is a second gVisor stack at the guest's end of the link: a guest whose
// TCP is not our own code.
func guestStack(b *bench) *stack.Stack {
	b.t.Helper()
	ep := newEndpoint(b.guest, new(counters))
	g := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	if terr := g.CreateNIC(nicID, ep); terr != nil {
		b.t.Fatal(terr)
	}
	for _, a := range []netip.Addr{guest4, guest6} {
		g.AddProtocolAddress(nicID, tcpip.ProtocolAddress{Protocol: protocolOf(a), AddressWithPrefix: toTCPIP(a).WithPrefix()}, stack.AddressProperties{})
	}
	g.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}, {Destination: header.IPv6EmptySubnet, NIC: nicID}})
	s := &Stack{cfg: Config{Link: b.guest, Gateway4: guest4, Gateway6: guest6}, ep: ep, ip: g}
	var loops sync.WaitGroup
	loops.Go(ep.writeLoop)
	loops.Go(func() { s.readLoop() })
	b.t.Cleanup(func() {
		g.Close()
		ep.closeQueue()
		b.guest.Close()
		loops.Wait()
		g.Destroy()
	})
	return g
}

// echoRelay answers every connection with its own bytes.
func echoRelay(_ context.Context, c flow.Conn, _ flow.Verdict) {
	defer c.Close()
	var pool flow.BufPool
	for {
		buf, err := c.ReadBuf(&pool)
		if errors.Is(err, io.EOF) {
			c.CloseWrite()
			return
		}
		if err != nil {
			return
		}
		if _, err := c.Write(buf.Bytes); err != nil {
			return
		}
		pool.Put(buf)
	}
}

func dialGuest(t *testing.T, g *stack.Stack, target netip.AddrPort) (*gonet.TCPConn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return gonet.DialContextTCP(ctx, g, addressOf(target.Addr(), target.Port()), protocolOf(target.Addr()))
}

func TestTCPEcho(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			b.fwd.decide = func(_ context.Context, tu flow.Tuple) flow.Verdict {
				if tu.Target != f.target || tu.Guest.Addr() != f.guest.Addr() || tu.Proto != flow.TCP {
					t.Errorf("asked about %v", tu)
				}
				return flow.Verdict{Answer: flow.Connect}
			}
			b.fwd.relay = echoRelay
			g := guestStack(b)
			c, err := dialGuest(t, g, f.target)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			want := pattern(3 << 20)
			go func() {
				c.Write(want)
				c.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestTCPRefused(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Reset} }
			_, err := dialGuest(t, guestStack(b), f.target)
			if err == nil || !bytes.Contains([]byte(err.Error()), []byte("refused")) {
				t.Errorf("dial = %v, want connection refused", err)
			}
		})
	}
}

// synSeq is the sequence number of syn.
const synSeq = 0x01020304

// syn is the first segment of a connection.
func syn(src, dst netip.AddrPort, edit ...func(header.IPv4)) []byte {
	return segment(src, dst, header.TCPFields{SeqNum: synSeq, Flags: header.TCPFlagSyn, WindowSize: 65535}, edit...)
}

// segment is a TCP segment without options or data.
func segment(src, dst netip.AddrPort, f header.TCPFields, edit ...func(header.IPv4)) []byte {
	b := make([]byte, header.TCPMinimumSize)
	h := header.TCP(b)
	f.SrcPort, f.DstPort, f.DataOffset = src.Port(), dst.Port(), header.TCPMinimumSize
	h.Encode(&f)
	h.SetChecksum(^h.CalculateChecksum(pseudo(src.Addr(), dst.Addr(), header.TCPProtocolNumber, len(b))))
	return ipPacket(src.Addr(), dst.Addr(), header.TCPProtocolNumber, b, edit...)
}

func TestTCPUnreachable(t *testing.T) {
	b := start(t, 1500)
	f := families[0]
	router := netip.MustParseAddr("203.0.113.1")
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict {
		return flow.Verdict{Answer: flow.Unreachable, ICMP: flow.ICMP{Type: 3, Code: 10}, From: router}
	}
	b.send(link.Header{}, syn(f.guest, f.target))
	pkt, _ := b.receive()
	h := header.IPv4(pkt)
	body := h.Payload()
	if fromTCPIP(h.SourceAddress()) != router || body[0] != 3 || body[1] != 10 {
		t.Errorf("from %v, type %d code %d", h.SourceAddress(), body[0], body[1])
	}
	if q := header.TCP(body[28:]); q.SequenceNumber() != 0x01020304 || q.SourcePort() != f.guest.Port() || q.DestinationPort() != f.target.Port() {
		t.Errorf("quoted % x", body[28:])
	}
}

func TestTCPTracerouteFirstHop(t *testing.T) {
	b := start(t, 1500)
	b.send(link.Header{}, syn(families[0].guest, families[0].target, func(h header.IPv4) { h.SetTTL(1) }))
	pkt, _ := b.receive()
	if h := header.IPv4(pkt); fromTCPIP(h.SourceAddress()) != gw4 || h.Payload()[0] != 11 {
		t.Errorf("got % x", pkt)
	}
}

// A guest that goes away after its SYN was answered must give the host socket back.
func TestTCPGuestGone(t *testing.T) {
	b := start(t, 1500)
	f := families[0]
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Connect} }
	b.send(link.Header{}, syn(f.guest, f.target))
	pkt, _ := b.receive()
	synack := header.TCP(header.IPv4(pkt).Payload())
	rst := make([]byte, header.TCPMinimumSize)
	h := header.TCP(rst)
	h.Encode(&header.TCPFields{
		SrcPort: f.guest.Port(), DstPort: f.target.Port(), SeqNum: synack.AckNumber(),
		DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagRst,
	})
	h.SetChecksum(^h.CalculateChecksum(pseudo(guest4, target4, header.TCPProtocolNumber, len(rst))))
	b.send(link.Header{}, ipPacket(guest4, target4, header.TCPProtocolNumber, rst))
	waitFor(t, "the verdict to be given back", func() bool {
		b.fwd.mu.Lock()
		defer b.fwd.mu.Unlock()
		return b.fwd.discarded == 1
	})
	waitFor(t, "the dial to end", func() bool { return b.Stats().Dials == 0 })
}

// tcpSegment is a segment of the guest without payload.
func tcpSegment(src, dst netip.AddrPort, seq uint32, flags header.TCPFlags) []byte {
	b := make([]byte, header.TCPMinimumSize)
	h := header.TCP(b)
	h.Encode(&header.TCPFields{
		SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: seq, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535,
	})
	h.SetChecksum(^h.CalculateChecksum(pseudo(src.Addr(), dst.Addr(), header.TCPProtocolNumber, len(b))))
	return ipPacket(src.Addr(), dst.Addr(), header.TCPProtocolNumber, b)
}

// A guest that says so while its target is being dialled ends the dial at once.
func TestTCPGuestTakesSYNBack(t *testing.T) {
	const seq = 1000
	f := families[0]
	tests := []struct {
		name string
		seq  uint32
		flag header.TCPFlags
		ends bool
	}{
		{"reset", seq + 1, header.TCPFlagRst, true},
		{"reset of the SYN", seq, header.TCPFlagRst, true},
		{"reset of something else", seq + 2, header.TCPFlagRst, false},
		{"another socket's SYN", seq + 77, header.TCPFlagSyn, true},
		{"the same SYN", seq, header.TCPFlagSyn, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := start(t, 1500)
			b.fwd.decide = func(ctx context.Context, _ flow.Tuple) flow.Verdict {
				<-ctx.Done()
				return flow.Verdict{Answer: flow.Connect} // the target answered in the same moment
			}
			b.send(link.Header{}, tcpSegment(f.guest, f.target, seq, header.TCPFlagSyn))
			waitFor(t, "the dial", func() bool { return b.Stats().Dials == 1 })
			b.send(link.Header{}, tcpSegment(f.guest, f.target, tt.seq, tt.flag))
			waitFor(t, "the segment to be read", func() bool { return b.Stats().FromGuestPackets == 2 })
			if tt.ends {
				waitFor(t, "the dial to end", func() bool { return b.Stats().Dials == 0 })
			} else if time.Sleep(20 * time.Millisecond); b.Stats().Dials != 1 || b.Stats().GaveUp != 0 {
				t.Error("the dial has ended")
			}
			if n := b.Stats().ToGuestPackets; n != 0 {
				t.Errorf("the guest got %d packets", n)
			}
		})
	}
}

// A guest that never completes its handshake does not hold up the end.
func TestRunEndsHandshake(t *testing.T) {
	var before time.Time
	t.Cleanup(func() { // after start's, which waits for Run
		if d := time.Since(before); d > patience { // gVisor gives it up after a minute
			t.Errorf("Run took %v to end", d)
		}
	})
	b := start(t, 1500)
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Connect} }
	b.send(link.Header{}, syn(families[0].guest, families[0].target))
	b.receive() // the SYN-ACK
	before = time.Now()
}

// waitFor polls a condition.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func TestDialLimits(t *testing.T) {
	ours, theirs := link.NewPipe(1500)
	s, err := New(Config{Link: ours, Gateway4: gw4, Gateway6: gw6, MaxDials: 6})
	if err != nil {
		t.Fatal(err)
	}
	fwd := &recorder{decide: func(ctx context.Context, _ flow.Tuple) flow.Verdict {
		<-ctx.Done()
		return flow.Verdict{}
	}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, fwd) }()
	b := &bench{Stack: s, t: t, guest: theirs, fwd: fwd}
	other := netip.MustParseAddr("192.168.65.9")
	for port := uint16(1000); port < 1010; port++ {
		b.send(link.Header{}, syn(netip.AddrPortFrom(guest4, port), families[0].target))
	}
	waitFor(t, "the guest's share to be full", func() bool { return s.Stats().Dials == 4 && s.Stats().Drops.GuestLimit == 6 })
	for port := uint16(1000); port < 1010; port++ {
		b.send(link.Header{}, syn(netip.AddrPortFrom(other, port), families[0].target))
	}
	// A stranger finds a quarter of the room closed, and gets in once it is known.
	waitFor(t, "the limit", func() bool { return s.Stats().Dials == 4 && s.Stats().Drops.DialLimit == 10 })
	s.dials.know(other)
	for port := uint16(1000); port < 1010; port++ {
		b.send(link.Header{}, syn(netip.AddrPortFrom(other, port), families[0].target))
	}
	waitFor(t, "the limit", func() bool { return s.Stats().Dials == 6 && s.Stats().Drops.DialLimit == 18 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	theirs.Close()
}
