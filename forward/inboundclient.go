package forward

import (
	"container/list"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// inboundPending bounds the datagrams that wait for a plain socket.
const inboundPending = 8

// udpClient is the mapping of one client of a published UDP port.
type udpClient struct {
	port       *udpPort
	key        clientKey
	to         netip.AddrPort // what it reaches
	seen       netip.AddrPort // what the guest sees; unknown for a plain one
	plain      bool
	guestBegan bool
	moved      bool // in the place of another, see udpPorts.again
	why        string
	flow       *flow.Flow

	answered atomic.Bool   // there was traffic in both directions
	own, all *list.Element // guarded by ports.mu; own is nil once it is over

	mu      sync.Mutex // guards the fields below, for a plain one; held while sending
	sock    udpSocket
	asked   bool // for a socket
	over    bool
	pending []flow.Datagram
}

// open makes c's entry in the table.
func (c *udpClient) open() {
	c.flow = &flow.Flow{
		Tuple:   flow.Tuple{Proto: flow.UDP, Guest: c.to, Target: c.key.client},
		Decided: flow.Published, Reason: c.why, Path: flow.Netstack,
		Dialled: netip.AddrPortFrom(c.key.asked, c.port.local.Port()), Started: time.Now(),
	}
	if c.plain {
		c.flow.Path = flow.Kernel
	}
	c.flow.SetState(flow.Open)
	c.port.ports.table.Open(c.flow)
}

// kind is the index of the lists that c is in. The caller must hold ports.mu.
func (c *udpClient) kind() int {
	if c.answered.Load() {
		return 1
	}
	return 0
}

// ends returns what the guest's datagrams to c look like: from where it was reached, and
// from the container's own address if the guest has forgotten its translation.
func (c *udpClient) ends() []udpEnds {
	if c.plain {
		return nil
	}
	e := []udpEnds{{c.to, c.seen}}
	if b := c.port.in.Behind; b.IsValid() && b != c.to && b.Addr().Is4() == c.seen.Addr().Is4() {
		e = append(e, udpEnds{b, c.seen})
	}
	return e
}

// passed notes that d has passed.
func (c *udpClient) passed(n *flow.Counter, d *flow.Datagram, toGuest bool) {
	c.flow.Touch(time.Now())
	countDatagrams(n, len(d.Payload), d.Segment)
	if toGuest == c.guestBegan && !c.answered.Load() {
		c.port.ports.markAnswered(c)
	}
}

// toGuest carries a datagram of the client's.
func (c *udpClient) toGuest(d flow.Datagram) {
	c.passed(&c.flow.ToGuest, &d, true)
	d.Guest, d.Target = c.to, c.seen
	if c.plain {
		c.sendPlain(d)
		return
	}
	if err := c.port.ports.guest.WriteDatagram(d); err != nil {
		count(c.port.in.Count.Dropped)
	}
}

// toClient carries a datagram of the guest's.
func (c *udpClient) toClient(d flow.Datagram) {
	p := c.port
	p.sendMu.Lock()
	err := p.sock.sendFrom(d, c.key.asked, c.key.client)
	p.sendMu.Unlock()
	var big *tooBigError
	switch {
	case err == nil:
		c.passed(&c.flow.ToHost, &d, false)
	case errors.As(err, &big) && !c.plain:
		count(p.in.Count.Dropped)
		p.ports.maps.answer(d, flow.Verdict{Answer: flow.Unreachable, ICMP: tooBigICMP(d.Target.Addr()), MTU: big.mtu})
	default:
		count(p.in.Count.Dropped)
	}
}

// sendPlain sends d through c's socket in the guest's namespace, which is opened for
// the first.
func (c *udpClient) sendPlain(d flow.Datagram) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d.DontFragment = false // the guest's loopback and bridges decide for themselves
	switch {
	case c.over:
	case c.sock != nil:
		if c.sock.send(d, c.to) == nil {
			return
		}
	case len(c.pending) < inboundPending:
		d.Payload = slices.Clone(d.Payload)
		c.pending = append(c.pending, d)
		c.openPlainLocked()
		return
	}
	count(c.port.in.Count.Dropped)
}

// openPlainLocked gets c's socket, now if there is one at hand. The caller must hold mu.
func (c *udpClient) openPlainLocked() {
	if c.asked {
		return
	}
	c.asked = true
	u, doors, kind := c.port.ports, c.port.doors, SocketUDP4.forFamily(c.to.Addr())
	if fd, err := doors.Socket(kind, false); err == nil {
		c.haveLocked(u.sockets.adopt(fd, c.to.Addr().Is6(), c))
		return
	}
	if !u.beginOpening() {
		return
	}
	go func() {
		defer u.openers.Done()
		// Without the lock: both wait for others.
		fd, err := doors.Socket(kind, true)
		var sock udpSocket
		if err == nil {
			sock, err = u.sockets.adopt(fd, c.to.Addr().Is6(), c)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.haveLocked(sock, err)
	}()
}

// beginOpening counts a goroutine that close waits for, and reports false after it.
func (u *udpPorts) beginOpening() bool {
	u.mu.RLock()
	defer u.mu.RUnlock()
	if u.closed {
		return false
	}
	u.openers.Add(1)
	return true
}

// haveLocked makes sock c's and sends what waits for it. The caller must hold mu.
func (c *udpClient) haveLocked(sock udpSocket, err error) {
	if err != nil {
		c.noSocketLocked(err)
		return
	}
	if c.over {
		sock.close()
		return
	}
	c.sock = sock
	for _, d := range c.pending {
		if sock.send(d, c.to) != nil {
			count(c.port.in.Count.Dropped)
		}
	}
	c.pending = nil
}

// noSocketLocked drops what waits, and has the next datagram try again. The caller must
// hold mu.
func (c *udpClient) noSocketLocked(err error) {
	u := c.port.ports
	for range c.pending {
		count(c.port.in.Count.Dropped)
	}
	c.pending, c.asked = nil, false
	if u.maps.warn.Allow() {
		u.log.Warn("no socket of the guest for a published udp port", slog.Any("to", c.to), slog.Any("err", err))
	}
}

// fromHost implements udpOwner for a plain one: what the guest's namespace answers.
func (c *udpClient) fromHost(from netip.AddrPort, payload []byte, segment int, hops, tos uint8) {
	if from != c.to {
		return // nobody was asked there
	}
	c.toClient(flow.Datagram{Payload: payload, Segment: segment, TOS: tos})
}

// hostError implements udpOwner for a plain one.
func (c *udpClient) hostError(e hostError) {
	if e.to != c.to {
		return
	}
	c.refused(flow.Error{
		Tuple: flow.Tuple{Proto: flow.UDP, Guest: c.to, Target: c.key.client},
		ICMP:  e.ICMP, From: e.from, MTU: e.mtu, Quote: e.quote,
	})
}

// lost implements udpOwner.
func (c *udpClient) lost(n uint32) { c.port.lost(n) }

// refused passes an ICMP error about a datagram of the client's on to it, as if from the
// address that it asked, unless there is another place to ask.
func (c *udpClient) refused(e flow.Error) {
	if e.ICMP == portUnreachable(c.to.Addr()) && c.port.ports.again(c, e) {
		return
	}
	count(c.port.in.Count.Refused)
	icmp := e.ICMP
	if client := c.key.client.Addr(); client.Is4() != c.to.Addr().Is4() {
		if icmp != portUnreachable(c.to.Addr()) {
			return // has no like in the other family
		}
		icmp = portUnreachable(client)
	}
	c.port.ports.tell(clientError{
		ICMP: icmp, client: c.key.client, asked: netip.AddrPortFrom(c.key.asked, c.port.local.Port()),
		mtu: e.MTU, quote: e.Quote, size: max(e.Size, len(e.Quote)),
	})
}

// end closes c's socket and its entry in the table.
func (c *udpClient) end() {
	c.mu.Lock()
	c.over = true
	sock := c.sock
	c.pending = nil
	c.mu.Unlock()
	if sock != nil {
		sock.close()
	}
	c.flow.SetState(flow.Closed)
	c.port.ports.table.Close(c.flow)
}
