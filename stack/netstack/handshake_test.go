package netstack

import (
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
)

// shaken is how a handshake went.
type shaken struct {
	h   flow.Handshake
	err error
}

// shake begins a handshake on k's goroutine.
func shake(t *testing.T, b *bench, k *fakeKernel, from, to netip.AddrPort) (end func(bool), told <-chan shaken, err error) {
	t.Helper()
	c, begun := make(chan shaken, 10), make(chan struct{})
	k.do(func() {
		end, err = b.Handshake(from, to, func(h flow.Handshake, err error) { c <- shaken{h, err} })
		close(begun)
	})
	next(t, begun)
	return end, c, err
}

// written is a segment that the guest has got.
type written struct {
	src, dst netip.AddrPort
	header.TCP
}

// segmentOf reads the next one and checks its checksum.
func segmentOf(t *testing.T, b *bench) written {
	t.Helper()
	pkt, _ := b.receive()
	var src, dst netip.Addr
	h := header.TCP(pkt[header.IPv6MinimumSize:])
	if pkt[0]>>4 == 4 {
		h = header.TCP(pkt[header.IPv4MinimumSize:])
		src, dst = netip.AddrFrom4([4]byte(pkt[12:16])), netip.AddrFrom4([4]byte(pkt[16:20]))
	} else {
		src, dst = netip.AddrFrom16([16]byte(pkt[8:24])), netip.AddrFrom16([16]byte(pkt[24:40]))
	}
	if !tcpChecksumOK(&ipInfo{src: src, dst: dst}, h) {
		t.Error("wrong checksum")
	}
	return written{netip.AddrPortFrom(src, h.SourcePort()), netip.AddrPortFrom(dst, h.DestinationPort()), slices.Clone(h)}
}

// answerOf is segmentOf past repetitions of the SYN, which come where the machine has
// stood still.
func answerOf(t *testing.T, b *bench) written {
	t.Helper()
	for {
		if s := segmentOf(t, b); s.Flags() != header.TCPFlagSyn {
			return s
		}
	}
}

// synACK answers a SYN, with options.
func synACK(syn written, edit func(*header.TCPFields), options ...byte) []byte {
	f := header.TCPFields{
		SrcPort: syn.dst.Port(), DstPort: syn.src.Port(), SeqNum: 7000, AckNum: syn.SequenceNumber() + 1,
		Flags: header.TCPFlagSyn | header.TCPFlagAck, WindowSize: 1234, DataOffset: uint8(header.TCPMinimumSize + len(options)),
	}
	if edit != nil {
		edit(&f)
	}
	h := header.TCP(make([]byte, header.TCPMinimumSize+len(options)))
	h.Encode(&f)
	copy(h[header.TCPMinimumSize:], options)
	h.SetChecksum(^h.CalculateChecksum(pseudo(syn.dst.Addr(), syn.src.Addr(), header.TCPProtocolNumber, len(h))))
	return ipPacket(syn.dst.Addr(), syn.src.Addr(), header.TCPProtocolNumber, h)
}

// A Linux server's options: MSS 1400, SACK, timestamps 0x01020304, NOP, scale 7.
var linuxOptions = []byte{2, 4, 1400 >> 8, 1400 & 0xff, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7}

func TestHandshake(t *testing.T) {
	for _, f := range clients {
		for _, done := range []bool{true, false} {
			k := new(fakeKernel)
			b := startKernel(t, k)
			end, told, err := shake(t, b, k, f.client, f.guest)
			if err != nil {
				t.Fatal(err)
			}
			syn := segmentOf(t, b)
			o := header.ParseSynOptions(syn.Options(), false)
			if syn.src != f.client || syn.dst != f.guest || syn.Flags() != header.TCPFlagSyn || syn.WindowSize() != 65535 ||
				o.MSS != mostCookieMSS || !o.SACKPermitted || !o.TS || o.TSVal&1 != 0 || o.WS != handScale {
				t.Fatalf("the guest has % x with %+v", syn.TCP, o)
			}
			b.send(noOffload, synACK(syn, nil, linuxOptions...))
			got := next(t, told)
			want := flow.Handshake{
				Client: f.client, Guest: f.guest, Next: syn.SequenceNumber() + 1, GuestNext: 7001,
				Window: 65535, GuestWindow: 1234, Scale: handScale, GuestScale: 7, GuestMSS: 1400, SACK: true, Timestamps: true,
				Clock: got.h.Clock,
			}
			if got.err != nil || got.h != want || got.h.Clock&1 != 0 || int32(got.h.Clock-o.TSVal) < 0 {
				t.Errorf("%+v, want %+v", got, want)
			}
			// Nothing is answered before the end, not even what is repeated.
			b.send(noOffload, synACK(syn, nil, linuxOptions...))
			end(done)
			last := answerOf(t, b)
			if last.SequenceNumber() != want.Next || last.src != f.client || last.dst != f.guest {
				t.Errorf("the end is % x", last.TCP)
			}
			if done {
				lo := header.ParseTCPOptions(last.Options())
				if last.Flags() != header.TCPFlagAck || last.AckNumber() != 7001 || !lo.TS || lo.TSVal != want.Clock || lo.TSEcr != 0x01020304 || last.WindowSize() != 65535>>handScale {
					t.Errorf("the last segment is % x", last.TCP)
				}
			} else if last.Flags() != header.TCPFlagRst {
				t.Errorf("flags %v", last.Flags())
			}
			end(false) // means nothing any more
			if b.out.n != 0 || len(b.out.byFlow) != 0 || b.out.byHand.Load() != 0 {
				t.Error("it is still counted")
			}
		}
	}
}

// What a guest's options say is believed as far as it can be true.
func TestHandshakeOptions(t *testing.T) {
	f := clients[0]
	for _, tt := range []struct {
		name    string
		options []byte
		want    flow.Handshake
	}{
		{"none", nil, flow.Handshake{GuestMSS: 536}},
		{"largest_scale", []byte{3, 3, 200, 0}, flow.Handshake{GuestMSS: 536, Scale: handScale, GuestScale: 14}},
		{"scale_zero", []byte{3, 3, 0, 0}, flow.Handshake{GuestMSS: 536, Scale: handScale}},
		{"smallest_mss", []byte{2, 4, 0, 1}, flow.Handshake{GuestMSS: header.TCPMinimumSendMSS}},
		{"cut", []byte{4, 2, 8, 10}, flow.Handshake{GuestMSS: 536, SACK: true}},
		{"of_length_0", []byte{200, 0, 4, 2}, flow.Handshake{GuestMSS: 536}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := new(fakeKernel)
			b := startKernel(t, k)
			end, told, err := shake(t, b, k, f.client, f.guest)
			if err != nil {
				t.Fatal(err)
			}
			defer end(false)
			syn := segmentOf(t, b)
			b.send(noOffload, synACK(syn, nil, tt.options...))
			got := next(t, told).h
			if got.GuestMSS != tt.want.GuestMSS || got.Scale != tt.want.Scale || got.GuestScale != tt.want.GuestScale || got.SACK != tt.want.SACK || got.Timestamps != tt.want.Timestamps {
				t.Errorf("%+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestHandshakeRefused(t *testing.T) {
	for i := range clients {
		tries := 0
		for !refuseHandshake(t, i) {
			if tries++; tries == 20 {
				t.Fatal("the SYN is repeated before anything else comes")
			}
		}
	}
}

// refuseHandshake reports whether it was done before the SYN is repeated of its own accord,
// which is not so where the machine stands still.
func refuseHandshake(t *testing.T, client int) (inTime bool) {
	f := clients[client]
	k := new(fakeKernel)
	b := startKernel(t, k)
	begun := time.Now()
	end, told, err := shake(t, b, k, f.client, f.guest)
	if err != nil {
		t.Fatal(err)
	}
	defer end(false) // means nothing any more
	syn := segmentOf(t, b)
	// Somebody who does not know the number cannot refuse.
	b.send(noOffload, synACK(syn, func(f *header.TCPFields) { f.Flags, f.AckNum = header.TCPFlagRst|header.TCPFlagAck, f.AckNum+1 }))
	b.send(noOffload, synACK(syn, func(f *header.TCPFields) { f.Flags = header.TCPFlagRst }))
	// An old connection of the guest's gets a RST of its number, and the first one the SYN.
	for i := range 2 {
		b.send(noOffload, synACK(syn, func(f *header.TCPFields) { f.Flags, f.AckNum = header.TCPFlagAck, 99 }))
		if rst := answerOf(t, b); rst.Flags() != header.TCPFlagRst || rst.SequenceNumber() != 99 {
			t.Errorf("an old connection gets % x", rst.TCP)
		}
		if i > 0 {
			continue
		}
		again := segmentOf(t, b)
		if time.Since(begun) >= firstRetry {
			return false
		}
		if again.Flags() != header.TCPFlagSyn || again.SequenceNumber() != syn.SequenceNumber() {
			t.Errorf("behind the RST there is % x", again.TCP)
		}
	}
	b.send(noOffload, synACK(syn, func(f *header.TCPFields) { f.Flags = header.TCPFlagSyn })) // is dropped
	b.send(noOffload, synACK(syn, func(f *header.TCPFields) { f.Flags = header.TCPFlagRst | header.TCPFlagAck }))
	if got := next(t, told); !errors.Is(got.err, syscall.ECONNREFUSED) {
		t.Errorf("told %v, want connection refused", got.err)
	}
	end(false)
	if b.out.n != 0 || len(b.out.byFlow) != 0 || len(told) != 0 {
		t.Error("it is still counted, or told twice")
	}
	return true
}

func TestHandshakeUnreachable(t *testing.T) {
	for _, f := range clients {
		for code, want := range map[uint8]error{0: syscall.ENETUNREACH, f.portUnreachables: syscall.ECONNREFUSED, 13: syscall.EHOSTUNREACH} {
			k := new(fakeKernel)
			b := startKernel(t, k)
			end, told, err := shake(t, b, k, f.client, f.guest)
			if err != nil {
				t.Fatal(err)
			}
			pkt, _ := b.receive()
			b.send(noOffload, quoting(f.guest.Addr().Next(), f.icmp, f.unreach, code, 0, slices.Clone(pkt)))
			if got := next(t, told); !errors.Is(got.err, want) {
				t.Errorf("%s, code %d: %v, want %v", f.name, code, got.err, want)
			}
			end(false)
		}
	}
}

// The SYN is repeated, and an answer that is too late gets a RST.
func TestHandshakeLate(t *testing.T) {
	f := clients[0]
	k := new(fakeKernel)
	b := startKernel(t, k)
	begin := time.Now()
	end, told, err := shake(t, b, k, f.client, f.guest)
	if err != nil {
		t.Fatal(err)
	}
	first, second := segmentOf(t, b), segmentOf(t, b)
	if d := time.Since(begin); d < firstRetry || first.SequenceNumber() != second.SequenceNumber() || second.Flags() != header.TCPFlagSyn {
		t.Errorf("after %v came % x", d, second.TCP)
	}
	end(false)
	b.send(noOffload, synACK(first, nil))
	if rst := answerOf(t, b); rst.Flags()&header.TCPFlagRst == 0 {
		t.Errorf("a late answer gets % x", rst.TCP)
	}
	if len(told) != 0 {
		t.Errorf("told %v after the end", next(t, told))
	}
}

// The four numbers are one's at a time.
func TestHandshakeInUse(t *testing.T) {
	f := clients[0]
	tuple := flow.Tuple{Proto: flow.TCP, Guest: f.guest, Target: f.client}
	t.Run("by_handshake", func(t *testing.T) {
		k := new(fakeKernel)
		b := startKernel(t, k)
		end, _, err := shake(t, b, k, f.client, f.guest)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := shake(t, b, k, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("twice: %v", err)
		}
		if _, err := dialGuestFrom(t, b, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("a dial: %v", err)
		}
		other, _, err := shake(t, b, k, f.client, netip.AddrPortFrom(f.guest.Addr(), 1))
		if err != nil {
			t.Errorf("another port: %v", err)
		}
		other(false)
		end(false)
		if end, _, err = shake(t, b, k, f.client, f.guest); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		end(false)
	})
	t.Run("by_dial", func(t *testing.T) {
		k := new(fakeKernel)
		b := startKernel(t, k)
		serveGuest(t, guestStack(b), f.guest)
		c, err := dialGuestFrom(t, b, f.client, f.guest)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, _, err := shake(t, b, k, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%v", err)
		}
	})
	t.Run("by_dial_that_has_begun", func(t *testing.T) { // gVisor does not know it yet
		k := new(fakeKernel)
		b := startKernel(t, k)
		p := &pendingDial{from: f.client, to: f.guest}
		if err := b.enterDial(p); err != nil {
			t.Fatal(err)
		}
		defer b.flows.Done()
		if _, _, err := shake(t, b, k, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%v", err)
		}
		b.out.end(p)
		end, _, err := shake(t, b, k, f.client, f.guest)
		if err != nil {
			t.Fatalf("afterwards: %v", err)
		}
		end(false)
	})
	t.Run("by_guest", func(t *testing.T) {
		k := &fakeKernel{decide: func(flow.Tuple) (flow.Verdict, bool) { return flow.Verdict{}, false }}
		b := startKernel(t, k)
		b.send(noOffload, syn(f.guest, f.client))
		waitFor(t, "the SYN is held", func() bool { return b.dials.holds(tuple) })
		if _, _, err := shake(t, b, k, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%v", err)
		}
	})
	t.Run("by_socket", func(t *testing.T) {
		k := &fakeKernel{live: func(u flow.Tuple) bool { return u == tuple }}
		b := startKernel(t, k)
		if _, _, err := shake(t, b, k, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%v", err)
		}
		if _, err := dialGuestFrom(t, b, f.client, f.guest); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("a dial: %v", err)
		}
		if b.out.n != 0 || len(b.out.byFlow) != 0 {
			t.Error("it is still counted")
		}
	})
}

// A SYN-ACK of a connection that a socket has gone on with gets the last ACK again; other
// segments are given back.
func TestHandshakeGoneOn(t *testing.T) {
	f := clients[0]
	asked := make(chan flow.Tuple, 10)
	k := &fakeKernel{live: func(t flow.Tuple) bool { asked <- t; return true }}
	b := startKernel(t, k)
	syn := written{src: f.client, dst: f.guest, TCP: make(header.TCP, header.TCPMinimumSize)}
	syn.SetSequenceNumber(41)
	for _, options := range [][]byte{nil, linuxOptions} {
		b.send(noOffload, synACK(syn, nil, options...))
		next(t, asked)
		ack := segmentOf(t, b)
		o, window := header.ParseTCPOptions(ack.Options()), uint16(65535)
		if options != nil {
			window >>= handScale
		}
		if ack.src != f.client || ack.dst != f.guest || ack.Flags() != header.TCPFlagAck || ack.SequenceNumber() != 42 || ack.AckNumber() != 7001 ||
			ack.WindowSize() != window || o.TS != (options != nil) || o.TSVal != 0 || o.TS && o.TSEcr != 0x01020304 {
			t.Errorf("a SYN-ACK gets % x", ack.TCP)
		}
	}
	b.send(noOffload, synACK(syn, func(f *header.TCPFields) { f.DataOffset = 16 }))
	b.send(noOffload, udpPacket(f.guest, f.client, nil))
	next(t, b.fwd.datagrams) // the segment has been seen to
	if n := b.stats.givenBack.Load(); n != 0 || b.stats.malformed.Load() != 1 {
		t.Errorf("%d were given back", n)
	}
	b.send(noOffload, segment(f.guest, f.client, header.TCPFields{SeqNum: 2, AckNum: 2, Flags: header.TCPFlagAck}))
	if back := segmentOf(t, b); back.src != f.guest || back.SequenceNumber() != 2 {
		t.Errorf("% x was given back", back.TCP)
	}
}

func TestHandshakeLimit(t *testing.T) {
	k := &fakeKernel{open: make(map[flow.Tuple]func(flow.Verdict))}
	b := start(t, 1500, func(c *Config) { c.Poll, c.Kernel, c.MaxDials = k.poll, k, 2 })
	f := clients[0]
	for i := range 3 {
		end, _, err := shake(t, b, k, netip.AddrPortFrom(target4, uint16(1000+i)), f.guest)
		if i < 2 && err != nil || i == 2 && !errors.Is(err, syscall.EAGAIN) {
			t.Errorf("handshake %d: %v", i, err)
		}
		if err == nil {
			defer end(false)
		}
	}
	for _, from := range []string{"0.0.0.0:1", "127.0.0.1:1", "224.0.0.1:1", "[2001:db8::1]:1", "198.51.100.7:0"} {
		if _, _, err := shake(t, b, k, netip.MustParseAddrPort(from), f.guest); !errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Errorf("from %s: %v, want address not available", from, err)
		}
	}
	b.dials.close()
	if _, _, err := shake(t, b, k, f.client, f.guest); !errors.Is(err, syscall.ENETDOWN) {
		t.Errorf("after the end: %v, want network is down", err)
	}
}

// FuzzHandshake answers a SYN with any segment: a handshake that comes of it has numbers
// that a kernel takes.
func FuzzHandshake(f *testing.F) {
	f.Add(uint8(header.TCPFlagSyn|header.TCPFlagAck), uint8(40), linuxOptions)
	f.Add(uint8(header.TCPFlagRst|header.TCPFlagAck), uint8(20), []byte{})
	f.Fuzz(func(t *testing.T, flags, offset uint8, options []byte) {
		s := &Stack{cfg: Config{MaxDials: 10}}
		k := &handshake{s: s, isn: 41, timer: time.NewTimer(time.Hour)}
		k.then = func(h flow.Handshake, err error) {
			if err == nil && (h.GuestScale > 14 || h.GuestMSS < header.TCPMinimumSendMSS || h.Next != 42 || h.Clock&1 != 0) {
				t.Errorf("%+v", h)
			}
		}
		b := header.TCP(append(make([]byte, header.TCPMinimumSize), options...))
		b.Encode(&header.TCPFields{AckNum: 42, Flags: header.TCPFlags(flags) | header.TCPFlagAck, DataOffset: offset})
		k.take(b)
	})
}
