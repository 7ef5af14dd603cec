package forward

import (
	"net/netip"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// reserve counts a new ping of guest and returns the one that had to go for it, if one
// had to: the caller ends it. ok is false when there is no room.
func (p *pings) reserve(guest netip.Addr) (victim *ping, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, false
	}
	own := p.guests[guest] >= max(p.cfg.max*2/3, 1)
	if own || len(p.live) >= p.cfg.max {
		if victim = p.victimLocked(guest, own); victim == nil {
			return nil, false
		}
		p.unlinkLocked(victim)
	}
	p.guests[guest]++
	return victim, true
}

// unlinkLocked takes one from among the pings.
func (p *pings) unlinkLocked(one *ping) {
	delete(p.live, one.key)
	p.releaseLocked(one.key.guest)
}

func (p *pings) releaseLocked(guest netip.Addr) {
	if p.guests[guest]--; p.guests[guest] == 0 {
		delete(p.guests, guest)
	}
}

// victimLocked returns the ping to give up: one of guest's own, or of the address that
// has the most. There are too few for a cleverer search.
func (p *pings) victimLocked(guest netip.Addr, own bool) *ping {
	most := 0
	for _, n := range p.guests {
		most = max(most, n)
	}
	var victim *ping
	for k, one := range p.live {
		if own && k.guest != guest || !own && p.guests[k.guest] < most {
			continue
		}
		if victim == nil || one.sooner(victim) {
			victim = one
		}
	}
	return victim
}

// sooner reports whether o gives way before other does.
func (o *ping) sooner(other *ping) bool {
	if a, b := o.answered.Load(), other.answered.Load(); a != b {
		return b
	}
	return o.flow.LastSeen().Before(other.flow.LastSeen())
}

// remove ends one and reports whether it was still there.
func (p *pings) remove(one *ping) bool {
	p.mu.Lock()
	here := p.live[one.key] == one
	if here {
		p.unlinkLocked(one)
	}
	p.mu.Unlock()
	if here {
		one.end()
	}
	return here
}

// end closes the ping's socket and its entry in the table.
func (o *ping) end() {
	o.mu.Lock()
	o.sock.close()
	o.sock = nil
	o.mu.Unlock()
	o.flow.SetState(flow.Closed)
	o.pings.cfg.Table.Close(o.flow)
}

// sweep ends the pings that are idle at now and returns how many there are left.
func (p *pings) sweep(now time.Time) int {
	var idle []*ping
	p.mu.RLock()
	left := len(p.live)
	for _, one := range p.live {
		if now.Sub(one.flow.LastSeen()) >= pingIdle {
			idle = append(idle, one)
		}
	}
	p.mu.RUnlock()
	for _, one := range idle {
		if p.remove(one) {
			p.count.expired.Add(1)
			left--
		}
	}
	return left
}
