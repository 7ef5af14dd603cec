package forward

import (
	"container/list"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// Each mapping is in one list, oldest first: that of all mappings never answered, or
// that of its guest address's answered ones. A guest at its own limit, two thirds of
// all, pays with its own mappings: the oldest that was never answered, else an
// answered one that is quiet. When all are taken a mapping that was never answered
// goes: of the few oldest the one whose guest address holds the most, so that a flood
// hits itself first. Where there is none a guest can only replace its own answered
// ones, and a guest without any is refused: nobody pushes out another's answered
// mapping.
//
// A guest with raw sockets can send from any address. It then has only mappings that
// were never answered, which compete by age with those of others.

const (
	// udpMaxMappings is the default limit. Each costs the host a socket.
	udpMaxMappings = 16384

	// udpMaxPeers bounds the addresses that may answer to one mapping, and
	// udpAllPeers those of all mappings together beyond one each; a guest address
	// gets two thirds of that.
	udpMaxPeers = 1024
	udpAllPeers = 128 << 10

	// evictionLook is how many of the oldest mappings are compared.
	evictionLook = 16
)

// udpLimits keep the number of mappings and peers. They are part of udpMaps, whose mu
// guards all but the atomics.
type udpLimits struct {
	max, perGuest int
	n             int // mappings, with those that are about to open
	guests        map[netip.Addr]*udpGuest
	unanswered    list.List // of *udpMapping, oldest first
	peers         peerBudget
}

// peerBudget counts the peers of all guests.
type peerBudget struct{ n atomic.Int64 }

// udpGuest is one guest address.
type udpGuest struct {
	addr       netip.Addr
	n          int       // mappings, with those that are about to open
	unanswered list.List // of *udpMapping, oldest first
	answered   list.List // of *udpMapping, oldest first

	all   *peerBudget
	peers atomic.Int64
}

// udpPlace is where a mapping is listed.
type udpPlace struct {
	guest *udpGuest
	own   *list.Element // of the guest's unanswered or answered
	all   *list.Element // of all unanswered; nil once answered
}

func (l *udpLimits) init(limit int) {
	l.max, l.perGuest = limit, max(limit*2/3, 1)
	l.guests = make(map[netip.Addr]*udpGuest)
}

// morePeers reports whether this guest may have another peer.
func (g *udpGuest) morePeers() bool {
	return g.peers.Load() < udpAllPeers*2/3 && g.all.n.Load() < udpAllPeers
}

func (g *udpGuest) addPeers(n int) {
	g.peers.Add(int64(n))
	g.all.n.Add(int64(n))
}

// reserveLocked makes room for a mapping of addr and returns its guest, nil if there is
// none, and the mapping that had to go for it, nil if none had to: the caller ends
// that. The caller must hold mu.
func (u *udpMaps) reserveLocked(addr netip.Addr) (*udpGuest, *udpMapping) {
	g := u.guests[addr]
	if g == nil {
		g = &udpGuest{addr: addr, all: &u.peers}
	}
	var victim *udpMapping
	switch {
	case g.n >= u.perGuest:
		if victim = g.oldest(); victim == nil {
			return nil, nil // all of them are just opening
		}
	case u.n >= u.max:
		if victim = u.oldestUnanswered(); victim == nil {
			victim = g.oldest()
		}
		if victim == nil {
			return nil, nil
		}
	}
	u.guests[addr] = g
	g.n++
	u.n++
	if victim != nil {
		u.unlinkLocked(victim)
	}
	return g, victim
}

// unlinkLocked takes m from among the mappings. The caller must hold mu.
func (u *udpMaps) unlinkLocked(m *udpMapping) {
	delete(u.live, m.key)
	u.unlist(m)
	u.release(m.place.guest)
}

// release takes back what reserve gave. The caller must hold mu of the maps.
func (l *udpLimits) release(g *udpGuest) {
	l.n--
	if g.n--; g.n == 0 {
		delete(l.guests, g.addr)
	}
}

// enter lists m, for which g was reserved. The caller must hold mu of the maps.
func (l *udpLimits) enter(m *udpMapping) {
	g := m.place.guest
	m.place.own, m.place.all = g.unanswered.PushBack(m), l.unanswered.PushBack(m)
}

// unlist is the opposite of enter. The caller must hold mu of the maps.
func (l *udpLimits) unlist(m *udpMapping) {
	if m.place.all == nil {
		m.place.guest.answered.Remove(m.place.own)
		return
	}
	m.place.guest.unanswered.Remove(m.place.own)
	l.unanswered.Remove(m.place.all)
	m.place.all = nil
}

// oldestUnanswered returns the mapping to give up for any guest's new one.
func (l *udpLimits) oldestUnanswered() *udpMapping {
	var victim *udpMapping
	e := l.unanswered.Front()
	for range evictionLook {
		if e == nil {
			break
		}
		m := e.Value.(*udpMapping)
		if victim == nil || m.place.guest.n > victim.place.guest.n {
			victim = m
		}
		e = e.Next()
	}
	return victim
}

// oldest returns the mapping to give up for a new one of g's: the oldest that was
// never answered, else of a few answered ones the one that is quiet for longest. Those
// looked at go to the end of the list, so that the next look is at others.
func (g *udpGuest) oldest() *udpMapping {
	if e := g.unanswered.Front(); e != nil {
		return e.Value.(*udpMapping)
	}
	var victim *udpMapping
	for range min(evictionLook, g.answered.Len()) {
		e := g.answered.Front()
		m := e.Value.(*udpMapping)
		g.answered.MoveToBack(e)
		if victim == nil || m.flow.LastSeen().Before(victim.flow.LastSeen()) {
			victim = m
		}
	}
	return victim
}

// markAnswered moves m to the answered ones.
func (u *udpMaps) markAnswered(m *udpMapping) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.live[m.key] == m && m.place.all != nil {
		u.unlist(m)
		m.place.own = m.place.guest.answered.PushBack(m)
	}
}

// obtain returns the mapping of k, a new one if there is none. The error is errNoRoom,
// or wraps errNoSocket.
func (u *udpMaps) obtain(k udpKey, target, dial netip.AddrPort, decision flow.Decision) (*udpMapping, error) {
	u.mu.Lock()
	if m := u.live[k]; m != nil {
		u.mu.Unlock()
		return m, nil
	}
	var guest *udpGuest
	var victim *udpMapping
	if !u.closed {
		guest, victim = u.reserveLocked(k.guest.Addr())
	}
	u.mu.Unlock()
	if guest == nil {
		return nil, errNoRoom
	}
	u.evict(victim)
	m := &udpMapping{maps: u, key: k, place: udpPlace{guest: guest}}
	m.onlyDNS.Store(true)
	m.flow = &flow.Flow{
		Tuple:   flow.Tuple{Proto: flow.UDP, Guest: k.guest, Target: target},
		Decided: decision, Dialled: dial, Path: flow.Netstack, Started: time.Now(),
	}
	m.flow.SetState(flow.Open)
	var err error
	if m.sock, err = u.openSocket(m); err != nil {
		u.mu.Lock()
		u.release(guest)
		u.mu.Unlock()
		return nil, fmt.Errorf("%w: %w", errNoSocket, err)
	}
	if m = u.publish(m); m == nil {
		return nil, errNoRoom
	}
	return m, nil
}

// openSocket opens m's socket. When the host's limit of file descriptors is below
// ours, it is treated as ours is.
func (u *udpMaps) openSocket(m *udpMapping) (udpSocket, error) {
	sock, err := u.sockets.open(m.key.v6, m)
	if !errors.Is(err, syscall.EMFILE) && !errors.Is(err, syscall.ENFILE) {
		return sock, err
	}
	u.mu.Lock()
	victim := u.oldestUnanswered()
	if victim == nil {
		victim = m.place.guest.oldest()
	}
	if victim != nil {
		u.unlinkLocked(victim)
	}
	u.mu.Unlock()
	u.evict(victim)
	if victim == nil {
		return nil, err
	}
	return u.sockets.open(m.key.v6, m)
}

// publish makes m the mapping of its key and returns it, or who was faster; nil when
// the maps are closed.
func (u *udpMaps) publish(m *udpMapping) *udpMapping {
	u.mu.Lock()
	if first := u.live[m.key]; first != nil || u.closed {
		u.release(m.place.guest)
		u.mu.Unlock()
		m.sock.close()
		return first
	}
	u.cfg.Table.Open(m.flow)
	u.live[m.key] = m
	u.enter(m)
	u.mu.Unlock()
	u.sweeper.notify()
	return m
}

// evict ends victim, which was unlinked for the sake of another, and counts it.
func (u *udpMaps) evict(victim *udpMapping) {
	if victim == nil {
		return
	}
	if victim.answered.Load() {
		u.count.evictedAnswered.Add(1)
	} else {
		u.count.evicted.Add(1)
	}
	victim.end()
}

// remove ends m and reports whether it was still there.
func (u *udpMaps) remove(m *udpMapping) bool {
	u.mu.Lock()
	here := u.live[m.key] == m
	if here {
		u.unlinkLocked(m)
	}
	u.mu.Unlock()
	if here {
		m.end()
	}
	return here
}
