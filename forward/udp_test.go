package forward

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

func datagram(guest, target netip.AddrPort, payload string) flow.Datagram {
	return flow.Datagram{Guest: guest, Target: target, Payload: []byte(payload), Hops: 63, DontFragment: true}
}

func TestUDPMappingIsEndpointIndependent(t *testing.T) {
	u, f, g := fakeMaps(t, testPolicyConfig(), 0)
	u.Datagram(datagram(guest1, peerA, "one"))
	u.Datagram(datagram(guest1, peerB, "two"))
	u.Datagram(datagram(guest1, peerB, "three"))
	if f.opened != 1 || len(f.sent) != 3 || f.sent[1].to != peerB {
		t.Fatalf("%d sockets, sent %v; want one socket for three datagrams", f.opened, f.sent)
	}
	m := f.mappings[0]
	tests := []struct {
		name string
		from netip.AddrPort
		pass bool
	}{
		{"peer", peerA, true},
		{"other_peer", peerB, true},
		{"other_port_of_a_peer", netip.AddrPortFrom(peerA.Addr(), 9), true},
		{"stranger", ap("198.51.100.8:4000"), false},
	}
	filtered := uint64(0)
	for _, tt := range tests {
		m.fromHost(tt.from, []byte("hi"), 0, 50, 7)
		if !tt.pass {
			filtered++
			continue
		}
		d := take(t, g, &g.datagrams)
		want := flow.Datagram{Guest: guest1, Target: tt.from, Payload: []byte("hi"), Hops: 49, TOS: 7}
		if fmt.Sprint(d) != fmt.Sprint(want) {
			t.Errorf("%s: guest got %+v, want %+v", tt.name, d, want)
		}
	}
	if n, _, _ := g.lengths(); n != 0 || u.stats().Filtered != filtered {
		t.Errorf("%d datagrams too many, %d filtered, want %d", n, u.stats().Filtered, filtered)
	}
	if got := m.flow.ToHost.Packets.Load(); got != 3 {
		t.Errorf("flow counts %d packets to the host, want 3", got)
	}
}

func TestUDPGuestsAndFamiliesHaveTheirOwnSockets(t *testing.T) {
	u, f, _ := fakeMaps(t, testPolicyConfig(), 0)
	for _, g := range []netip.AddrPort{guest1, guest2, ap("192.168.65.3:40001")} {
		u.Datagram(datagram(g, peerA, "x"))
	}
	u.Datagram(datagram(guest6, ap("[2001:db8::1]:53"), "x"))
	if f.opened != 4 || u.stats().Mappings != 4 {
		t.Errorf("%d sockets and %d mappings, want 4", f.opened, u.stats().Mappings)
	}
}

func TestUDPDeniedTargets(t *testing.T) {
	tests := []struct {
		target string
		want   flow.ICMP // zero: silence
		from   netip.Addr
	}{
		{"127.0.0.1:53", flow.ICMP{Type: 3, Code: 13}, netip.Addr{}},
		{"[::1]:53", flow.ICMP{Type: 1, Code: 1}, netip.Addr{}},
		{"192.168.65.2:53", portUnreachable4, netip.MustParseAddr("192.168.65.2")},
		{"[fdc4:f303:9324::2]:53", portUnreachable6, netip.MustParseAddr("fdc4:f303:9324::2")},
		{"239.1.2.3:53", flow.ICMP{}, netip.Addr{}},
	}
	u, f, g := fakeMaps(t, testPolicyConfig(), 0)
	for _, tt := range tests {
		u.Datagram(datagram(guest1, ap(tt.target), "hello"))
		if _, _, n := g.lengths(); n == 0 {
			if tt.want != (flow.ICMP{}) {
				t.Errorf("%s: silence, want %v", tt.target, tt.want)
			}
			continue
		}
		e := take(t, g, &g.errors)
		if e.ICMP != tt.want || e.From != tt.from || e.Target != ap(tt.target) || string(e.Quote) != "hello" {
			t.Errorf("%s: %+v, want %v from %v", tt.target, e, tt.want, tt.from)
		}
	}
	if f.opened != 0 || u.stats().Denied != uint64(len(tests)) {
		t.Errorf("%d sockets, %d denied; want none and %d", f.opened, u.stats().Denied, len(tests))
	}
}

func TestUDPOwnErrorsAreRateLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, _, g := fakeMaps(t, testPolicyConfig(), 0)
		const n = errorBurst * 3
		for range n {
			u.Datagram(datagram(guest1, ap("127.0.0.1:53"), "x"))
		}
		if _, _, got := g.lengths(); got != errorBurst || u.stats().ErrorsLimited != n-errorBurst {
			t.Errorf("%d errors and %d limited, want %d and %d", got, u.stats().ErrorsLimited, errorBurst, n-errorBurst)
		}
	})
}

func TestUDPSendErrors(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want flow.ICMP
		mtu  uint32
		stat func(UDPStats) uint64
	}{
		{"full", errSocketFull, flow.ICMP{}, 0, func(s UDPStats) uint64 { return s.Full }},
		{"too_big", &tooBigError{1400}, fragNeeded4, 1400, func(s UDPStats) uint64 { return s.TooBig }},
		{"no_route", syscall.ENETUNREACH, flow.ICMP{Type: 3, Code: 0}, 0, func(s UDPStats) uint64 { return s.Failed }},
		{"no_neighbour", syscall.EHOSTUNREACH, flow.ICMP{Type: 3, Code: 1}, 0, func(s UDPStats) uint64 { return s.Failed }},
		{"prohibited", syscall.EACCES, flow.ICMP{Type: 3, Code: 13}, 0, func(s UDPStats) uint64 { return s.Failed }},
		{"unknown", syscall.EINVAL, flow.ICMP{}, 0, func(s UDPStats) uint64 { return s.Failed }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, f, g := fakeMaps(t, testPolicyConfig(), 0)
			f.sendErr = tt.err
			for range 2 {
				u.Datagram(datagram(guest1, peerA, "x"))
			}
			if got := tt.stat(u.stats()); got != 2 {
				t.Errorf("counted %d times, want 2: %+v", got, u.stats())
			}
			_, _, n := g.lengths()
			if tt.want == (flow.ICMP{}) {
				if n != 0 {
					t.Errorf("guest got %+v, want silence", g.errors)
				}
			} else if e := take(t, g, &g.errors); e.ICMP != tt.want || e.MTU != tt.mtu || e.From.IsValid() {
				t.Errorf("guest got %+v, want %v mtu %d from the gateway", e, tt.want, tt.mtu)
			}
			f.sendErr = nil
			u.Datagram(datagram(guest1, peerA, "good"))
			if f.opened != 1 || string(f.sent[len(f.sent)-1].d.Payload) != "good" {
				t.Error("the mapping did not survive")
			}
		})
	}
}

func TestUDPTrainsAreBounded(t *testing.T) {
	u, f, _ := fakeMaps(t, testPolicyConfig(), 0)
	d := flow.Datagram{Guest: guest1, Target: peerA, Payload: make([]byte, udpMaxSegments*10), Segment: 10}
	u.Datagram(d)
	d.Payload = make([]byte, udpMaxSegments*10+1)
	u.Datagram(d)
	if len(f.sent) != 1 || u.stats().Malformed != 1 {
		t.Errorf("%d sent and %d malformed, want 1 and 1", len(f.sent), u.stats().Malformed)
	}
	if n := f.mappings[0].flow.ToHost.Packets.Load(); n != udpMaxSegments {
		t.Errorf("flow counts %d packets, want %d", n, udpMaxSegments)
	}
}

func TestUDPHostErrors(t *testing.T) {
	router := netip.MustParseAddr("198.51.100.1")
	tests := []struct {
		name string
		in   hostError
		want flow.Error // zero: dropped
	}{
		{
			"refused", hostError{ICMP: portUnreachable4, from: peerA.Addr(), to: peerA, quote: []byte("q")},
			flow.Error{ICMP: portUnreachable4, From: peerA.Addr(), Quote: []byte("q")},
		},
		{
			"time_exceeded", hostError{ICMP: flow.ICMP{Type: 11}, from: router, to: peerA},
			flow.Error{ICMP: flow.ICMP{Type: 11}, From: router},
		},
		{
			"too_big", hostError{ICMP: fragNeeded4, from: router, to: peerA, mtu: 1400},
			flow.Error{ICMP: fragNeeded4, From: router, MTU: 1400},
		},
		{"stranger", hostError{ICMP: portUnreachable4, from: peerB.Addr(), to: peerB}, flow.Error{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, f, g := fakeMaps(t, testPolicyConfig(), 0)
			u.Datagram(datagram(guest1, peerA, "x"))
			f.mappings[0].hostError(tt.in)
			if tt.want.ICMP == (flow.ICMP{}) {
				if _, _, n := g.lengths(); n != 0 || u.stats().ErrorsUnknown != 1 {
					t.Errorf("%d errors and %d unknown, want 0 and 1", n, u.stats().ErrorsUnknown)
				}
				return
			}
			tt.want.Tuple = flow.Tuple{Proto: flow.UDP, Guest: guest1, Target: peerA}
			if e := take(t, g, &g.errors); fmt.Sprintf("%+v", e) != fmt.Sprintf("%+v", tt.want) {
				t.Errorf("guest got %+v, want %+v", e, tt.want)
			}
		})
	}
}

// hostPolicy allows the guest all of the host's loopback.
func hostPolicy() PolicyConfig {
	cfg := testPolicyConfig()
	cfg.HostAccess.All = true
	return cfg
}

func TestUDPHostAddress(t *testing.T) {
	for _, guest := range []netip.AddrPort{guest1, guest6} {
		t.Run(guest.Addr().String(), func(t *testing.T) {
			u, f, g := fakeMaps(t, hostPolicy(), 0)
			alias, refusal := ap("192.168.65.2:5353"), [2]flow.ICMP{portUnreachable4, portUnreachable6}
			dials := [2]netip.AddrPort{ap("127.0.0.1:5353"), ap("[::1]:5353")}
			if guest.Addr().Is6() {
				alias = ap("[fdc4:f303:9324::2]:5353")
				dials[0], dials[1] = dials[1], dials[0]
				refusal[0], refusal[1] = refusal[1], refusal[0]
			}
			last := func() sentDatagram { return f.sent[len(f.sent)-1] }

			u.Datagram(datagram(guest, alias, "first"))
			if s := last(); s.to != dials[0] {
				t.Fatalf("sent to %v, want %v", s.to, dials[0])
			}
			// Refused there: the same datagram goes to the other family.
			last().m.hostError(hostError{ICMP: refusal[0], from: dials[0].Addr(), to: dials[0], quote: []byte("first")})
			if s := last(); s.to != dials[1] || string(s.d.Payload) != "first" || len(f.sent) != 2 {
				t.Fatalf("after a refusal sent %q to %v, want the same to %v", s.d.Payload, s.to, dials[1])
			}
			u.Datagram(datagram(guest, alias, "second"))
			if s := last(); s.to != dials[1] || len(f.sent) != 3 {
				t.Fatalf("the next went to %v, want %v", s.to, dials[1])
			}
			// The answer comes from the host address.
			last().m.fromHost(dials[1], []byte("answer"), 0, 64, 0)
			if d := take(t, g, &g.datagrams); d.Guest != guest || d.Target != alias {
				t.Errorf("answer from %v to %v, want from %v to %v", d.Target, d.Guest, alias, guest)
			}
			// Refused by both: the guest hears of it, in its own family.
			last().m.hostError(hostError{ICMP: refusal[1], from: dials[1].Addr(), to: dials[1], quote: []byte("second")})
			if e := take(t, g, &g.errors); e.ICMP != refusal[0] || e.From != alias.Addr() || e.Target != alias {
				t.Errorf("guest got %+v, want %v from %v", e, refusal[0], alias)
			}
			u.Datagram(datagram(guest, alias, "third"))
			if s := last(); s.to != dials[0] {
				t.Errorf("after both refused sent to %v, want %v", s.to, dials[0])
			}
		})
	}
}

func TestUDPHostAddressLongQuoteIsNotResent(t *testing.T) {
	u, f, g := fakeMaps(t, hostPolicy(), 0)
	alias, lo4, lo6 := ap("192.168.65.2:53"), ap("127.0.0.1:53"), ap("[::1]:53")
	u.Datagram(datagram(guest1, alias, "x"))
	f.sent[0].m.hostError(hostError{ICMP: portUnreachable4, from: lo4.Addr(), to: lo4, quote: bytes.Repeat([]byte("q"), quoteAll+1)})
	if _, _, n := g.lengths(); len(f.sent) != 1 || n != 0 {
		t.Fatalf("%d sent and %d errors, want the first only and none", len(f.sent), n)
	}
	u.Datagram(datagram(guest1, alias, "y"))
	if f.sent[1].to != lo6 {
		t.Errorf("the next went to %v, want %v", f.sent[1].to, lo6)
	}
}

func TestUDPHostWithoutIPv6(t *testing.T) {
	u, f, _ := fakeMaps(t, hostPolicy(), 0)
	fail := true
	f.openErr = func() error {
		if fail {
			fail = false
			return syscall.EAFNOSUPPORT
		}
		return nil
	}
	u.Datagram(datagram(guest6, ap("[fdc4:f303:9324::2]:53"), "x"))
	if len(f.sent) != 1 || f.sent[0].to != ap("127.0.0.1:53") {
		t.Errorf("sent %v, want one to 127.0.0.1", f.sent)
	}
}

func TestUDPNoSocket(t *testing.T) {
	u, f, g := fakeMaps(t, testPolicyConfig(), 0)
	f.openErr = func() error { return syscall.EAFNOSUPPORT }
	u.Datagram(datagram(guest6, ap("[2001:db8::1]:53"), "x"))
	if e := take(t, g, &g.errors); e.ICMP != (flow.ICMP{Type: 1, Code: 0}) {
		t.Errorf("guest got %+v, want no route", e)
	}
	f.openErr = nil
	u.Datagram(datagram(guest1, peerA, "x"))
	// Out of descriptors: the oldest that was never answered gives way, once.
	calls := 0
	f.openErr = func() error {
		if calls++; calls == 1 {
			return syscall.EMFILE
		}
		return nil
	}
	u.Datagram(datagram(guest2, peerA, "x"))
	if s := u.stats(); s.Mappings != 1 || s.Evicted != 1 || s.NoSocket != 1 {
		t.Errorf("%+v, want one mapping, one evicted, one without socket", s)
	}
	f.openErr = func() error { return errors.Join(syscall.EMFILE) }
	u.Datagram(datagram(guest1, peerA, "x"))
	if s := u.stats(); s.NoSocket != 2 {
		t.Errorf("%+v, want two without socket", s)
	}
}

func TestUDPTimeouts(t *testing.T) {
	tests := []struct {
		name    string
		targets []netip.AddrPort
		answer  bool
		idle    time.Duration
	}{
		{"unanswered", []netip.AddrPort{peerA}, false, udpUnansweredIdle},
		{"answered", []netip.AddrPort{peerA}, true, udpAnsweredIdle},
		{"dns", []netip.AddrPort{ap("198.51.100.7:53"), ap("203.0.113.8:53")}, true, udpDNSIdle},
		{"dns_and_more", []netip.AddrPort{ap("198.51.100.7:53"), peerB}, false, udpUnansweredIdle},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u, f, _ := fakeMaps(t, testPolicyConfig(), 0)
				touch := func() {
					for _, target := range tt.targets {
						u.Datagram(datagram(guest1, target, "x"))
					}
					if tt.answer {
						f.mappings[0].fromHost(tt.targets[0], []byte("y"), 0, 64, 0)
					}
				}
				touch()
				time.Sleep(tt.idle - time.Second)
				touch() // and all over again
				time.Sleep(tt.idle - time.Second)
				synctest.Wait()
				if f.closed.Load() != 0 || f.opened != 1 {
					t.Fatalf("ended %v after the last datagram", tt.idle-time.Second)
				}
				time.Sleep(time.Second + udpSweep)
				synctest.Wait()
				if s := u.stats(); f.closed.Load() != 1 || s.Mappings != 0 || s.Expired != 1 {
					t.Errorf("%v after the last datagram: %+v, want it expired", tt.idle+udpSweep, s)
				}
			})
		})
	}
}

func TestUDPAfterClose(t *testing.T) {
	u, f, g := fakeMaps(t, testPolicyConfig(), 0)
	u.Datagram(datagram(guest1, peerA, "x"))
	u.close()
	u.close()
	u.Datagram(datagram(guest1, peerA, "x"))
	u.Datagram(datagram(guest2, peerA, "x"))
	f.mappings[0].fromHost(peerA, []byte("late"), 0, 64, 0)
	if n, _, _ := g.lengths(); f.opened != 1 || n != 0 {
		t.Errorf("%d sockets and %d datagrams after close", f.opened, n)
	}
}
