package forward

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
)

// fakePings are sockets that record what is sent.
type fakePings struct {
	opened           int
	closed           atomic.Int32 // by the sweeper, too
	pings            []*ping
	sent             []flow.Echo
	to               []netip.Addr
	openErr, sendErr error
}

type fakePingSocket struct{ all *fakePings }

func (f *fakePings) open(p *ping) (pingSocket, error) {
	if f.openErr != nil {
		return nil, f.openErr
	}
	f.opened++
	f.pings = append(f.pings, p)
	return fakePingSocket{f}, nil
}
func (f *fakePings) mode() PingMode { return PingMode{Mode: PingSocket} }
func (f *fakePings) close()         {}

func (s fakePingSocket) send(e flow.Echo, to netip.Addr) error {
	e.Payload = slices.Clone(e.Payload)
	s.all.sent, s.all.to = append(s.all.sent, e), append(s.all.to, to)
	return s.all.sendErr
}
func (s fakePingSocket) close() { s.all.closed.Add(1) }

func fakeEchoes(t *testing.T, policy PolicyConfig, limit int) (*pings, *fakePings, *fakeGuest) {
	t.Helper()
	f, g := new(fakePings), newFakeGuest()
	p := newPings(pingConfig{
		Guest: g, Table: table.New(), Policy: NewPolicy(policy), Log: slog.New(slog.DiscardHandler), max: limit, sockets: f,
	})
	t.Cleanup(func() {
		p.close()
		p.close()
		if f.opened != int(f.closed.Load()) || len(p.guests) != 0 || len(p.live) != 0 {
			t.Errorf("%d sockets opened, %d closed; %d guests and %d pings left", f.opened, f.closed.Load(), len(p.guests), len(p.live))
		}
	})
	return p, f, g
}

func echo(guest, target netip.Addr, id, seq uint16) flow.Echo {
	return flow.Echo{Guest: guest, Target: target, ID: id, Seq: seq, Payload: []byte("ping"), Hops: 63}
}

func TestPing(t *testing.T) {
	p, f, g := fakeEchoes(t, testPolicyConfig(), 0)
	p.Echo(echo(guest1.Addr(), peerA.Addr(), 7, 1))
	p.Echo(echo(guest1.Addr(), peerA.Addr(), 7, 2))
	if f.opened != 1 || len(f.sent) != 2 || f.sent[1].Seq != 2 || f.to[1] != peerA.Addr() {
		t.Fatalf("%d sockets, sent %+v; want one socket for two requests", f.opened, f.sent)
	}
	one := f.pings[0]
	one.fromHost(peerB.Addr(), 1, []byte("forged"), 64, 0)
	one.fromHost(peerA.Addr(), 2, []byte("pong"), 60, 4)
	want := flow.Echo{Guest: guest1.Addr(), Target: peerA.Addr(), ID: 7, Seq: 2, Payload: []byte("pong"), Hops: 59, TOS: 4}
	if e := take(t, g, &g.echoes); fmt.Sprint(e) != fmt.Sprint(want) {
		t.Errorf("guest got %+v, want %+v", e, want)
	}
	if _, n, _ := g.lengths(); n != 0 || p.stats().Filtered != 1 {
		t.Errorf("%d replies too many, %d filtered, want 1", n, p.stats().Filtered)
	}
	router := netip.MustParseAddr("198.51.100.1")
	one.hostError(flow.ICMP{Type: 11}, router, 0, 2, []byte("ping"))
	e := take(t, g, &g.errors)
	if e.ICMP != (flow.ICMP{Type: 11}) || e.From != router || e.Guest.Port() != 7 || e.Target.Port() != 2 || e.Proto != flow.Ping {
		t.Errorf("guest got %+v about %v, want time exceeded about 7, 2", e.ICMP, e.Tuple)
	}
	p.Echo(echo(guest1.Addr(), peerB.Addr(), 7, 1))
	p.Echo(echo(guest1.Addr(), peerA.Addr(), 8, 1))
	p.Echo(echo(guest2.Addr(), peerA.Addr(), 7, 1))
	if f.opened != 4 || p.stats().Pings != 4 {
		t.Errorf("%d sockets, want one for each guest, target and identifier", f.opened)
	}
}

func TestPingAnswers(t *testing.T) {
	prohibited4, prohibited6 := flow.ICMP{Type: 3, Code: 13}, flow.ICMP{Type: 1, Code: 1}
	tests := []struct {
		name             string
		target           string
		openErr, sendErr error
		want             flow.ICMP // zero: silence
		mtu              uint32
		stat             func(PingStats) uint64
	}{
		{"loopback", "127.0.0.1", nil, nil, prohibited4, 0, func(s PingStats) uint64 { return s.Denied }},
		{"host", "192.168.65.2", nil, nil, prohibited4, 0, func(s PingStats) uint64 { return s.Denied }},
		{"host6", "fdc4:f303:9324::2", nil, nil, prohibited6, 0, func(s PingStats) uint64 { return s.Denied }},
		{"multicast", "224.0.0.1", nil, nil, flow.ICMP{}, 0, func(s PingStats) uint64 { return s.Denied }},
		{"unavailable", "198.51.100.7", errPingUnavailable, nil, prohibited4, 0, func(s PingStats) uint64 { return s.Unavailable }},
		{"unavailable6", "2001:db8::1", errPingUnavailable, nil, prohibited6, 0, func(s PingStats) uint64 { return s.Unavailable }},
		{"no_socket", "198.51.100.7", fmt.Errorf("%w: %w", errNoSocket, syscall.EMFILE), nil, flow.ICMP{}, 0, func(s PingStats) uint64 { return s.NoSocket }},
		{"no_ipv6", "2001:db8::1", fmt.Errorf("%w: %w", errNoSocket, syscall.EAFNOSUPPORT), nil, flow.ICMP{Type: 1}, 0, func(s PingStats) uint64 { return s.NoSocket }},
		{"full", "198.51.100.7", nil, errSocketFull, flow.ICMP{}, 0, func(s PingStats) uint64 { return s.Full }},
		{"too_big", "198.51.100.7", nil, &tooBigError{1300}, fragNeeded4, 1300, func(s PingStats) uint64 { return s.TooBig }},
		{"no_route", "198.51.100.7", nil, syscall.ENETUNREACH, flow.ICMP{Type: 3}, 0, func(s PingStats) uint64 { return s.Failed }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, f, g := fakeEchoes(t, testPolicyConfig(), 0)
			f.openErr, f.sendErr = tt.openErr, tt.sendErr
			target := netip.MustParseAddr(tt.target)
			p.Echo(echo(guest1.Addr(), target, 7, 9))
			if n := tt.stat(p.stats()); n != 1 {
				t.Errorf("counted %d times, want 1: %+v", n, p.stats())
			}
			if tt.want == (flow.ICMP{}) {
				if _, _, n := g.lengths(); n != 0 {
					t.Errorf("guest got %+v, want silence", g.errors)
				}
				return
			}
			if e := take(t, g, &g.errors); e.ICMP != tt.want || e.MTU != tt.mtu || e.From.IsValid() || e.Target.Port() != 9 || e.Guest.Port() != 7 {
				t.Errorf("guest got %+v from %v, mtu %d; want %+v, mtu %d", e.ICMP, e.From, e.MTU, tt.want, tt.mtu)
			}
		})
	}
}

func TestPingOfTheHost(t *testing.T) {
	p, f, g := fakeEchoes(t, hostPolicy(), 0)
	p.Echo(echo(guest1.Addr(), alias4, 7, 1))
	p.Echo(echo(guest6.Addr(), alias6, 7, 1))
	if len(f.to) != 2 || f.to[0] != loopback4 || f.to[1] != loopback6 {
		t.Fatalf("sent to %v, want both loopbacks", f.to)
	}
	f.pings[0].fromHost(loopback4, 1, nil, 64, 0)
	if e := take(t, g, &g.echoes); e.Target != alias4 {
		t.Errorf("reply from %v, want %v", e.Target, alias4)
	}
	f.pings[0].hostError(flow.ICMP{Type: 3, Code: 1}, loopback4, 0, 1, nil)
	if e := take(t, g, &g.errors); e.From != alias4 {
		t.Errorf("error from %v, want %v", e.From, alias4)
	}
}

func TestPingEndsWhenIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, f, _ := fakeEchoes(t, testPolicyConfig(), 0)
		p.Echo(echo(guest1.Addr(), peerA.Addr(), 7, 1))
		time.Sleep(pingIdle - time.Second)
		p.Echo(echo(guest1.Addr(), peerA.Addr(), 7, 2))
		time.Sleep(pingIdle - time.Second)
		synctest.Wait()
		if p.stats().Pings != 1 || f.opened != 1 {
			t.Fatal("ended too early")
		}
		time.Sleep(time.Second + pingSweep)
		synctest.Wait()
		if s := p.stats(); s.Pings != 0 || s.Expired != 1 || f.closed.Load() != 1 {
			t.Errorf("%+v, want it expired", s)
		}
	})
}

func TestPingLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // so that each is older than the next
		p, f, _ := fakeEchoes(t, testPolicyConfig(), 9)
		send := func(guest netip.Addr, id int) {
			p.Echo(echo(guest, peerA.Addr(), uint16(id), 1))
			time.Sleep(time.Millisecond)
		}
		alive := func(guest netip.Addr, id int) bool {
			return p.live[pingKey{guest, peerA.Addr(), uint16(id)}] != nil
		}
		small, big := guest2.Addr(), guest1.Addr()
		send(small, 0)
		send(small, 1)
		for id := range 6 {
			send(big, id)
		}
		f.pings[2].fromHost(peerA.Addr(), 1, nil, 64, 0) // big's first was answered
		send(big, 6)
		if s := p.stats(); s.Pings != 8 || s.Evicted != 1 || alive(big, 1) || !alive(big, 0) {
			t.Errorf("%+v, want 6 of 9 for one guest, the oldest unanswered evicted", s)
		}
		send(small, 2)
		send(small, 3)
		if s := p.stats(); s.Pings != 9 || !alive(small, 0) || alive(big, 2) {
			t.Errorf("%+v, want the guest with the most to give way", s)
		}
	})
}

func TestPingAfterClose(t *testing.T) {
	p, f, g := fakeEchoes(t, testPolicyConfig(), 0)
	p.Echo(echo(guest1.Addr(), peerA.Addr(), 7, 1))
	p.close()
	p.Echo(echo(guest1.Addr(), peerA.Addr(), 7, 2))
	p.Echo(echo(guest1.Addr(), peerB.Addr(), 7, 2))
	if _, _, n := g.lengths(); f.opened != 1 || len(f.sent) != 1 || n != 0 {
		t.Errorf("%d sockets, %d sent, %d errors after close; want 1, 1, 0", f.opened, len(f.sent), n)
	}
}
