package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/loop"
)

// errClosing says that Sockets were closed.
var errClosing = errors.New("slipway is stopping")

// unpaced is the congestion control of connections that stay on this host. One that paces,
// as bbr does where it is the host's default, has the other side wait: half as fast again
// without, in bulk to a client.
const unpaced = "cubic"

// acceptTurn is how many clients one listener may bring in one turn of the loop.
const acceptTurn = 16

// inboundPort is a published port on the loop.
type inboundPort struct {
	s   *Sockets
	ln  *net.TCPListener
	raw syscall.RawConn
	in  *Inbound

	// of the loop's thread
	ref   loop.Ref
	rest  resting
	timer *time.Timer // while it rests
	over  bool

	// what accept found
	accept func(fd uintptr)
	fd     int
	peer   netip.AddrPort
	errno  syscall.Errno
}

// serveInbound is ServeTCP on the loop.
func (s *Sockets) serveInbound(ln *net.TCPListener, in *Inbound) (io.Closer, error) {
	raw, err := ln.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("publish %v: %w", ln.Addr(), err)
	}
	p := &inboundPort{s: s, ln: ln, raw: raw, in: in}
	p.accept = func(fd uintptr) { p.fd, p.peer, p.errno = acceptFD(int(fd)) }
	err = loop.ErrClosed
	s.loop.Do(func() {
		if !s.closed {
			err = p.start()
		}
	})
	if err != nil {
		return nil, fmt.Errorf("publish %v: %w", ln.Addr(), err)
	}
	return p, nil
}

// start begins to accept.
func (p *inboundPort) start() error {
	var err error
	cerr := p.raw.Control(func(fd uintptr) {
		clientOptions(int(fd))
		p.ref, err = p.s.loop.Add(int(fd), loop.Readable, p)
	})
	if err = errors.Join(cerr, err); err == nil {
		p.s.ports[p] = struct{}{}
	}
	return err
}

// clientOptions sets what accepted sockets inherit. Failing to set an option costs its
// comfort, not the port.
func clientOptions(listener int) {
	unix.SetsockoptInt(listener, unix.SOL_TCP, unix.TCP_NODELAY, 1)
	setKeepAlive(listener)
}

// Close implements io.Closer.
func (p *inboundPort) Close() error {
	p.s.loop.Do(p.stop)
	return nil
}

// stop accepts no more.
func (p *inboundPort) stop() {
	if p.over {
		return
	}
	p.over = true
	delete(p.s.ports, p)
	if p.timer != nil {
		p.timer.Stop()
	}
	if p.raw.Control(func(fd uintptr) { p.s.loop.Remove(int(fd), p.ref) }) != nil {
		p.s.loop.Forget(p.ref) // it was closed before us
	}
}

// Ready implements loop.Handler.
func (p *inboundPort) Ready(uint32) bool {
	if p.timer != nil {
		return false
	}
	for range acceptTurn {
		if p.raw.Control(p.accept) != nil {
			return false // closed, and stop comes
		}
		if p.errno == 0 && p.fd > maxFD() { // the rest of us needs those that are left
			resetFD(p.fd)
			p.errno = unix.EMFILE
		}
		switch p.errno {
		case 0:
			p.rest.reset()
			p.s.welcome(p.fd, p.peer, p.in)
			continue
		case unix.EAGAIN:
			return false
		}
		p.s.f.acceptFailed(p.in, p.ln.Addr(), p.errno)
		if !passing(p.errno) {
			p.restAWhile()
			return false
		}
	}
	return true
}

// restAWhile leaves clients in the queue until accepting may work again.
func (p *inboundPort) restAWhile() {
	p.timer = time.AfterFunc(p.rest.next(), func() {
		p.s.loop.Post(func() {
			if !p.over {
				p.timer = nil
				p.s.loop.Again(p.ref)
			}
		})
	})
}

// inboundDial is a client on the loop whose guest is being connected.
type inboundDial struct {
	s       *Sockets
	in      *Inbound
	client  netip.AddrPort
	conn    int // the client's socket
	passage passage
	waits   netip.AddrPort // what it counts for, see Ends.port
	flow    *flow.Flow     // of this try, or nil

	byDial bool   // the wire is to be taken by Doors.Dial
	leave  func() // ends an Enter; nil without

	guest int // the guest's socket, or -1
	ref   loop.Ref
	timer *time.Timer
	over  bool
}

// welcome serves a new client on the loop, or has a goroutine do it if its way is the wire
// and no socket's.
func (s *Sockets) welcome(conn int, addr netip.AddrPort, in *Inbound) {
	count(in.Count.Clients)
	if addr.Addr().IsLoopback() {
		unix.SetsockoptString(conn, unix.SOL_TCP, unix.TCP_CONGESTION, unpaced)
	}
	p := in.passage(flow.TCP, addr, s.f.in.doors)
	d := &inboundDial{s: s, in: in, client: addr, conn: conn, passage: p, waits: s.f.in.doors.Ends().port(p.to), guest: -1}
	if p.way == Wire && !d.enters() {
		d.toGoroutine()
		return
	}
	if !s.f.in.dials.take(d.waits) {
		s.f.refused(addr, in, p, errDialLimit)
		resetFD(conn)
		return
	}
	s.inbound[d] = struct{}{}
	d.try()
}

// toGoroutine hands the client over.
func (d *inboundDial) toGoroutine() {
	c, err := clientOf(d.conn, d.client)
	if err != nil {
		resetFD(d.conn)
		return
	}
	f, in, p := d.s.f, d.in, d.passage
	if !f.in.run(func(ctx context.Context) { f.serveClient(ctx, c, in, p) }) {
		c.conn.Abort()
	}
}

// try goes the way that the passage says.
func (d *inboundDial) try() {
	switch {
	case d.passage.way == NoWay:
		d.refuse(errNoWay)
		return
	case d.passage.way == Wire && !d.enters():
		d.end()
		d.toGoroutine()
		return
	}
	d.flow = d.s.f.publishedFlow(d.client, d.passage)
	d.flow.Path = flow.Kernel
	if !d.s.f.open(d.flow) {
		d.flow = nil
		d.refuse(errFlowLimit)
		return
	}
	fd, err := d.s.f.in.doors.Socket(d.passage.kind(), false)
	if errors.Is(err, ErrNoneReady) {
		d.await()
		return
	}
	d.connect(fd, err)
}

// enters reports whether the wire leads to a socket in the client's place.
func (d *inboundDial) enters() bool {
	return !d.byDial && d.passage.from.Port() != 0 && d.s.f.in.doors.Enters(d.passage.to)
}

// kind is the kind of socket for the way.
func (p passage) kind() SocketKind {
	k := SocketTCP4
	if p.way != Plain {
		k = SocketTransparent4
	}
	return k.forFamily(p.to.Addr())
}

// await waits for a socket elsewhere.
func (d *inboundDial) await() {
	kind := d.passage.kind()
	ok := d.s.f.in.run(func(context.Context) {
		fd, err := d.s.f.in.doors.Socket(kind, true)
		if !d.s.loop.Post(func() { d.connect(fd, err) }) && err == nil {
			unix.Close(fd)
		}
	})
	if !ok {
		d.refuse(errClosing)
	}
}

// connect dials with fd, which err says why it is not there.
func (d *inboundDial) connect(fd int, err error) {
	if d.over {
		if err == nil {
			unix.Close(fd)
		}
		return
	}
	if err == nil && fd > maxFD() { // the rest of us needs those that are left
		unix.Close(fd)
		err = unix.EMFILE
	}
	if err != nil {
		d.failed(&socketError{err})
		return
	}
	d.guest = fd
	if d.passage.way == Wire {
		d.limit()
		if d.leave, err = d.s.f.in.doors.Enter(fd, d.passage.from, d.passage.to, d.entered); err != nil {
			d.failed(err)
		}
		return
	}
	if err := bindFrom(fd, d.passage); err != nil {
		d.failed(err)
		return
	}
	to := sockaddr(d.passage.to)
	err = unix.Connect(fd, to)
	if err == unix.EINPROGRESS {
		err = unix.Connect(fd, to) // on one machine it is often there already
	}
	switch err {
	case nil, unix.EISCONN:
		d.connected()
		return
	case unix.EALREADY, unix.EINPROGRESS, unix.EINTR:
	default:
		d.failed(err)
		return
	}
	if d.ref, err = d.s.loop.Add(fd, loop.Writable, d); err != nil {
		d.failed(err)
		return
	}
	d.limit()
}

// limit bounds how long the guest may take.
func (d *inboundDial) limit() {
	var timer *time.Timer
	timer = time.AfterFunc(d.s.f.in.patienceWith(d.passage), func() {
		d.s.loop.Post(func() {
			if d.timer == timer { // else this try is over
				d.failed(os.ErrDeadlineExceeded)
			}
		})
	})
	d.timer = timer
}

// entered is told how an Enter went.
func (d *inboundDial) entered(err error) {
	d.leave = nil
	if err != nil {
		d.failed(err)
		return
	}
	d.connected()
}

// bindFrom gives fd the source address of p, if there is one.
func bindFrom(fd int, p passage) error {
	if !p.from.IsValid() {
		return nil
	}
	return unix.Bind(fd, sockaddr(p.from))
}

// Ready implements loop.Handler.
func (d *inboundDial) Ready(uint32) bool {
	switch err := unix.Connect(d.guest, sockaddr(d.passage.to)); err {
	case unix.EALREADY, unix.EINPROGRESS, unix.EINTR:
	case nil, unix.EISCONN:
		d.s.loop.Remove(d.guest, d.ref)
		d.ref = loop.Ref{}
		d.connected()
	default:
		d.failed(err)
	}
	return false
}

// connected joins both.
func (d *inboundDial) connected() {
	if d.in.Proxy {
		header := proxyHeader(d.client, localAddr(d.conn))
		if n, errno := rawWrite(d.guest, header); n != len(header) { // a new socket takes it
			d.refuse(errno)
			return
		}
	}
	if d.passage.why != "" {
		count(d.in.Count.Gateway)
	}
	d.end()
	d.flow.SetState(flow.Open)
	if p := d.s.join(d.guest, d.conn, d.flow); d.passage.way == Wire && !p.over {
		d.s.byTuple[d.flow.Tuple] = p
	}
}

// failed tries the next way, if there is one, and else resets the client.
func (d *inboundDial) failed(err error) {
	next := d.passage
	noEntry := errors.Is(err, ErrNoEntry)
	if !noEntry {
		next = d.in.after(d.passage, err, flow.TCP, d.client, d.s.f.in.doors)
	}
	if next.way == NoWay {
		d.refuse(err)
		return
	}
	d.letGo()
	d.passage, d.byDial = next, noEntry
	d.try()
}

// letGo ends one try.
func (d *inboundDial) letGo() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.leave != nil {
		d.leave()
		d.leave = nil
	}
	if d.guest >= 0 {
		d.s.loop.Forget(d.ref)
		unix.Close(d.guest)
		d.guest = -1
	}
	if d.flow != nil {
		d.s.f.close(d.flow)
		d.flow = nil
	}
}

// refuse resets the client.
func (d *inboundDial) refuse(err error) {
	if d.over {
		return
	}
	d.letGo()
	d.end()
	d.s.f.refused(d.client, d.in, d.passage, err)
	resetFD(d.conn)
}

// end takes it off the list of those that wait.
func (d *inboundDial) end() {
	d.over = true
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	delete(d.s.inbound, d)
	d.s.f.in.dials.give(d.waits)
}

// acceptClient takes a connection from the queue of ln, which Go's poller watches.
func acceptClient(ln *net.TCPListener) (client, error) {
	c, err := ln.AcceptTCP()
	if err != nil {
		return client{}, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return client{}, err
	}
	fd := -1
	cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(cerr, err); err == nil && fd > maxFD() {
		err = unix.EMFILE // the rest of us needs those that are left
	}
	if err != nil {
		c.SetLinger(0)
		unix.Close(fd)
		return client{}, err
	}
	unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 1)
	setKeepAlive(fd)
	peer := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	accepted, err := clientOf(fd, netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()))
	if err != nil {
		resetFD(fd)
	}
	return accepted, err
}

// clientOf makes a client of an accepted socket, which stays the caller's on error.
func clientOf(fd int, peer netip.AddrPort) (client, error) {
	at := localAddr(fd)
	c, err := newHostConn(fd)
	return client{conn: c, addr: peer, at: at}, err
}

// dialInside connects a socket of the guest's namespace.
func dialInside(ctx context.Context, doors Doors, p passage) (flow.Conn, error) {
	fd, err := doors.Socket(p.kind(), true)
	if err == nil && fd > maxFD() {
		unix.Close(fd)
		err = unix.EMFILE
	}
	if err != nil {
		return nil, &socketError{err}
	}
	if err = bindFrom(fd, p); err == nil {
		err = unix.Connect(fd, sockaddr(p.to))
	}
	if err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return nil, &DialError{Target: p.to, Err: err}
	}
	c, cerr := newHostConn(fd)
	if cerr != nil {
		unix.Close(fd)
		return nil, &socketError{cerr}
	}
	if err == unix.EINPROGRESS {
		if err := c.waitConnected(ctx, p.to); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}
