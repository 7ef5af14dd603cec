package netstack

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

var noOffload = link.Header{}

// An error about a datagram that was written to the guest names the flow, the router and
// what is known of the payload.
func TestRejectedDatagram(t *testing.T) {
	for _, f := range clients {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			if err := b.WriteDatagram(flow.Datagram{Guest: f.guest, Target: f.client, Payload: []byte("hello")}); err != nil {
				t.Fatal(err)
			}
			pkt, _ := b.receive()
			b.send(noOffload, quoting(f.guest.Addr(), f.icmp, f.unreach, f.portUnreachables, 0, pkt))
			e := next(t, b.fwd.rejected)
			if e.Proto != flow.UDP || e.Guest != f.guest || e.Target != f.client || e.From != f.guest.Addr() ||
				string(e.Quote) != "hello" || e.Size != 5 || e.ICMP != (flow.ICMP{Type: f.unreach, Code: f.portUnreachables}) {
				t.Errorf("got %+v", e)
			}
		})
	}
}

func TestRejectedTooBig(t *testing.T) {
	b := start(t, 1500)
	body := udpPacket(clients[0].client, clients[0].guest, []byte("x"))
	b.send(noOffload, quoting(guest4, 1, 3, 4, 1400, body))
	if e := next(t, b.fwd.rejected); e.MTU != 1400 {
		t.Errorf("v4: MTU %d, want 1400", e.MTU)
	}
	body = udpPacket(clients[1].client, clients[1].guest, []byte("x"))
	b.send(noOffload, quoting(guest6, 58, 2, 0, 1300, body))
	if e := next(t, b.fwd.rejected); e.MTU != 1300 {
		t.Errorf("v6: MTU %d, want 1300", e.MTU)
	}
}

// Errors that cannot be about packets of ours are ignored.
func TestRejectedMalformed(t *testing.T) {
	b := start(t, 1500)
	ours := udpPacket(clients[0].client, clients[0].guest, []byte("hello"))
	tests := map[string][]byte{
		"quote_is_short":   ours[:header.IPv4MinimumSize+7],
		"no_quote":         ours[:0],
		"a_later_fragment": udpPacket(clients[0].client, clients[0].guest, nil, func(h header.IPv4) { h.SetFlagsFragmentOffset(0, 8) }),
		"header_length":    append([]byte{0x4f}, ours[1:header.IPv4MinimumSize+8]...),
		"version":          append([]byte{0x65}, ours[1:]...),
	}
	for name, quote := range tests {
		msg := echoBody(guest4, target4, 3, 0, 0, quote)
		b.send(noOffload, ipPacket(guest4, target4, header.ICMPv4ProtocolNumber, msg))
		select {
		case e := <-b.fwd.rejected:
			t.Errorf("%s: %+v", name, e)
		default:
		}
	}
	// Its sender is not the one who gets the error.
	b.send(noOffload, ipPacket(guest4, netip.MustParseAddr("203.0.113.9"), header.ICMPv4ProtocolNumber, echoBody(guest4, target4, 3, 0, 0, ours)))
	b.send(noOffload, quoting(guest4, 1, 3, 1, 0, ours)) // and one that is right
	if e := next(t, b.fwd.rejected); e.ICMP.Code != 1 {
		t.Errorf("got %+v", e)
	}
}

// Datagrams to the gateway are the forwarder's where it expects them.
func TestExpected(t *testing.T) {
	for _, f := range clients {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			want := flow.Tuple{Proto: flow.UDP, Guest: f.guest, Target: netip.AddrPortFrom(f.gateway, 40000)}
			b.fwd.expects = func(t flow.Tuple) bool { return t == want }
			b.send(noOffload, udpPacket(f.guest, want.Target, []byte("reply")))
			d := next(t, b.fwd.datagrams)
			if d.Guest != want.Guest || d.Target != want.Target || string(d.Payload) != "reply" {
				t.Errorf("got %+v", d)
			}
			// Anything else is gVisor's, which knows of no such port.
			b.send(noOffload, udpPacket(f.guest, netip.AddrPortFrom(f.gateway, 40001), []byte("?")))
			pkt, _ := b.receive()
			if f.icmp == 1 && pkt[header.IPv4MinimumSize] != f.unreach || f.icmp == 58 && pkt[header.IPv6MinimumSize] != f.unreach {
				t.Errorf("got % x, want an ICMP unreachable", pkt)
			}
		})
	}
	t.Run("fragments", func(t *testing.T) {
		b := start(t, 1500)
		f := clients[0]
		gateway := netip.AddrPortFrom(f.gateway, 40000)
		b.fwd.expects = func(t flow.Tuple) bool { return t.Target == gateway }
		body := udpBody(f.guest, gateway, pattern(3000))
		for i, part := range [][]byte{body[:1480], body[1480:]} {
			b.send(noOffload, ipPacket(guest4, gw4, header.UDPProtocolNumber, part, func(h header.IPv4) {
				h.SetFlagsFragmentOffset(uint8(header.IPv4FlagMoreFragments)*uint8(1-i), uint16(1480*i))
			}))
		}
		if d := next(t, b.fwd.datagrams); len(d.Payload) != 3000 {
			t.Errorf("got %d bytes, want 3000", len(d.Payload))
		}
	})
}

func FuzzParseError(f *testing.F) {
	for _, c := range clients {
		p := udpPacket(c.client, c.guest, []byte("hello"))
		f.Add(c.guest.Addr().Is6(), echoBody(c.guest.Addr(), c.client.Addr(), c.unreach, 0, 0, p))
		f.Add(c.guest.Addr().Is6(), echoBody(c.guest.Addr(), c.client.Addr(), c.unreach, 0, 0, syn(c.client, c.guest)))
	}
	f.Fuzz(func(t *testing.T, v6 bool, b []byte) {
		ip := &ipInfo{src: guest4, dst: target4}
		if v6 {
			ip = &ipInfo{src: guest6, dst: target6}
		}
		e, ok := parseError(ip, b)
		if !ok {
			return
		}
		if e.Target.Addr() != ip.dst || e.Guest.Addr().Is4() == v6 || len(e.Quote) > e.Size || e.Proto != flow.TCP && e.Proto != flow.UDP {
			t.Errorf("% x: %+v", b, e)
		}
	})
}
