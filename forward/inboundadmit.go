package forward

import (
	"net/netip"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// A client without a mapping gets one by the way that Inbound.passage says. Where the guest
// says that the port is closed, and nothing else came of it, it may lead to the engine's
// address of the other family instead.
//
// What a published place in the guest sends to somebody without a mapping leaves by the
// published socket, too, if policy lets it, and makes a mapping the other way round: the
// receiver sees the published port, not some other, and its answer comes to where the
// guest sent from. That is what an answer gets that is later than its mapping. The
// guest's conntrack may have forgotten its translation before us: then the answer comes
// from the container's own address, which is why mappings are known by that, too. Where
// a guest talked to somebody before the port was published it keeps its own mapping.

const (
	// gatewayPorts are the ports that clients have who are seen as the gateway: away
	// from services. They are used in turn, so that a late answer finds nobody rather
	// than somebody else.
	gatewayPortFirst = 32768
	gatewayPorts     = 28000
)

// admit makes a mapping for the client of k, whose first datagram d is. It returns nil
// when there is no way.
func (u *udpPorts) admit(p *udpPort, k clientKey, d flow.Datagram) *udpClient {
	way := p.in.passage(flow.UDP, k.client, p.doors)
	if way.way != Wire && way.way != Plain {
		count(p.in.Count.Refused)
		u.tell(clientError{
			ICMP: portUnreachable(k.client.Addr()), client: k.client,
			asked: netip.AddrPortFrom(k.asked, p.local.Port()), quote: d.Payload, size: len(d.Payload),
		})
		return nil
	}
	return u.enterBy(&udpClient{port: p, key: k}, way)
}

// enterBy makes c a mapping, the way of which is known.
func (u *udpPorts) enterBy(c *udpClient, way passage) *udpClient {
	c.to, c.seen, c.plain, c.why = way.to, way.from, way.way == Plain, way.why
	return u.add(c, func() bool { return u.chooseSeenLocked(c, way) })
}

// chooseSeenLocked gives c the address that the guest sees, and reports false if there
// is none left. The caller must hold mu.
func (u *udpPorts) chooseSeenLocked(c *udpClient, way passage) bool {
	if c.plain {
		return true
	}
	if c.seen.Port() != 0 {
		if u.flows[udpEnds{c.to, c.seen}] == nil {
			return true
		}
		way = way.otherwise(c.key.client, c.port.doors)
		c.seen, c.why = way.from, way.why
	}
	for range gatewayPorts {
		c.seen = netip.AddrPortFrom(way.from.Addr(), uint16(gatewayPortFirst+u.next))
		u.next = (u.next + 1) % gatewayPorts
		if u.flows[udpEnds{c.to, c.seen}] == nil {
			return true
		}
	}
	return false
}

// admitGuest makes a mapping for a guest that is published as p and sends to somebody
// that is not a client. It returns nil if d is to go another way.
func (u *udpPorts) admitGuest(p *udpPort, d flow.Datagram) *udpClient {
	if u.maps.talks(d) {
		return nil
	}
	r, err := u.maps.cfg.Policy.route(flow.UDP, d.Target)
	if err != nil || r.decision != flow.Direct {
		return nil
	}
	c := &udpClient{port: p, key: clientKey{client: d.Target}, to: d.Guest, seen: d.Target, guestBegan: true}
	return u.add(c, func() bool { return u.flows[udpEnds{d.Guest, d.Target}] == nil })
}

// talks reports whether d's guest has sent to d's target by a mapping of its own.
func (u *udpMaps) talks(d flow.Datagram) bool {
	u.mu.RLock()
	m := u.live[udpKey{d.Guest, d.Target.Addr().Is6()}]
	u.mu.RUnlock()
	if m == nil {
		return false
	}
	_, ok := m.knownAs(d.Target.Addr())
	return ok
}

// again has another mapping take the place of c, of which the guest has said nothing but e,
// that its port is closed; the datagram is sent again if all of it is known. It reports whether
// there is one.
func (u *udpPorts) again(c *udpClient, e flow.Error) bool {
	p := c.port
	if c.plain || c.guestBegan || c.answered.Load() {
		return false
	}
	way := p.in.second(passage{to: c.to}, flow.UDP, c.key.client, p.doors)
	if way.way != Wire {
		return false
	}
	u.mu.Lock()
	was := c.own != nil
	if was {
		u.unlinkLocked(c)
	}
	u.mu.Unlock()
	if !was {
		return true // by another datagram
	}
	c.end()
	if c = u.enterBy(&udpClient{port: p, key: c.key, moved: true}, way); c != nil && e.Size <= len(e.Quote) {
		c.toGuest(flow.Datagram{Payload: e.Quote, Hops: defaultHops - 1})
	}
	return true
}
