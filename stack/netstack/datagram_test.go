package netstack

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

// families are the two address families every datagram test runs over.
var families = []struct {
	name          string
	guest, target netip.AddrPort
	gateway       netip.Addr
	udp, ping     int // most payload of one packet
}{
	{"v4", netip.AddrPortFrom(guest4, 40000), netip.AddrPortFrom(target4, 5353), gw4, 65507, 65507},
	{"v6", netip.AddrPortFrom(guest6, 40000), netip.AddrPortFrom(target6, 5353), gw6, 65487, 65487},
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b
}

// compareAddrs lets cmp look into netip's types.
var compareAddrs = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func TestDatagramFromGuest(t *testing.T) {
	for _, f := range families {
		for _, n := range []int{0, 1, 72, 73, 100, 101, 1472, 9000, f.udp} {
			t.Run(fmt.Sprintf("%s/%d", f.name, n), func(t *testing.T) {
				b := start(t, 65535)
				payload := pattern(n)
				b.send(link.Header{}, udpPacket(f.guest, f.target, payload))
				want := flow.Datagram{
					Guest: f.guest, Target: f.target, Payload: payload, Hops: 63,
					DontFragment: f.guest.Addr().Is6(),
				}
				if d := cmp.Diff(want, next(t, b.fwd.datagrams), compareAddrs); d != "" {
					t.Error(d)
				}
			})
		}
	}
}

func TestDatagramTrainFromGuest(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			pkt := udpPacket(f.guest, f.target, pattern(4500))
			b.send(link.Header{Flags: link.NeedsCsum, GSOType: link.GSOUDPL4, GSOSize: 1000}, pkt)
			got := next(t, b.fwd.datagrams)
			if got.Segment != 1000 || !bytes.Equal(got.Payload, pattern(4500)) {
				t.Errorf("segment %d, %d bytes", got.Segment, len(got.Payload))
			}
		})
	}
}

// fragment cuts a whole IPv4 packet in two.
func fragments4(pkt []byte, at int) [][]byte {
	body := pkt[header.IPv4MinimumSize:]
	mk := func(off int, part []byte, more bool) []byte {
		return ipPacket(guest4, target4, header.IPv4(pkt).TransportProtocol(), part, func(h header.IPv4) {
			flags := uint8(0)
			if more {
				flags = header.IPv4FlagMoreFragments
			}
			h.SetFlagsFragmentOffset(flags, uint16(off))
		})
	}
	return [][]byte{mk(0, body[:at], true), mk(at, body[at:], false)}
}

func TestFragmentsFromGuest(t *testing.T) {
	b := start(t, 1500)
	f := families[0]
	whole := udpPacket(f.guest, f.target, pattern(2000))
	for _, p := range fragments4(whole, 1480) {
		b.send(link.Header{}, p)
	}
	if got := next(t, b.fwd.datagrams); !bytes.Equal(got.Payload, pattern(2000)) || got.Guest != f.guest || got.Target != f.target || got.Hops != 63 {
		t.Errorf("got %v > %v, %d bytes, %d hops", got.Guest, got.Target, len(got.Payload), got.Hops)
	}
	ping := ipPacket(guest4, target4, header.ICMPv4ProtocolNumber, echoBody(guest4, target4, 8, 5, 6, pattern(2000)))
	for _, p := range fragments4(ping, 1480) {
		b.send(link.Header{}, p)
	}
	if got := next(t, b.fwd.echoes); !bytes.Equal(got.Payload, pattern(2000)) || got.ID != 5 || got.Seq != 6 {
		t.Errorf("got echo %d/%d, %d bytes", got.ID, got.Seq, len(got.Payload))
	}
}

// Extension headers are gVisor's to skip; what is behind them is carried, however short.
func TestExtensionHeader(t *testing.T) {
	f := families[1]
	options := func(next tcpip.TransportProtocolNumber, body []byte) []byte {
		ext := []byte{byte(next), 0, 1, 4, 0, 0, 0, 0} // 8 bytes of which 6 are a PadN option
		return ipPacket(guest6, target6, 60, append(ext, body...))
	}
	for _, n := range []int{0, 1, 1000, 9000} {
		b := start(t, 65535)
		b.send(link.Header{}, options(header.UDPProtocolNumber, udpBody(f.guest, f.target, pattern(n))))
		if got := next(t, b.fwd.datagrams); !bytes.Equal(got.Payload, pattern(n)) || got.Guest != f.guest || got.Target != f.target {
			t.Errorf("%v > %v, %d bytes, want %d", got.Guest, got.Target, len(got.Payload), n)
		}
		b.send(link.Header{}, options(header.ICMPv6ProtocolNumber, echoBody(guest6, target6, 128, 5, 6, pattern(n))))
		if got := next(t, b.fwd.echoes); !bytes.Equal(got.Payload, pattern(n)) || got.ID != 5 || got.Seq != 6 {
			t.Errorf("echo %d/%d, %d bytes, want %d", got.ID, got.Seq, len(got.Payload), n)
		}
		if got := b.Stats().ToGuestPackets; got != 0 {
			t.Errorf("the guest got %d packets", got)
		}
	}
}

// reassemble reads packets to the guest until one datagram is whole, and checks IP
// and UDP on the way.
func (b *bench) reassemble(guest, target netip.AddrPort) []byte {
	b.t.Helper()
	var body []byte
	for more := true; more; {
		pkt, vh := b.receive()
		if vh.GSOType == link.GSONone && len(pkt) > b.cfg.Link.MTU() {
			b.t.Fatalf("packet of %d bytes on an MTU of %d", len(pkt), b.cfg.Link.MTU())
		}
		var off int
		if target.Addr().Is4() {
			h := header.IPv4(pkt)
			if !h.IsChecksumValid() || int(h.TotalLength()) != len(pkt) {
				b.t.Fatalf("bad IPv4 header % x", pkt[:20])
			}
			more, off = h.Flags()&header.IPv4FlagMoreFragments != 0, int(h.FragmentOffset())
			pkt = pkt[header.IPv4MinimumSize:]
		} else {
			h := header.IPv6(pkt)
			more = false
			proto := h.NextHeader()
			pkt = pkt[header.IPv6MinimumSize:]
			if proto == header.IPv6FragmentHeader {
				field := be16(pkt[2:])
				more, off = field&1 != 0, int(field&^7)
				pkt = pkt[header.IPv6FragmentHeaderSize:]
			}
		}
		if off != len(body) {
			b.t.Fatalf("fragment at %d, want %d", off, len(body))
		}
		body = append(body, pkt...)
		if vh.Flags&link.NeedsCsum != 0 { // finish it as the kernel would
			h := header.UDP(body)
			h.SetChecksum(0)
			h.SetChecksum(^checksum.Checksum(body, pseudo(target.Addr(), guest.Addr(), header.UDPProtocolNumber, len(body))))
		}
	}
	return body
}

func TestWriteDatagram(t *testing.T) {
	for _, f := range families {
		for _, n := range []int{0, 1, 1400, 1452, 1453, 1473, 4000, f.udp} {
			t.Run(fmt.Sprintf("%s/%d", f.name, n), func(t *testing.T) {
				b := start(t, 1500)
				if err := b.WriteDatagram(flow.Datagram{Guest: f.guest, Target: f.target, Payload: pattern(n)}); err != nil {
					t.Fatal(err)
				}
				body := b.reassemble(f.guest, f.target)
				h := header.UDP(body)
				if h.SourcePort() != f.target.Port() || h.DestinationPort() != f.guest.Port() || int(h.Length()) != len(body) {
					t.Errorf("header % x", body[:8])
				}
				ip := ipInfo{src: f.target.Addr(), dst: f.guest.Addr()}
				if h.Checksum() == 0 || !udpChecksumOK(&ip, body) {
					t.Errorf("bad checksum %#x", h.Checksum())
				}
				if !bytes.Equal(body[8:], pattern(n)) {
					t.Error("payload differs")
				}
			})
		}
	}
}

func TestWriteDatagramTooLong(t *testing.T) {
	b := start(t, 1500)
	f := families[0]
	if err := b.WriteDatagram(flow.Datagram{Guest: f.guest, Target: f.target, Payload: pattern(f.udp + 1)}); err == nil {
		t.Error("no error")
	}
}

func TestWriteTrain(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := start(t, 1500)
			d := flow.Datagram{Guest: f.guest, Target: f.target, Payload: pattern(2500), Segment: 1000}
			if err := b.WriteDatagram(d); err != nil {
				t.Fatal(err)
			}
			pkt, vh := b.receive()
			if vh.GSOType != link.GSOUDPL4 || vh.GSOSize != 1000 || !bytes.HasSuffix(pkt, pattern(2500)) {
				t.Errorf("header %+v, %d bytes", vh, len(pkt))
			}
			// Pieces that do not fit the MTU cannot be left to the link.
			d.Segment = 2000
			if err := b.WriteDatagram(d); err != nil {
				t.Fatal(err)
			}
			for _, n := range []int{2000, 500} {
				if body := b.reassemble(f.guest, f.target); len(body) != 8+n {
					t.Errorf("datagram of %d bytes, want %d", len(body)-8, n)
				}
			}
		})
	}
}

func TestEcho(t *testing.T) {
	for _, f := range families {
		for _, n := range []int{0, 56, 1472, 3000} {
			t.Run(fmt.Sprintf("%s/%d", f.name, n), func(t *testing.T) {
				b := start(t, 1500)
				guest, target := f.guest.Addr(), f.target.Addr()
				request, reply, proto := uint8(8), uint8(0), header.ICMPv4ProtocolNumber
				if guest.Is6() {
					request, reply, proto = 128, 129, header.ICMPv6ProtocolNumber
				}
				b.send(link.Header{}, ipPacket(guest, target, proto, echoBody(guest, target, request, 300, 7, pattern(n))))
				e := next(t, b.fwd.echoes)
				if e.Guest != guest || e.Target != target || e.ID != 300 || e.Seq != 7 || !bytes.Equal(e.Payload, pattern(n)) {
					t.Fatalf("got %v > %v %d/%d %d bytes", e.Guest, e.Target, e.ID, e.Seq, len(e.Payload))
				}
				if err := b.WriteEcho(e); err != nil {
					t.Fatal(err)
				}
				body := b.reassemble(f.guest, f.target)
				if want := echoBody(target, guest, reply, 300, 7, pattern(n)); !bytes.Equal(body, want) {
					t.Errorf("reply % x, want % x", body[:8], want[:8])
				}
			})
		}
	}
}

func TestTTLEndsHere(t *testing.T) {
	b := start(t, 1500)
	f := families[0]
	b.send(link.Header{}, udpPacket(f.guest, f.target, pattern(40), func(h header.IPv4) { h.SetTTL(1) }))
	pkt, _ := b.receive()
	h := header.IPv4(pkt)
	msg := header.ICMPv4(h.Payload())
	if got := fromTCPIP(h.SourceAddress()); got != gw4 || msg.Type() != header.ICMPv4TimeExceeded || msg.Code() != 0 {
		t.Errorf("from %v type %d code %d", got, msg.Type(), msg.Code())
	}
	if checksum.Checksum(msg, 0) != 0xffff {
		t.Error("bad ICMP checksum")
	}
	quoted := msg[8:]
	if want := udpBody(f.guest, f.target, pattern(40)); !bytes.Equal(quoted[20:24], want[:4]) || !bytes.Equal(quoted[28:], pattern(40)) {
		t.Errorf("quoted % x", quoted)
	}
}

func TestWriteError(t *testing.T) {
	router4, router6 := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:1::1")
	for _, f := range families {
		for _, proto := range []flow.Proto{flow.UDP, flow.Ping} {
			t.Run(fmt.Sprintf("%s/%v", f.name, proto), func(t *testing.T) {
				b := start(t, 1500)
				e := flow.Error{
					Tuple: flow.Tuple{Proto: proto, Guest: f.guest, Target: f.target},
					ICMP:  flow.ICMP{Type: 3, Code: 4}, From: router4, MTU: 1280, Quote: pattern(2000),
				}
				if f.guest.Addr().Is6() {
					e.ICMP, e.From = flow.ICMP{Type: 2}, router6
				}
				if err := b.WriteError(e); err != nil {
					t.Fatal(err)
				}
				pkt, _ := b.receive()
				checkError(t, pkt, e)
			})
		}
	}
}

// checkError checks an ICMP error packet against what was asked for.
func checkError(t *testing.T, pkt []byte, e flow.Error) {
	t.Helper()
	var src, dst netip.Addr
	var body, quoted []byte
	var mtu, most int
	if e.Guest.Addr().Is4() {
		h := header.IPv4(pkt)
		src, dst, body = fromTCPIP(h.SourceAddress()), fromTCPIP(h.DestinationAddress()), h.Payload()
		mtu, most, quoted = int(be16(body[6:])), 576, body[8+20:]
		if checksum.Checksum(body, 0) != 0xffff {
			t.Error("bad checksum")
		}
		q := header.IPv4(body[8:])
		if fromTCPIP(q.SourceAddress()) != e.Guest.Addr() || fromTCPIP(q.DestinationAddress()) != e.Target.Addr() || int(q.TotalLength()) != 28+len(e.Quote) {
			t.Errorf("quoted header % x", q[:20])
		}
	} else {
		h := header.IPv6(pkt)
		src, dst, body = fromTCPIP(h.SourceAddress()), fromTCPIP(h.DestinationAddress()), h.Payload()
		mtu, most, quoted = int(be16(body[6:])), 1280, body[8+40:]
		if checksum.Checksum(body, pseudo(src, dst, header.ICMPv6ProtocolNumber, len(body))) != 0xffff {
			t.Error("bad checksum")
		}
	}
	if src != e.From || dst != e.Guest.Addr() || mtu != int(e.MTU) || len(pkt) > most {
		t.Errorf("%v > %v, mtu %d, %d bytes", src, dst, mtu, len(pkt))
	}
	if body[0] != e.ICMP.Type || body[1] != e.ICMP.Code {
		t.Errorf("type %d code %d", body[0], body[1])
	}
	if e.Proto == flow.UDP && (be16(quoted) != e.Guest.Port() || be16(quoted[2:]) != e.Target.Port()) ||
		e.Proto == flow.Ping && (be16(quoted[4:]) != e.Guest.Port() || be16(quoted[6:]) != e.Target.Port()) {
		t.Errorf("quoted transport % x", quoted[:8])
	}
	if !bytes.HasPrefix(e.Quote, quoted[8:]) || len(quoted) < 400 {
		t.Errorf("quoted %d bytes of payload", len(quoted)-8)
	}
}
