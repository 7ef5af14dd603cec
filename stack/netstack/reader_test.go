package netstack

import (
	"context"
	"net/netip"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

func TestHostilePackets(t *testing.T) {
	f4, f6 := families[0], families[1]
	from := func(s string) []byte { return udpPacket(netip.AddrPortFrom(netip.MustParseAddr(s), 1), f4.target, nil) }
	to := func(s string) []byte { return udpPacket(f4.guest, netip.AddrPortFrom(netip.MustParseAddr(s), 1), nil) }
	broken := func(pkt []byte, at int) []byte {
		pkt[at] ^= 0xff
		return pkt
	}
	tests := []struct {
		name  string
		pkt   []byte
		count func(Drops) uint64
	}{
		{"version 0", []byte{0, 1, 2}, func(d Drops) uint64 { return d.Malformed }},
		{"short v4", udpPacket(f4.guest, f4.target, nil)[:12], func(d Drops) uint64 { return d.Malformed }},
		{"short v6", udpPacket(f6.guest, f6.target, nil)[:30], func(d Drops) uint64 { return d.Malformed }},
		{"shorter than total length", udpPacket(f4.guest, f4.target, pattern(9))[:30], func(d Drops) uint64 { return d.Malformed }},
		{"header length 4", ipPacket(guest4, target4, header.UDPProtocolNumber, pattern(20), func(h header.IPv4) { h[0] = 0x44 }), func(d Drops) uint64 { return d.Malformed }},
		{"udp header cut", ipPacket(guest4, target4, header.UDPProtocolNumber, pattern(7)), func(d Drops) uint64 { return d.Malformed }},
		{"udp length too long", ipPacket(guest4, target4, header.UDPProtocolNumber, []byte{1, 1, 2, 2, 0, 200, 0, 0}), func(d Drops) uint64 { return d.Malformed }},
		{"udp length too short", ipPacket(guest4, target4, header.UDPProtocolNumber, []byte{1, 1, 2, 2, 0, 7, 0, 0}), func(d Drops) uint64 { return d.Malformed }},
		{"udp port 0", udpPacket(f4.guest, netip.AddrPortFrom(target4, 0), nil), func(d Drops) uint64 { return d.Malformed }},
		{"udp checksum", broken(udpPacket(f4.guest, f4.target, pattern(9)), 30), func(d Drops) uint64 { return d.BadChecksum }},
		{"ping checksum", broken(ipPacket(guest4, target4, header.ICMPv4ProtocolNumber, echoBody(guest4, target4, 8, 1, 1, pattern(9))), 30), func(d Drops) uint64 { return d.BadChecksum }},
		{"ping cut", ipPacket(guest4, target4, header.ICMPv4ProtocolNumber, []byte{8, 0, 0}), func(d Drops) uint64 { return d.Malformed }},
		{"icmp redirect", ipPacket(guest4, target4, header.ICMPv4ProtocolNumber, echoBody(guest4, target4, 5, 1, 1, nil)), func(d Drops) uint64 { return d.Ignored }},
		{"sctp", ipPacket(guest4, target4, 132, pattern(32)), func(d Drops) uint64 { return d.Ignored }},
		{"sctp v6", ipPacket(guest6, target6, 132, pattern(32)), func(d Drops) uint64 { return d.Ignored }},
		{"from loopback", from("127.0.0.1"), func(d Drops) uint64 { return d.Martian }},
		{"from multicast", from("224.0.0.5"), func(d Drops) uint64 { return d.Martian }},
		{"from broadcast", from("255.255.255.255"), func(d Drops) uint64 { return d.Martian }},
		{"from the gateway", from("192.168.65.1"), func(d Drops) uint64 { return d.Martian }},
		{"land", udpPacket(f4.guest, f4.guest, nil), func(d Drops) uint64 { return d.Martian }},
		{"to loopback", to("127.0.0.1"), func(d Drops) uint64 { return d.Martian }},
		{"to multicast", to("239.1.2.3"), func(d Drops) uint64 { return d.Ignored }},
		{"to broadcast", to("255.255.255.255"), func(d Drops) uint64 { return d.Ignored }},
		{"to 0.0.0.0", to("0.0.0.0"), func(d Drops) uint64 { return d.Ignored }},
		{"v4-mapped", udpPacket(f6.guest, netip.MustParseAddrPort("[::ffff:127.0.0.1]:53"), nil), func(d Drops) uint64 { return d.Martian }},
		{"tcp checksum", broken(syn(f4.guest, f4.target), 39), func(d Drops) uint64 { return d.BadChecksum }},
		{"ip checksum", broken(syn(f4.guest, f4.target), 8), func(d Drops) uint64 { return d.BadChecksum }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := start(t, 1500)
			b.send(link.Header{}, tt.pkt)
			waitFor(t, "the drop to be counted", func() bool { return tt.count(b.Stats().Drops) == 1 })
			// The next good packet passes.
			b.send(link.Header{}, udpPacket(f4.guest, f4.target, pattern(3)))
			if d := next(t, b.fwd.datagrams); len(d.Payload) != 3 {
				t.Errorf("got %+v", d)
			}
			if n := b.Stats().ToGuestPackets; n != 0 {
				t.Errorf("the guest got %d packets", n)
			}
		})
	}
}

// nobody is a Forwarder for fuzzing: it touches every byte it is given.
type nobody struct {
	recorder
	sum byte
}

func (n *nobody) Datagram(d flow.Datagram) {
	for _, b := range d.Payload {
		n.sum += b
	}
	if d.Hops == 0 || !d.Guest.IsValid() || !d.Target.IsValid() {
		panic("datagram without hops or address")
	}
}

func (n *nobody) Echo(e flow.Echo) {
	for _, b := range e.Payload {
		n.sum += b
	}
}

// FuzzPacket feeds the reader any packet with any offload header.
func FuzzPacket(f *testing.F) { fuzzReader(f, nil) }

// FuzzPacketKernel is FuzzPacket with a kernel path, whose every other dial takes time
// and every third answer fails, and with trains of datagrams.
func FuzzPacketKernel(f *testing.F) {
	n := 0
	k := &fakeKernel{open: make(map[flow.Tuple]func(flow.Verdict))}
	k.decide = func(flow.Tuple) (flow.Verdict, bool) {
		n++
		k.accept = n%3 != 0
		answers := []flow.Answer{flow.Connect, flow.Reset, flow.Silence, flow.Unreachable}
		return flow.Verdict{Answer: answers[n/2%4]}, n%2 == 0
	}
	fuzzReader(f, k)
}

func fuzzReader(f *testing.F, k *fakeKernel) {
	for _, fam := range families {
		f.Add(udpPacket(fam.guest, fam.target, pattern(40)), uint8(0), uint8(0), uint16(0))
		f.Add(udpPacket(fam.guest, fam.target, pattern(4000)), uint8(link.NeedsCsum), uint8(link.GSOUDPL4), uint16(1000))
		f.Add(syn(fam.guest, fam.target), uint8(0), uint8(0), uint16(0))
	}
	for _, p := range fragments4(udpPacket(families[0].guest, families[0].target, pattern(2000)), 1480) {
		f.Add(p, uint8(0), uint8(0), uint16(0))
	}
	f.Add(ipPacket(guest4, target4, header.ICMPv4ProtocolNumber, echoBody(guest4, target4, 8, 1, 1, pattern(9))), uint8(0), uint8(0), uint16(0))
	ours, theirs := link.NewPipe(1500)
	cfg := Config{Link: ours, Gateway4: gw4, Gateway6: gw6}
	if k != nil {
		cfg.Kernel = k
	}
	s, err := New(cfg)
	if err != nil {
		f.Fatal(err)
	}
	if k != nil {
		s.train = new(train)
		s.UseKernel(true, true)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.forward, s.ctx = &nobody{}, ctx
	var loops sync.WaitGroup
	loops.Go(s.ep.writeLoop)
	loops.Go(func() { // the guest takes what it gets
		for b := make([]byte, 2*link.MaxPacket); ; {
			if _, _, err := theirs.ReadPacket(b, nil); err != nil {
				return
			}
		}
	})
	f.Cleanup(func() {
		cancel()
		s.dials.close()
		if k != nil {
			k.drain()
		}
		s.ip.Close()
		s.flows.Wait()
		s.ep.closeQueue()
		s.ep.drained.Wait()
		ours.Close()
		theirs.Close()
		loops.Wait()
		s.ip.Destroy()
	})
	r := &reader{s: s, chunk: newChunk()}
	f.Cleanup(func() { r.chunk.Release() })
	f.Fuzz(func(t *testing.T, pkt []byte, flags, gso uint8, size uint16) {
		if len(pkt) > link.MaxPacket {
			return
		}
		r.n = copy(r.head[:], pkt)
		r.n += copy(r.chunk.AsSlice()[headLen:], pkt[r.n:])
		r.hdr = link.Header{Flags: flags, GSOType: gso, GSOSize: size}
		r.dispatch()
		if k != nil {
			s.sendTrain()
			k.drain()
		}
	})
}
