package forward

import (
	"container/list"
	"time"
)

// Theory of operation.
//
// A mapping ends after its port's UDPIdle without a datagram either way. At most
// inboundPerPort are a port's and inboundMost all ports': the oldest that saw traffic in
// one direction only goes first, of a port with many before one with few, so that a flood
// from forged addresses meets itself. Plain ones, which need a socket each, are as many as
// the limit of descriptors leaves; a port beyond that pays with its own. A port that is
// closed forgets its mappings.

const (
	// inboundIdle ends a mapping where the guest's conntrack does not say otherwise.
	inboundIdle = 90 * time.Second

	// inboundPerPort and inboundMost bound the mappings.
	inboundPerPort = 4096
	inboundMost    = 16384
)

// add lists c, which choose may refuse, and returns it, or who was faster; nil if there
// is no room.
func (u *udpPorts) add(c *udpClient, choose func() bool) *udpClient {
	p := c.port
	u.mu.Lock()
	if first := p.clients[c.key]; first != nil {
		u.mu.Unlock()
		return first
	}
	if p.closed || u.closed || !choose() {
		u.mu.Unlock()
		count(p.in.Count.Dropped)
		return nil
	}
	victim := u.victimLocked(c)
	if victim != nil {
		u.unlinkLocked(victim)
	}
	c.open()
	u.linkLocked(c)
	u.mu.Unlock()
	if victim != nil {
		u.evicted.Add(1)
		victim.end()
	}
	if !c.moved {
		count(p.in.Count.Clients)
	}
	if c.why != "" {
		count(p.in.Count.Gateway)
	}
	u.sweeper.notify()
	return c
}

// linkLocked and unlinkLocked list c and take it out. The caller must hold mu.
func (u *udpPorts) linkLocked(c *udpClient) {
	p := c.port
	p.clients[c.key] = c
	u.n++
	if c.plain {
		u.plain++
	}
	c.own, c.all = p.own[0].PushBack(c), u.all[0].PushBack(c)
	for _, e := range c.ends() {
		if u.flows[e] == nil {
			u.flows[e] = c
		}
	}
}

func (u *udpPorts) unlinkLocked(c *udpClient) {
	p, kind := c.port, c.kind()
	delete(p.clients, c.key)
	u.n--
	if c.plain {
		u.plain--
	}
	p.own[kind].Remove(c.own)
	u.all[kind].Remove(c.all)
	c.own = nil
	for _, e := range c.ends() {
		if u.flows[e] == c {
			delete(u.flows, e)
		}
	}
}

// victimLocked returns the mapping that has to go for c, nil if none. The caller must
// hold mu.
func (u *udpPorts) victimLocked(c *udpClient) *udpClient {
	switch p := c.port; {
	case len(p.clients) >= inboundPerPort, c.plain && u.plain >= u.plains && len(p.clients) > 0:
		return worst(&p.own)
	case u.n >= inboundMost:
		return worst(&u.all)
	}
	return nil
}

// worst returns which of a few old mappings has to go: one with traffic in one direction,
// if there is any, and of the port that has most.
func worst(lists *[2]list.List) (victim *udpClient) {
	e := lists[0].Front()
	for i := 0; i < evictionLook && e != nil; i++ {
		if c := e.Value.(*udpClient); victim == nil || len(c.port.clients) > len(victim.port.clients) {
			victim = c
		}
		e = e.Next()
	}
	if victim != nil {
		return victim
	}
	// Of the others the one that is quiet for longest. Those go to the end, so that the next
	// look is at others.
	for range min(evictionLook, lists[1].Len()) {
		e := lists[1].Front()
		lists[1].MoveToBack(e)
		c := e.Value.(*udpClient)
		if victim == nil || len(c.port.clients) > len(victim.port.clients) ||
			c.port == victim.port && c.flow.LastSeen().Before(victim.flow.LastSeen()) {
			victim = c
		}
	}
	return victim
}

// markAnswered notes that c saw traffic in both directions.
func (u *udpPorts) markAnswered(c *udpClient) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if c.own == nil {
		return
	}
	p := c.port
	p.own[0].Remove(c.own)
	u.all[0].Remove(c.all)
	c.answered.Store(true)
	c.own, c.all = p.own[1].PushBack(c), u.all[1].PushBack(c)
}

// sweep ends the mappings that are idle at now and returns how many there are left.
func (u *udpPorts) sweep(now time.Time) int {
	var idle []*udpClient
	u.mu.Lock()
	for kind := range u.all {
		for e := u.all[kind].Front(); e != nil; e = e.Next() {
			if c := e.Value.(*udpClient); now.Sub(c.flow.LastSeen()) >= c.port.idle {
				idle = append(idle, c)
			}
		}
	}
	for _, c := range idle {
		u.unlinkLocked(c)
	}
	left := u.n
	u.mu.Unlock()
	for _, c := range idle {
		c.end()
	}
	return left
}

// len returns how many mappings there are.
func (u *udpPorts) len() int {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.n
}
