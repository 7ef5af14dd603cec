package forward

import (
	"container/list"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// A published UDP port is one host socket. Each of its clients has a mapping: the
// client's address and port, and the address of the host that it sent to. The mapping
// says how the client's datagrams reach the guest (inbound.go decides):
//
//	by the wire   as whole packets, from the client's own address, or from a port of the
//	              gateway that no other mapping to the same place has
//	plain         through a socket of the guest's namespace, one for each mapping
//
// The guest's answers come back as datagrams to the address that it saw. Datagram asks
// here first, and what belongs to a mapping leaves by the published socket from the
// address that the client had asked. Datagrams to the gateway reach us only because
// Expects knows them; everything else there is the gateway's own.
//
// What a published place in the guest sends to somebody without a mapping leaves by the
// published socket, too, if policy lets it, and makes a mapping the other way round: the
// receiver sees the published port, not some other, and its answer comes to where the
// guest sent from. That is what an answer gets that is later than its mapping. The
// guest's conntrack may have forgotten its translation before us: then the answer comes
// from the container's own address, which is why mappings are known by that, too. Where
// a guest talked to somebody before the port was published it keeps its own mapping.
//
// Errors. An ICMP error of the guest's (Rejected, or the error queue of a plain socket)
// goes to the client from the address it asked, if we may open a raw socket, and is
// counted; before anything else came of a mapping it may lead to one of the other family
// instead, see Inbound.second. Errors of clients are nobody's: the guest is not told who has gone. Datagrams
// with DF that do not fit the host's route get the ICMP error that a router would send.
//
// Ends. A mapping ends after its port's UDPIdle without a datagram either way. At most
// inboundPerPort are a port's and inboundMost all ports': the oldest that saw traffic in
// one direction only goes first, of a port with many before one with few, so that a flood
// from forged addresses meets itself. Plain ones, which need a socket each, are as many as
// the limit of descriptors leaves; a port beyond that pays with its own. A port that is
// closed forgets its mappings.
//
// Nothing blocks: datagrams that wait for a plain socket are few (inboundPending), and
// the rest is dropped and counted.
//
// Not handled: multicast; a client that has one port of its own at two addresses of the
// host keeps its address at the first only.

const (
	// inboundIdle ends a mapping where the guest's conntrack does not say otherwise.
	inboundIdle = 90 * time.Second

	// inboundPerPort and inboundMost bound the mappings.
	inboundPerPort = 4096
	inboundMost    = 16384

	// inboundPending bounds the datagrams that wait for a plain socket.
	inboundPending = 8

	// gatewayPorts are the ports that clients have who are seen as the gateway: away
	// from services. They are used in turn, so that a late answer finds nobody rather
	// than somebody else.
	gatewayPortFirst = 32768
	gatewayPorts     = 28000
)

// publishedSocket is a published port's socket.
type publishedSocket interface {
	// sendFrom sends d's payload to a client, from an address of the host's, or
	// whichever for the zero Addr. It is as udpSocket's send otherwise.
	sendFrom(d flow.Datagram, from netip.Addr, to netip.AddrPort) error
	close()
}

// inboundSockets opens the sockets of published ports. What they receive goes to
// fromClient, and to fromHost and hostError of a client.
type inboundSockets interface {
	// listen receives from c, which nobody else uses; it may close it.
	listen(c *net.UDPConn, p *udpPort) (publishedSocket, error)
	// adopt takes fd, a UDP socket of the guest's namespace.
	adopt(fd int, v6 bool, c *udpClient) (udpSocket, error)
	// tell sends a client an ICMP error, and reports whether we may.
	tell(e clientError) bool
	closeICMP()
}

// clientError is an ICMP error for a client of a published port.
type clientError struct {
	flow.ICMP
	client netip.AddrPort // who sent the datagram
	asked  netip.AddrPort // where to
	mtu    uint32
	quote  []byte // what is known of its payload; borrowed
	size   int    // the payload's whole length
}

// udpPorts are the published UDP ports of a guest.
type udpPorts struct {
	maps    *udpMaps // for what the guest sends on its own
	guest   flow.Guest
	table   flowTable
	log     *slog.Logger
	sockets inboundSockets
	errors  *rate.Limiter // of ICMP errors to clients
	sweeper sweeper
	openers sync.WaitGroup // of plain sockets
	some    atomic.Bool    // something was published; spares the rest until then
	plains  int            // most plain mappings

	evicted atomic.Uint64 // mappings that gave way at a limit

	mu     sync.RWMutex // guards the fields below, and the lists of ports
	closed bool
	from   map[netip.AddrPort][]*udpPort // by places in the guest
	flows  map[udpEnds]*udpClient
	all    [2]list.List // of *udpClient, oldest first, by whether they are answered
	n      int
	plain  int // of those
	next   int // of gatewayPorts
}

// udpEnds are the two ends of a datagram as the guest sees them.
type udpEnds struct{ guest, target netip.AddrPort }

// udpPort is one published port.
type udpPort struct {
	ports  *udpPorts
	in     *Inbound
	doors  Doors
	idle   time.Duration
	local  netip.AddrPort // where the socket is bound
	places []netip.AddrPort

	sendMu sync.Mutex // held while sending
	sock   publishedSocket

	// guarded by ports.mu
	closed  bool
	clients map[clientKey]*udpClient
	own     [2]list.List // as udpPorts.all
}

// clientKey names a mapping: who sent, and to which address of the host. The latter is
// the zero Addr where the guest began.
type clientKey struct {
	client netip.AddrPort
	asked  netip.Addr
}

func newUDPPorts(maps *udpMaps, sockets inboundSockets) *udpPorts {
	u := &udpPorts{
		maps: maps, guest: maps.cfg.Guest, table: maps.cfg.Table, log: maps.cfg.Log, sockets: sockets,
		errors: rate.NewLimiter(errorRate, errorBurst),
		from:   make(map[netip.AddrPort][]*udpPort), flows: make(map[udpEnds]*udpClient), next: rand.IntN(gatewayPorts),
	}
	if share := socketShare(); share < udpMaxMappings { // the guest's own mappings may have that
		u.plains = share / 2
	} else {
		u.plains = inboundMost
	}
	u.sweeper.start(udpSweep, u.sweep)
	return u
}

// ServeUDP carries the clients of a published port until the Closer is closed. The caller
// does nothing with c any more but close it, after the Closer; it may be closed already.
func (f *Forwarder) ServeUDP(c *net.UDPConn, in *Inbound) (io.Closer, error) {
	if f.in.doors == nil {
		return nil, fmt.Errorf("publish %v/udp: %w", c.LocalAddr(), errNoDoors)
	}
	return f.ports.serve(c, in, f.in.doors)
}

// Expects reports whether Datagram is to have what a guest sends to the gateway.
func (f *Forwarder) Expects(t flow.Tuple) bool {
	return f.ports.client(t.Guest, t.Target) != nil
}

// Rejected takes an ICMP error of the guest's about a datagram that it was sent.
func (f *Forwarder) Rejected(e flow.Error) {
	if c := f.ports.client(e.Guest, e.Target); c != nil {
		c.refused(e)
	}
}

func (u *udpPorts) serve(conn *net.UDPConn, in *Inbound, doors Doors) (*udpPort, error) {
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	p := &udpPort{
		ports: u, in: in, doors: doors, idle: in.UDPIdle, clients: make(map[clientKey]*udpClient),
		local: netip.AddrPortFrom(local.Addr().Unmap(), local.Port()),
	}
	if p.idle <= 0 {
		p.idle = inboundIdle
	}
	to, _ := in.reached(doors.Ends())
	p.places = append(p.places, to)
	if in.Behind.IsValid() && in.Behind != to {
		p.places = append(p.places, in.Behind)
	}
	if err := p.listen(conn); err != nil {
		return nil, fmt.Errorf("receive on %v/udp: %w", p.local, err)
	}
	if !u.enter(p) {
		p.Close() // it may have clients already
		return nil, fmt.Errorf("receive on %v/udp: %w", p.local, net.ErrClosed)
	}
	return p, nil
}

// listen opens p's socket.
func (p *udpPort) listen(conn *net.UDPConn) (err error) {
	p.sendMu.Lock() // the guest's answer to the first datagram may be faster than we
	defer p.sendMu.Unlock()
	p.sock, err = p.ports.sockets.listen(conn, p)
	return err
}

// enter makes p's places in the guest known, and reports whether it was in time.
func (u *udpPorts) enter(p *udpPort) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	for _, a := range p.places {
		u.from[a] = append(u.from[a], p)
	}
	u.some.Store(true)
	return true
}

// Close ends the port and its mappings.
func (p *udpPort) Close() error {
	u := p.ports
	u.mu.Lock()
	was := p.closed
	p.closed = true
	var gone []*udpClient
	if !was {
		for _, c := range p.clients {
			u.unlinkLocked(c)
			gone = append(gone, c)
		}
		for _, a := range p.places {
			u.leaveLocked(a, p)
		}
	}
	u.mu.Unlock()
	if was {
		return nil
	}
	p.sock.close()
	for _, c := range gone {
		c.end()
	}
	return nil
}

// leaveLocked is the opposite of enter for one place. The caller must hold mu.
func (u *udpPorts) leaveLocked(a netip.AddrPort, p *udpPort) {
	var others []*udpPort
	for _, o := range u.from[a] {
		if o != p {
			others = append(others, o)
		}
	}
	if len(others) == 0 {
		delete(u.from, a)
		return
	}
	u.from[a] = others
}

// client returns the mapping of a datagram between the two.
func (u *udpPorts) client(guest, target netip.AddrPort) *udpClient {
	if !u.some.Load() {
		return nil
	}
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.flows[udpEnds{guest, target}]
}

// fromClient takes what arrived at the published socket, for an address of the host. d
// has its payload, which is borrowed, and its header.
func (p *udpPort) fromClient(k clientKey, d flow.Datagram) {
	u := p.ports
	u.mu.RLock()
	c := p.clients[k]
	if c == nil {
		c = p.clients[clientKey{client: k.client}]
	}
	u.mu.RUnlock()
	if c == nil {
		if c = u.admit(p, k, d); c == nil {
			return
		}
	}
	c.toGuest(d)
}

// lost counts datagrams that nobody read in time.
func (p *udpPort) lost(n uint32) {
	if p.in.Count.Dropped != nil {
		p.in.Count.Dropped.Add(uint64(n))
	}
}

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

// datagram carries what a guest sends, if it is to a client or from a published place,
// and reports whether it was.
func (u *udpPorts) datagram(d flow.Datagram) bool {
	if !u.some.Load() {
		return false
	}
	if d.Segment > 0 && len(d.Payload) > d.Segment*udpMaxSegments {
		return false // counted there
	}
	u.mu.RLock()
	c := u.flows[udpEnds{d.Guest, d.Target}]
	var p *udpPort
	if c == nil {
		p = u.publishedLocked(d)
	}
	u.mu.RUnlock()
	if p != nil {
		c = u.admitGuest(p, d)
	}
	if c == nil {
		return false
	}
	c.toClient(d)
	return true
}

// publishedLocked returns the port that d's sender is published as, if it can send to d's
// target. The caller must hold mu.
func (u *udpPorts) publishedLocked(d flow.Datagram) *udpPort {
	for _, p := range u.from[d.Guest] {
		if a := p.local.Addr(); a.Is4() == d.Target.Addr().Is4() && !a.IsLoopback() {
			return p
		}
	}
	return nil
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

// tell sends a client an ICMP error, at a limited rate.
func (u *udpPorts) tell(e clientError) {
	if u.errors.Allow() {
		u.sockets.tell(e)
	}
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

// close ends every port and waits until nothing is written to the guest any more but by
// calls that have begun.
func (u *udpPorts) close() {
	u.mu.Lock()
	was := u.closed
	u.closed = true
	var ports []*udpPort
	for _, list := range u.from {
		ports = append(ports, list...)
	}
	u.mu.Unlock()
	if was {
		return
	}
	u.sweeper.stop()
	for _, p := range ports {
		p.Close()
	}
	u.openers.Wait()
	u.sockets.closeICMP()
}

// len returns how many mappings there are.
func (u *udpPorts) len() int {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.n
}
