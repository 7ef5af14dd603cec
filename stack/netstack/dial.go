package netstack

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// Dial is the way into the guest by gVisor (handshake.go has another): a client's
// connection whose packets come out of the guest's device as from a network. The client's address is not ours. Towards the guest
// gVisor may send from any address, and the guest's answers take its default route,
// which is the device; gVisor has an endpoint for these four numbers by then, so they
// are its, on any path.
//
// The same four numbers can belong to a connection that the guest began: from the
// port that is asked for, to the client; or to a Handshake, and the socket that goes on with
// it. Whoever was first has them, from the moment that he asks; a Dial that is second
// gets EADDRINUSE, a SYN that is second goes to the Dial's endpoint, as two sockets that
// connect to each other do (RFC 9293 section 3.5), but for the moment before gVisor has
// that: then both go on. The ports of different destinations are independent: one client
// port may be used for each of the guest's.
//
// The guest's answer decides: SYN-ACK, RST, or an ICMP error about our SYN (icmp.go).
// gVisor repeats the SYN after 1, 2, 4 ... seconds; ctx says for how long. An answer
// that is later than that gets a RST.
//
// At most MaxDials are in flight. What is connected is its caller's to bound and to
// close. The end of Run waits for the dials, and resets the connections, but does not wait
// until they are closed: the other side of a relay may be stuck.

// dialError is a Dial that failed; Err is a syscall.Errno or the context's error.
type dialError struct {
	from, to netip.AddrPort
	err      error
}

// Error implements error.
func (e *dialError) Error() string {
	return fmt.Sprintf("dial guest %v > %v: %v", e.from, e.to, e.err)
}

// Unwrap returns the cause.
func (e *dialError) Unwrap() error { return e.err }

// Dial connects to the guest's TCP port to, as if from were a host beyond the guest's
// default route. from's port may be 0 for any. It blocks until the guest answers or ctx
// ends. The error wraps ECONNREFUSED after a RST, EHOSTUNREACH or ENETUNREACH after
// an ICMP error, EADDRINUSE if the guest has a connection of these addresses and ports,
// EADDRNOTAVAIL if from may not be on a wire, EAGAIN if there are too many of them in
// flight, or ctx's. The caller closes the Conn, which also has OnReset(func()).
func (s *Stack) Dial(ctx context.Context, from, to netip.AddrPort) (flow.Conn, error) {
	c, err := s.dial(ctx, from, to)
	if err != nil {
		return nil, &dialError{from, to, err}
	}
	return c, nil
}

func (s *Stack) dial(ctx context.Context, from, to netip.AddrPort) (*dialled, error) {
	if !s.canBeClient(from.Addr()) || from.Addr().Is4() != to.Addr().Is4() || !to.Addr().IsValid() {
		return nil, syscall.EADDRNOTAVAIL
	}
	p := &pendingDial{from: from, to: to, failed: make(chan error, 1)}
	if err := s.enterDial(p); err != nil {
		return nil, err
	}
	defer s.flows.Done()
	defer s.out.end(p)
	if p.from.Port() != 0 && s.isLive(p.tuple()) { // no Handshake can begin any more
		return nil, syscall.EADDRINUSE
	}
	size := s.bufs.enter()
	s.served.Add(1)
	c, err := s.connectTo(ctx, p, size)
	if err != nil {
		s.left()
	}
	return c, err
}

// canBeClient reports whether the guest would take packets from a: the reader's idea
// of plausible, from the other side.
func (s *Stack) canBeClient(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() && !a.IsLinkLocalUnicast() &&
		!a.Is4In6() && a != broadcast4
}

// isLive reports whether the guest's kernel has t, to any goroutine but the link's.
func (s *Stack) isLive(t flow.Tuple) (live bool) {
	if s.kernel.Kernel != nil {
		s.kernel.Do(func() { live = s.kernel.Live(t) })
	}
	return live
}

// enterDial counts p among the flows that Run waits for, and makes it known if it has a port.
func (s *Stack) enterDial(p *pendingDial) error {
	t := p.tuple()
	s.dials.mu.Lock()
	defer s.dials.mu.Unlock()
	switch {
	case s.dials.closed:
		return syscall.ENETDOWN
	case s.dials.byFlow[t] != nil:
		return syscall.EADDRINUSE
	}
	if err := s.out.begin(p, s.cfg.MaxDials); err != nil {
		return err
	}
	s.flows.Add(1)
	return nil
}

// left counts a connection out.
func (s *Stack) left() {
	s.served.Add(-1)
	s.bufs.leave()
}

// connectTo makes the endpoint and waits for the guest's answer.
func (s *Stack) connectTo(ctx context.Context, p *pendingDial, size int) (*dialled, error) {
	wq := new(waiter.Queue)
	ep, terr := s.ip.NewEndpoint(tcp.ProtocolNumber, protocolOf(p.to.Addr()), wq)
	if terr != nil {
		return nil, errnoOf(terr)
	}
	limitBuffers(ep, size)
	answer, answered := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	wq.EventRegister(&answer)
	defer wq.EventUnregister(&answer)
	// Without this a port that is in use towards one destination would be so towards all.
	ep.SocketOptions().SetReuseAddress(p.from.Port() != 0)
	terr = ep.Bind(addressOf(p.from.Addr(), p.from.Port()))
	if terr == nil {
		s.out.bound(p, ep) // before the guest can answer
		terr = ep.Connect(addressOf(p.to.Addr(), p.to.Port()))
	}
	if _, started := terr.(*tcpip.ErrConnectStarted); !started {
		ep.Close()
		return nil, errnoOf(terr)
	}
	if err := p.wait(ctx, ep, answered); err != nil {
		ep.Abort()
		return nil, err
	}
	return &dialled{guestConn: newGuestConn(ep, wq), stack: s}, nil
}

// wait returns what the guest answered.
func (p *pendingDial) wait(ctx context.Context, ep tcpip.Endpoint, answered <-chan struct{}) error {
	for {
		switch tcp.EndpointState(ep.State()) {
		case tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
		case tcp.StateError, tcp.StateClose, tcp.StateInitial:
			return errnoOf(ep.LastError())
		default:
			return nil // a FIN or RST that is here already is Read's to tell
		}
		select {
		case <-answered:
		case err := <-p.failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// errnoOf translates the errors of a connect.
func errnoOf(terr tcpip.Error) error {
	switch terr.(type) {
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrPortInUse, *tcpip.ErrBadLocalAddress, *tcpip.ErrNoPortAvailable:
		return syscall.EADDRINUSE // our addresses are never bad: gVisor may send from any
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown, *tcpip.ErrNoNet:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable:
		return syscall.ENETUNREACH
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	}
	return syscall.ECONNABORTED // the end of Run
}

// pendingDial is a Dial whose guest has not answered.
type pendingDial struct {
	from, to netip.AddrPort
	failed   chan error // has room for the one error that the guest's network sends
	hand     *handshake // or this has no Dial
}

// tuple is the flow that the guest's packets of this connection seem to be.
func (p *pendingDial) tuple() flow.Tuple {
	return flow.Tuple{Proto: flow.TCP, Guest: p.to, Target: p.from}
}

// pendingDials finds the Dial, or the Handshake, that something of the guest's is about.
type pendingDials struct {
	byHand atomic.Int32 // handshakes among them

	mu     sync.Mutex // guards the fields below
	n      int
	byFlow map[flow.Tuple]*pendingDial
}

// begin counts p, and makes it known if it has a port already.
func (o *pendingDials) begin(p *pendingDial, most int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.beginLocked(p, most)
}

// beginLocked is begin. The caller must hold mu.
func (o *pendingDials) beginLocked(p *pendingDial, most int) error {
	switch {
	case o.byFlow[p.tuple()] != nil:
		return syscall.EADDRINUSE
	case o.n >= most:
		return syscall.EAGAIN
	}
	o.n++
	if p.from.Port() != 0 {
		o.add(p)
	}
	return nil
}

// bound makes p known by the port that it got.
func (o *pendingDials) bound(p *pendingDial, ep tcpip.Endpoint) {
	a, terr := ep.GetLocalAddress()
	o.mu.Lock()
	defer o.mu.Unlock()
	if terr == nil && p.from.Port() == 0 {
		p.from = netip.AddrPortFrom(p.from.Addr(), a.Port)
		o.add(p)
	}
}

// add makes p known. The caller holds the lock.
func (o *pendingDials) add(p *pendingDial) {
	if o.byFlow == nil {
		o.byFlow = make(map[flow.Tuple]*pendingDial)
	}
	if o.byFlow[p.tuple()] == nil { // or gVisor chose the port of a Handshake, whose client never is the gateway
		o.byFlow[p.tuple()] = p
	}
}

func (o *pendingDials) end(p *pendingDial) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.remove(p)
}

// remove forgets p. The caller holds the lock.
func (o *pendingDials) remove(p *pendingDial) {
	o.n--
	if o.byFlow[p.tuple()] == p {
		delete(o.byFlow, p.tuple())
	}
}

// fail ends the Dial of t, if there is one, with err.
func (o *pendingDials) fail(t flow.Tuple, err error) {
	o.mu.Lock()
	p := o.byFlow[t]
	o.mu.Unlock()
	switch {
	case p == nil:
	case p.hand != nil:
		p.hand.fail(err)
	default:
		select {
		case p.failed <- err:
		default: // it failed already
		}
	}
}

// dialled is a connection that Dial made.
type dialled struct {
	*guestConn
	stack *Stack
	gone  atomic.Bool
}

// OnReset calls do some time after the guest has reset the connection or is found dead,
// unless it is closed before. It is called at most once.
func (d *dialled) OnReset(do func()) { d.onReset(do) }

// Close implements flow.Conn.
func (d *dialled) Close() error {
	err := d.guestConn.Close()
	d.leave()
	return err
}

// Abort implements flow.Conn.
func (d *dialled) Abort() {
	d.guestConn.Abort()
	d.leave()
}

// leave gives back, once, what the connection counted for.
func (d *dialled) leave() {
	if !d.gone.Swap(true) {
		d.stack.left()
	}
}
