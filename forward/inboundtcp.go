package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// The clients of a published port come from a listening socket of the host. For each one
// a passage is chosen (inbound.go), the guest is connected, and both connections are
// joined as those of any flow. The host's kernel has answered the client before we
// know of it, so all that is left for a guest that refuses, or does not answer within
// inboundPatience, is to reset the client.
//
// There are two datapaths:
//
//   - on the event loop (inboundtcp_linux.go): accept, connect and relay on the one thread
//     of the kernel path, for ways that lead by a socket of the guest's namespace: the
//     wire, too, where a socket can take the client's place (Doors.Enter);
//   - on goroutines (here): one that accepts, and one for each client, which goes on as a
//     Relay. It serves the way by the wire, which is gVisor's, and everything where there
//     is no loop. A client of the loop who cannot enter is handed over to one.
//
// Where a way turns out not to be open (the client's port is connected already, no socket
// or port is to be had; from within nobody answers for withinPatience, as the guest's rules
// may want) the next one is taken, see passage.otherwise. A guest that
// refuses has refused, but for a server that is of the other family only, see
// Inbound.second.
//
// Limits: as many flows as guests may begin, Config.MaxTCP, of which one client address
// has two thirds; Config.MaxDials that are being connected, two thirds of them to one
// port of a container, or of the engine's own addresses, so that one that is dead does not stop
// the others. Doors.Dial must take as many. Beyond
// them clients are reset and counted. When accept(2) fails for want of something the
// listener rests, 10 ms to 1 s, and clients wait in its queue.
//
// What is not handled: a client that gives up while the guest is being connected is
// noticed only when that is done.

const (
	inboundPatience = 10 * time.Second
	// withinPatience is that of a way inside the guest which has another behind it: the
	// kernel has repeated its SYN, after 1 s, to no avail.
	withinPatience = 1500 * time.Millisecond
	// inboundDials bounds the connections that the guest has not answered yet, where
	// Config.MaxDials does not.
	inboundDials = 4096
	// The listener rests that long after a failed accept, doubled each time.
	restFirst, restMost = 10 * time.Millisecond, time.Second
)

// errNoDoors says that nothing can be published.
var errNoDoors = errors.New("there is no way into the guest")

// inbounds is what a Forwarder has of published ports.
type inbounds struct {
	doors Doors                  // or nil: nothing is published
	flows *share[netip.Addr]     // by the client
	dials *share[netip.AddrPort] // by what is reached, see Ends.port
	// patience is how long the guest may take to answer.
	patience time.Duration
	// serve listens on an event loop, where there is one.
	serve func(*net.TCPListener, *Inbound) (io.Closer, error)

	mu      sync.Mutex // guards the fields below
	closed  bool
	ctx     context.Context // of all that follow from a client, until close
	cancel  context.CancelFunc
	workers sync.WaitGroup
}

func newInbounds(most, dials int) *inbounds {
	in := &inbounds{flows: newShare[netip.Addr](most), dials: newShare[netip.AddrPort](dials), patience: inboundPatience}
	in.ctx, in.cancel = context.WithCancel(context.Background())
	return in
}

// patienceWith is how long the guest may take by the way of p.
func (i *inbounds) patienceWith(p passage) time.Duration {
	if p.within() {
		return min(i.patience, withinPatience)
	}
	return i.patience
}

// run starts f, unless it is too late; close waits for it.
func (i *inbounds) run(f func(context.Context)) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return false
	}
	i.workers.Go(func() { f(i.ctx) })
	return true
}

// close ends everything but relays.
func (i *inbounds) close() {
	i.mu.Lock()
	i.closed = true
	i.mu.Unlock()
	i.cancel()
	i.workers.Wait()
}

// ServeTCP carries the clients of ln until the Closer is closed, or ln is. ln stays the
// caller's; its clients that are connected then go on. The Closer must not be
// closed on the loop's thread.
func (f *Forwarder) ServeTCP(ln *net.TCPListener, in *Inbound) (io.Closer, error) {
	switch {
	case f.in.doors == nil:
		return nil, fmt.Errorf("publish %v: %w", ln.Addr(), errNoDoors)
	case f.in.serve != nil:
		return f.in.serve(ln, in)
	}
	return f.acceptInbound(ln, in)
}

// acceptor accepts on a goroutine.
type acceptor struct {
	f    *Forwarder
	ln   *net.TCPListener
	in   *Inbound
	stop context.CancelFunc
	done chan struct{}
}

func (f *Forwarder) acceptInbound(ln *net.TCPListener, in *Inbound) (io.Closer, error) {
	a := &acceptor{f: f, ln: ln, in: in, done: make(chan struct{})}
	ctx, stop := context.WithCancel(f.in.ctx)
	a.stop = stop
	if !f.in.run(func(context.Context) { a.run(ctx) }) {
		stop()
		return nil, fmt.Errorf("publish %v: %w", ln.Addr(), net.ErrClosed)
	}
	return a, nil
}

// Close implements io.Closer.
func (a *acceptor) Close() error {
	a.stop()
	<-a.done
	return nil
}

// run accepts until ctx ends.
func (a *acceptor) run(ctx context.Context) {
	defer close(a.done)
	defer a.stop()
	defer context.AfterFunc(ctx, func() { a.ln.SetDeadline(time.Unix(1, 0)) })()
	rest := resting{}
	for ctx.Err() == nil {
		c, err := acceptClient(a.ln)
		switch {
		case err == nil:
			rest.reset()
			a.f.welcome(c, a.in)
		case ctx.Err() != nil, errors.Is(err, net.ErrClosed):
			return
		default:
			a.f.acceptFailed(a.in, a.ln.Addr(), err)
			if !passing(err) {
				rest.sleep(ctx)
			}
		}
	}
}

// passing reports whether an error of accept(2) is about one client only.
func passing(err error) bool {
	return errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINTR)
}

// acceptFailed counts a failed accept, and says so now and then.
func (f *Forwarder) acceptFailed(in *Inbound, addr net.Addr, err error) {
	count(in.Count.Errors)
	if f.wants.Allow() {
		f.log.Warn("accept failed", slog.String("port", addr.String()), slog.Any("err", err))
	}
}

// resting is how long a listener rests.
type resting struct{ d time.Duration }

func (r *resting) reset() { r.d = 0 }

// next returns the next rest.
func (r *resting) next() time.Duration {
	r.d = min(max(2*r.d, restFirst), restMost)
	return r.d
}

func (r *resting) sleep(ctx context.Context) {
	t := time.NewTimer(r.next())
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// client is one accepted connection.
type client struct {
	conn flow.Conn
	addr netip.AddrPort // its own
	at   netip.AddrPort // the address of the host that it asked
}

// welcome serves a client on a goroutine of its own.
func (f *Forwarder) welcome(c client, in *Inbound) {
	count(in.Count.Clients)
	if !f.in.run(func(ctx context.Context) { f.serveClient(ctx, c, in, in.passage(flow.TCP, c.addr, f.in.doors)) }) {
		c.conn.Abort()
	}
}

// serveClient connects the guest and relays, beginning with the way of p.
func (f *Forwarder) serveClient(ctx context.Context, c client, in *Inbound, p passage) {
	waits := f.in.doors.Ends().port(p.to)
	if !f.in.dials.take(waits) {
		f.refuse(c, in, p, errDialLimit)
		return
	}
	guest, fl, err := f.enter(ctx, c.addr, in, &p)
	f.in.dials.give(waits)
	if err == nil && in.Proxy {
		if _, err = guest.Write(proxyHeader(c.addr, c.at)); err != nil {
			guest.Abort()
			f.close(fl)
		}
	}
	if err != nil {
		f.refuse(c, in, p, err)
		return
	}
	if p.why != "" {
		count(in.Count.Gateway)
	}
	fl.SetState(flow.Open)
	if r, ok := guest.(resetTeller); ok {
		r.OnReset(func() {
			guest.Abort()
			c.conn.Abort()
		})
	}
	f.Relay(ctx, guest, flow.Verdict{Answer: flow.Connect, Host: c.conn, Flow: fl})
}

// resetTeller is a Conn that tells of the guest's reset also while nobody reads: a relay
// whose client takes nothing waits in a write.
type resetTeller interface{ OnReset(do func()) }

// Why a client is reset without asking the guest.
var (
	errDialLimit = errors.New("too many clients wait for the guest")
	errFlowLimit = errors.New("too many connections")
	errNoWay     = errors.New("no way leads there")
)

// enter connects the guest by the way of p, or the next ones. It leaves in p the one that
// was taken, whose flow is then in the table, or the last.
func (f *Forwarder) enter(ctx context.Context, client netip.AddrPort, in *Inbound, p *passage) (flow.Conn, *flow.Flow, error) {
	ctx, cancel := context.WithTimeout(ctx, f.in.patience)
	defer cancel()
	if p.way == NoWay {
		return nil, nil, errNoWay
	}
	for {
		fl := f.publishedFlow(client, *p)
		if !f.open(fl) {
			return nil, nil, errFlowLimit
		}
		conn, err := f.enterBy(ctx, *p)
		if err == nil {
			return conn, fl, nil
		}
		f.close(fl)
		next := in.after(*p, err, flow.TCP, client, f.in.doors)
		if next.way == NoWay || ctx.Err() != nil {
			return nil, nil, err
		}
		*p = next
	}
}

// enterBy connects the guest by one way.
func (f *Forwarder) enterBy(ctx context.Context, p passage) (flow.Conn, error) {
	if p.way == Wire {
		return f.in.doors.Dial(ctx, p.from, p.to)
	}
	ctx, cancel := context.WithTimeout(ctx, f.in.patienceWith(p))
	defer cancel()
	return dialInside(ctx, f.in.doors, p)
}

// socketError says that there was no socket of the guest to dial with.
type socketError struct{ err error }

func (e *socketError) Error() string { return "open a socket in the guest: " + e.err.Error() }
func (e *socketError) Unwrap() error { return e.err }

// closedWay reports whether err is about a way into the guest, not about who is there.
func closedWay(err error) bool {
	var none *socketError
	return errors.As(err, &none) || errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EADDRNOTAVAIL)
}

// publishedFlow is the entry of a client.
func (f *Forwarder) publishedFlow(client netip.AddrPort, p passage) *flow.Flow {
	path := flow.Kernel
	if p.way == Wire {
		path = flow.Netstack
	}
	return &flow.Flow{
		Tuple:   flow.Tuple{Proto: flow.TCP, Guest: p.to, Target: client},
		Decided: flow.Published, Reason: p.why, Path: path, Dialled: p.to, Started: time.Now(),
	}
}

// refuse resets a client whom the guest does not serve.
func (f *Forwarder) refuse(c client, in *Inbound, p passage, err error) {
	f.refused(c.addr, in, p, err)
	c.conn.Abort()
}

func (f *Forwarder) refused(client netip.AddrPort, in *Inbound, p passage, err error) {
	count(in.Count.Refused)
	why := p.why
	if err != nil {
		why = err.Error()
	}
	f.log.Debug("client of a published port was reset", slog.Any("client", client), slog.Any("guest", p.to), slog.String("err", why))
}

// proxyHeader is a PROXY protocol header of version 2.
func proxyHeader(client, at netip.AddrPort) []byte {
	h := proxyproto.HeaderProxyFromAddrs(2, net.TCPAddrFromAddrPort(client), net.TCPAddrFromAddrPort(at))
	b, err := h.Format()
	if err != nil { // only for addresses that are none
		return nil
	}
	return b
}

// limited counts what was refused for want of room.
func (i *inbounds) limited() uint64 {
	return i.flows.refused.Load() + i.flows.refusedGuest.Load() + i.dials.refused.Load() + i.dials.refusedGuest.Load()
}
