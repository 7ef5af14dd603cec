package forward

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// nth returns the nth port of a guest address.
func nth(guest netip.AddrPort, n int) netip.AddrPort {
	return netip.AddrPortFrom(guest.Addr(), uint16(1000+n))
}

// has reports whether the mapping of a guest address and port lives.
func (u *udpMaps) has(guest netip.AddrPort) bool {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.live[udpKey{guest, false}] != nil
}

func TestUDPLimitOfOneGuest(t *testing.T) {
	u, f, _ := fakeMaps(t, testPolicyConfig(), 30)
	for n := range 21 {
		u.Datagram(datagram(nth(guest1, n), peerA, "x"))
	}
	if s := u.stats(); s.Mappings != 20 || s.Evicted != 1 || u.has(nth(guest1, 0)) {
		t.Fatalf("%+v, want 20 of 30 mappings for one guest, the oldest evicted", s)
	}
	for _, m := range f.mappings {
		m.fromHost(peerA, []byte("y"), 0, 64, 0)
	}
	u.Datagram(datagram(nth(guest1, 100), peerA, "x"))
	if s := u.stats(); s.Mappings != 20 || s.EvictedAnswered != 1 || !u.has(nth(guest1, 100)) {
		t.Errorf("%+v, want an answered one of its own evicted", s)
	}
	u.Datagram(datagram(guest2, peerA, "x"))
	if s := u.stats(); s.Mappings != 21 {
		t.Errorf("%+v, want room for another guest", s)
	}
}

func TestUDPLimitKeepsAnsweredOnesOfOthers(t *testing.T) {
	u, f, _ := fakeMaps(t, testPolicyConfig(), 30)
	for n := range 18 {
		u.Datagram(datagram(nth(guest1, n), peerA, "x"))
	}
	for _, m := range f.mappings {
		m.fromHost(peerA, []byte("y"), 0, 64, 0)
	}
	u.Datagram(datagram(nth(guest1, 99), peerA, "x")) // one that was not answered
	for n := range 100 {
		u.Datagram(datagram(nth(guest2, n), peerA, "x"))
	}
	for n := range 18 {
		if !u.has(nth(guest1, n)) {
			t.Errorf("answered mapping %d of the other guest is gone", n)
		}
	}
	if s := u.stats(); s.Mappings != 30 || s.EvictedAnswered != 0 || s.Refused != 0 {
		t.Errorf("%+v, want the limit and only unanswered ones evicted", s)
	}
	// Everything answered: a third guest has nothing to give up.
	for _, m := range f.mappings {
		m.fromHost(peerA, []byte("y"), 0, 64, 0)
	}
	u.Datagram(datagram(ap("192.168.65.5:1"), peerA, "x"))
	if s := u.stats(); s.Refused != 1 || s.Mappings != 30 {
		t.Errorf("%+v, want one refused", s)
	}
}

func TestUDPLimitEvictsTheBiggestGuestFirst(t *testing.T) {
	u, _, _ := fakeMaps(t, testPolicyConfig(), 30)
	u.Datagram(datagram(guest2, peerA, "oldest of all"))
	for n := range 20 {
		u.Datagram(datagram(nth(guest1, n), peerA, "x"))
	}
	for n := range 20 {
		u.Datagram(datagram(nth(ap("192.168.65.9:1"), n), peerA, "x"))
	}
	if !u.has(guest2) {
		t.Error("a flood by others pushed out the only mapping of a guest")
	}
}

func TestUDPEvictsTheQuietAnsweredOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, f, _ := fakeMaps(t, testPolicyConfig(), 6) // 4 for one guest
		for n := range 4 {
			u.Datagram(datagram(nth(guest1, n), peerA, "x"))
			f.mappings[n].fromHost(peerA, []byte("y"), 0, 64, 0)
		}
		time.Sleep(time.Second)
		for _, n := range []int{0, 1, 3} {
			u.Datagram(datagram(nth(guest1, n), peerA, "x"))
		}
		u.Datagram(datagram(nth(guest1, 9), peerA, "x"))
		if u.has(nth(guest1, 2)) {
			t.Error("the quiet one was kept")
		}
	})
}

func TestUDPPeersAreBounded(t *testing.T) {
	u, f, _ := fakeMaps(t, testPolicyConfig(), 0)
	addr := func(n int) netip.AddrPort {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], 0x0a000000+uint32(n))
		return netip.AddrPortFrom(netip.AddrFrom4(b), 1)
	}
	for n := range udpMaxPeers + 10 {
		u.Datagram(datagram(guest1, addr(n+1), "x"))
	}
	m := f.mappings[0]
	if n := len(m.peers); n != udpMaxPeers {
		t.Errorf("%d peers of one mapping, want %d", n, udpMaxPeers)
	}
	if _, ok := m.knownAs(addr(udpMaxPeers + 10).Addr()); !ok {
		t.Error("the newest peer is unknown")
	}
	// All guests' peers are used up: each mapping still has one.
	u.peers.n.Store(udpAllPeers)
	u.Datagram(datagram(guest2, peerA, "x"))
	u.Datagram(datagram(guest2, peerB, "x"))
	m = f.mappings[1]
	if _, ok := m.knownAs(peerB.Addr()); !ok || len(m.peers) != 1 {
		t.Errorf("peers %v, want just the last", m.peers)
	}
	u.peers.n.Store(udpMaxPeers + 1)
}
