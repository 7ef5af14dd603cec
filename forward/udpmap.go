package forward

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// udpMapping is one mapping. Its socket is used by whoever sends, under mu, and
// reports to fromHost and hostError on a goroutine of its own.
type udpMapping struct {
	maps  *udpMaps
	key   udpKey
	flow  *flow.Flow
	sock  udpSocket
	place udpPlace // among the mappings; guarded by maps.mu

	answered atomic.Bool // something came back
	onlyDNS  atomic.Bool // nothing but port 53 was ever asked for

	mu     sync.Mutex // guards the fields below and is held while sending
	closed bool
	target netip.AddrPort // of the last datagram
	dial   netip.AddrPort // where it went

	// peers are the host side addresses that may answer. The receiver must not wait
	// for a sender, hence a lock of its own.
	peersMu sync.RWMutex
	peers   map[netip.Addr]netip.Addr // to the address that the guest knows it by
}

// errMappingClosed says that a mapping has just been removed: look again.
var errMappingClosed = errors.New("mapping closed")

// sendAgain sends d if its target is that of the datagram before, and reports whether
// that was so. An error has then been dealt with.
func (m *udpMapping) sendAgain(d flow.Datagram) bool {
	m.mu.Lock()
	if m.closed || m.target != d.Target {
		m.mu.Unlock()
		return false
	}
	err := m.sock.send(d, m.dial)
	m.mu.Unlock()
	if err != nil {
		m.maps.sendFailed(d, err)
		return true
	}
	m.sent(&d)
	return true
}

// send sends d to dial, which policy allows, and from then on lets answers through.
func (m *udpMapping) send(d flow.Datagram, dial netip.AddrPort) error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return errMappingClosed
	}
	m.target, m.dial = d.Target, dial
	if d.Target.Port() != dnsPort {
		m.onlyDNS.Store(false)
	}
	m.addPeer(dial.Addr(), d.Target.Addr())
	err := m.sock.send(d, dial)
	if err != nil {
		m.target = netip.AddrPort{}
	}
	m.mu.Unlock()
	if err == nil {
		m.sent(&d)
	}
	return err
}

// sent notes that d went out.
func (m *udpMapping) sent(d *flow.Datagram) {
	m.flow.Touch(time.Now())
	countDatagrams(&m.flow.ToHost, len(d.Payload), d.Segment)
}

// countDatagrams counts n bytes in datagrams of segment bytes.
func countDatagrams(c *flow.Counter, n, segment int) {
	if segment <= 0 || n <= segment {
		c.Add(n)
		return
	}
	c.Bytes.Add(uint64(n))
	c.Packets.Add(uint64((n + segment - 1) / segment))
}

// addPeer notes that the guest has sent to target and we to dialled. When there are
// too many, any other peer is forgotten: which one does not matter enough to keep the
// order of thousands. The caller must hold mu.
func (m *udpMapping) addPeer(dialled, target netip.Addr) {
	m.peersMu.Lock()
	defer m.peersMu.Unlock()
	if _, ok := m.peers[dialled]; ok {
		return
	}
	guest := m.place.guest
	if len(m.peers) >= udpMaxPeers || len(m.peers) > 0 && !guest.morePeers() {
		for other := range m.peers {
			delete(m.peers, other)
			break
		}
	} else {
		guest.addPeers(1)
	}
	if m.peers == nil {
		m.peers = make(map[netip.Addr]netip.Addr, 1)
	}
	m.peers[dialled] = target
}

// knownAs returns the address that the guest knows a host side address by, if it has
// sent something there.
func (m *udpMapping) knownAs(dialled netip.Addr) (netip.Addr, bool) {
	m.peersMu.RLock()
	defer m.peersMu.RUnlock()
	a, ok := m.peers[dialled]
	return a, ok
}

// fromHost passes a datagram, or a train of them, from the host on to the guest. Its
// hops are what it arrived with. It waits while the guest's link is full.
func (m *udpMapping) fromHost(from netip.AddrPort, payload []byte, segment int, hops, tos uint8) {
	target, ok := m.knownAs(from.Addr())
	if !ok {
		m.maps.count.filtered.Add(1)
		return
	}
	if !m.answered.Swap(true) {
		m.maps.markAnswered(m)
	}
	m.flow.Touch(time.Now())
	countDatagrams(&m.flow.ToGuest, len(payload), segment)
	m.maps.cfg.Guest.WriteDatagram(flow.Datagram{ // fails only when the link is closed
		Guest: m.key.guest, Target: netip.AddrPortFrom(target, from.Port()),
		Payload: payload, Segment: segment, TOS: tos,
		Hops: max(hops, 2) - 1, // it has arrived: no use in ending it here
	})
}

// lost implements udpOwner.
func (m *udpMapping) lost(n uint32) { m.maps.count.overrun.Add(uint64(n)) }

// hostError passes an ICMP message about a datagram of this mapping on to the guest.
func (m *udpMapping) hostError(e hostError) {
	u := m.maps
	known, ok := m.knownAs(e.to.Addr())
	if !ok {
		u.count.errorsUnknown.Add(1)
		return
	}
	target := netip.AddrPortFrom(known, e.to.Port())
	refused := e.ICMP == portUnreachable4 || e.ICMP == portUnreachable6
	if known != e.to.Addr() { // the host address
		if refused && u.otherLoopback(m, target, e) {
			return
		}
		if known.Is4() != e.to.Addr().Is4() {
			if !refused {
				return // of the other family, and nothing else comes from a loopback
			}
			e.ICMP = portUnreachable(known)
		}
	}
	switch {
	case e.from == e.to.Addr():
		e.from = known
	case e.from.IsLoopback():
		e.from = netip.Addr{}
	}
	u.count.errorsRelayed.Add(1)
	u.cfg.Guest.WriteError(flow.Error{ // fails only when the link is closed
		Tuple: flow.Tuple{Proto: flow.UDP, Guest: m.key.guest, Target: target},
		ICMP:  e.ICMP, From: e.from, MTU: e.mtu, Quote: e.quote,
	})
}

// idleAt reports whether nothing has passed for too long.
func (m *udpMapping) idleAt(now time.Time) bool {
	limit := udpUnansweredIdle
	switch {
	case m.onlyDNS.Load():
		limit = udpDNSIdle
	case m.answered.Load():
		limit = udpAnsweredIdle
	}
	return now.Sub(m.flow.LastSeen()) >= limit
}

// end closes the mapping's socket and its entry in the table.
func (m *udpMapping) end() {
	m.mu.Lock()
	m.closed = true // no peer is added from here on
	m.mu.Unlock()
	m.peersMu.Lock()
	m.place.guest.addPeers(-len(m.peers))
	m.peers = nil
	m.peersMu.Unlock()
	m.sock.close()
	m.flow.SetState(flow.Closed)
	m.maps.cfg.Table.Close(m.flow)
}

// loopbackPreference knows for which ports of the host address the second loopback
// family answers and the first does not.
type loopbackPreference struct {
	mu     sync.Mutex // guards second
	second map[netip.AddrPort]struct{}
}

// first returns which of r's addresses to try first for target.
func (l *loopbackPreference) first(target netip.AddrPort, r *route) int {
	if r.n < 2 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.second[target]; ok {
		return 1
	}
	return 0
}

// set notes which address to try first. There are at most as many entries as ports
// that the policy opens, of two addresses.
func (l *loopbackPreference) set(target netip.AddrPort, second bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !second {
		delete(l.second, target)
		return
	}
	if l.second == nil {
		l.second = make(map[netip.AddrPort]struct{})
	}
	l.second[target] = struct{}{}
}

// quoteAll is the longest quotation that is surely the whole payload. Linux quotes up
// to 576 bytes of an IPv4 message; the headers take 56.
const quoteAll = 500

// otherLoopback reacts to a refusal by the loopback of m's family: it sends the quoted
// datagram to the other one and reports whether the guest need not hear of it yet.
func (u *udpMaps) otherLoopback(m *udpMapping, target netip.AddrPort, e hostError) bool {
	m.mu.Lock()
	m.target = netip.AddrPort{} // the next one has to ask again
	m.mu.Unlock()
	r, err := u.cfg.Policy.route(flow.UDP, target)
	if err != nil || r.n < 2 {
		return false
	}
	if e.to != r.dials[0] {
		u.prefer.set(target, false)
		return false
	}
	u.prefer.set(target, true)
	if len(e.quote) > quoteAll {
		return true // lost, as datagrams are; the next one goes the other way
	}
	d := flow.Datagram{Guest: m.key.guest, Target: target, Payload: e.quote}
	if err := u.sendVia(d, r.dials[1], r.decision); err != nil {
		u.prefer.set(target, false)
		return false
	}
	return true
}
