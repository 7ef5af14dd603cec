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
// Errors. An ICMP error of the guest's (Rejected, or the error queue of a plain socket)
// goes to the client from the address it asked, if we may open a raw socket, and is
// counted; before anything else came of a mapping it may lead to one of the other family
// instead, see Inbound.second. Errors of clients are nobody's: the guest is not told who has gone. Datagrams
// with DF that do not fit the host's route get the ICMP error that a router would send.
//
// Who gets a mapping is told in inboundadmit.go, how many there are and when they end in
// inboundlimit.go.
//
// Nothing blocks: datagrams that wait for a plain socket are few (inboundPending), and
// the rest is dropped and counted.
//
// Not handled: multicast; a client that has one port of its own at two addresses of the
// host keeps its address at the first only.

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

// tell sends a client an ICMP error, at a limited rate.
func (u *udpPorts) tell(e clientError) {
	if u.errors.Allow() {
		u.sockets.tell(e)
	}
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
