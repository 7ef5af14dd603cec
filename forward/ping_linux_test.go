package forward

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"sync"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
)

// hostPings returns pings on the host's own sockets, with access to its loopback.
func hostPings(t *testing.T, guest flow.Guest) *pings {
	t.Helper()
	before := countFDs(t)
	p := newPings(pingConfig{Guest: guest, Table: table.New(), Policy: NewPolicy(hostPolicy()), Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() {
		p.close()
		wantFDs(t, before)
	})
	return p
}

// bothModes runs f in the topology with raw sockets, and with ping sockets.
func bothModes(t *testing.T, f func(t *testing.T)) {
	if !routed(t) {
		return
	}
	// The range is that of the child's own namespace. Nobody is in the first one, which
	// a fresh namespace has; it cannot be set where group 1 is not mapped.
	for _, m := range []struct{ mode, groups string }{{PingRaw, ""}, {PingSocket, "0 0"}} {
		t.Run(m.mode, func(t *testing.T) {
			if m.groups != "" {
				setSysctl(t, "net/ipv4/ping_group_range", m.groups)
			}
			p := hostPings(t, newFakeGuest())
			if got := p.mode(); got.Mode != m.mode {
				t.Fatalf("mode %+v, want %s", got, m.mode)
			}
			f(t)
		})
	}
}

func TestPingAcrossTheRouter(t *testing.T) {
	bothModes(t, func(t *testing.T) {
		for _, world := range []netip.Addr{world4, world6, alias4, alias6} {
			t.Run(world.String(), func(t *testing.T) {
				flushPathMTU(t) // the other mode has been here
				g := newFakeGuest()
				p := hostPings(t, g)
				guest := guestFor(world).Addr()
				hops := uint8(defaultHops - 2) // the router and we
				if world == alias4 || world == alias6 {
					hops = defaultHops - 1
				}
				for i, size := range []int{0, 1, 56, 1352, 9000, 65507} {
					if world.Is6() && size > 1352 && p.stats().ErrorsRelayed == 0 && world == world6 {
						// The host's kernel cuts it, but learns the MTU behind the router first.
						p.Echo(flow.Echo{Guest: guest, Target: world, ID: 77, Seq: 99, Payload: make([]byte, size), Hops: 63})
						take(t, g, &g.errors)
					}
					payload := bytes.Repeat([]byte{byte(i + 1)}, size)
					p.Echo(flow.Echo{Guest: guest, Target: world, ID: 77, Seq: uint16(i), Payload: payload, Hops: 63})
					e := take(t, g, &g.echoes)
					if e.Guest != guest || e.Target != world || e.ID != 77 || e.Seq != uint16(i) || !bytes.Equal(e.Payload, payload) || e.Hops != hops {
						t.Errorf("%d bytes: %d came back from %v, id %d, seq %d, hops %d; want hops %d", size, len(e.Payload), e.Target, e.ID, e.Seq, e.Hops, hops)
					}
				}
			})
		}
	})
}

func TestPingErrorsOnTheWay(t *testing.T) {
	bothModes(t, func(t *testing.T) {
		for _, c := range icmpCases {
			t.Run(c.name, func(t *testing.T) {
				if c.again || c.from != "" && c.mtu != 0 {
					flushPathMTU(t) // the other mode has been here
				}
				g := newFakeGuest()
				p := hostPings(t, g)
				target := netip.MustParseAddr(c.target)
				payload := bytes.Repeat([]byte("p"), c.size)
				e := flow.Echo{Guest: guestFor(target).Addr(), Target: target, ID: 7, Payload: payload, Hops: c.hops, DontFragment: true}
				if c.again {
					p.Echo(e)
					take(t, g, &g.errors)
				}
				e.Seq = 5
				p.Echo(e)
				got := take(t, g, &g.errors)
				c.check(t, got, payload)
				if got.Proto != flow.Ping || got.Guest != netip.AddrPortFrom(e.Guest, 7) || got.Target.Port() != 5 {
					t.Errorf("error is about %v, want identifier 7 and sequence number 5", got.Tuple)
				}
			})
		}
	})
}

// TestPingTraceroute has each probe answered by the hop it ends at.
func TestPingTraceroute(t *testing.T) {
	bothModes(t, func(t *testing.T) {
		for _, world := range []netip.Addr{world4, world6} {
			g := newFakeGuest()
			p := hostPings(t, g)
			near := nearRouter4
			if world.Is6() {
				near = nearRouter6
			}
			for seq := range uint16(4) {
				hops := uint8(1 + seq%2)
				p.Echo(flow.Echo{Guest: guestFor(world).Addr(), Target: world, ID: 9, Seq: seq, Hops: hops, Payload: []byte("probe")})
				if hops == 2 {
					if e := take(t, g, &g.echoes); e.Seq != seq {
						t.Errorf("reply to %d, want to %d", e.Seq, seq)
					}
				} else if e := take(t, g, &g.errors); e.From != near || e.Target.Port() != seq {
					t.Errorf("error about %v from %v, want sequence number %d from %v", e.Tuple, e.From, seq, near)
				}
			}
		}
	})
}

// TestPingsOfManyGuests sends from many guests at a time: each gets its own replies.
func TestPingsOfManyGuests(t *testing.T) {
	bothModes(t, func(t *testing.T) {
		g := newFakeGuest()
		p := hostPings(t, g)
		const guests, each = 20, 10
		addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 168, 65, byte(10 + i)}) }
		for seq := range uint16(each) { // a raw socket has not room for all the replies at once
			var senders sync.WaitGroup
			for i := range guests {
				senders.Go(func() {
					p.Echo(flow.Echo{Guest: addr(i), Target: world4, ID: 7, Seq: seq, Hops: 63, Payload: addr(i).AsSlice()})
				})
			}
			senders.Wait()
			for range guests {
				if e := take(t, g, &g.echoes); e.Seq != seq || !bytes.Equal(e.Payload, e.Guest.AsSlice()) {
					t.Errorf("%v got the reply of % x, number %d of %d", e.Guest, e.Payload, e.Seq, seq)
				}
			}
		}
	})
}

func TestPingModeUnavailable(t *testing.T) {
	h := &hostPingSockets{found: PingMode{Mode: PingUnavailable, Why: "no ping sockets: permission denied"}}
	h.once.Do(func() {})
	g := newFakeGuest()
	p := newPings(pingConfig{Guest: g, Table: table.New(), Policy: NewPolicy(hostPolicy()), Log: slog.New(slog.DiscardHandler), sockets: h})
	defer p.close()
	p.Echo(echo(guest1.Addr(), peerA.Addr(), 7, 1))
	if e := take(t, g, &g.errors); e.ICMP != (flow.ICMP{Type: 3, Code: 13}) {
		t.Errorf("guest got %+v, want administratively prohibited", e.ICMP)
	}
}

func TestIcmpOfIPv4(t *testing.T) {
	valid := func(change func(b []byte) []byte) []byte {
		b := make([]byte, 24+icmpHeaderLen+5)
		b[0] = 0x46 // with four bytes of options
		icmp := b[24:]
		copy(icmp[icmpHeaderLen:], "hello")
		binary.BigEndian.PutUint16(icmp[2:], ^sumOnes(icmp))
		return change(b)
	}
	tests := []struct {
		name string
		in   []byte
		ok   bool
	}{
		{"valid", valid(func(b []byte) []byte { return b }), true},
		{"bad_checksum", valid(func(b []byte) []byte { b[30]++; return b }), false},
		{"version_6", valid(func(b []byte) []byte { b[0] = 0x66; return b }), false},
		{"short_header", valid(func(b []byte) []byte { b[0] = 0x44; return b }), false},
		{"header_beyond_end", valid(func(b []byte) []byte { return b[:26] }), false},
		{"empty", nil, false},
	}
	for _, tt := range tests {
		got, err := icmpOfIPv4(tt.in)
		if (err == nil) != tt.ok || tt.ok && string(got[icmpHeaderLen:]) != "hello" {
			t.Errorf("%s: % x, %v; want ok = %v", tt.name, got, err, tt.ok)
		}
	}
}

// FuzzICMP holds the parsers to their input's length.
func FuzzICMP(f *testing.F) {
	f.Add([]byte{0x45, 19: 0, 20: echoReply4, 29: 'x'})
	f.Add([]byte{echoReply6, 0, 1, 2, 3, 4, 5, 6, 7})
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, ok := parseEcho(b); ok && len(m.payload) != len(b)-icmpHeaderLen {
			t.Errorf("parseEcho(% x): %d bytes of payload", b, len(m.payload))
		}
		if icmp, err := icmpOfIPv4(b); err == nil && (len(icmp) < icmpHeaderLen || sumOnes(icmp) != 0xffff) {
			t.Errorf("icmpOfIPv4(% x) = % x", b, icmp)
		}
	})
}
