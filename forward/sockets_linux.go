package forward

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/loop"
)

// Sockets replays flows whose guest side is a socket, too: it dials without blocking
// and joins descriptors, all on the thread of an event loop. But for Close, its methods
// must be called there.
type Sockets struct {
	f    *Forwarder
	loop *loop.Loop

	// of the loop's thread
	pairs   map[*pair]struct{}
	byTuple map[flow.Tuple]*pair // the youngest of each
	dials   map[*Dial]struct{}
	inbound map[*inboundDial]struct{}
	ports   map[*inboundPort]struct{}
	scratch *block // what all flows read into
	blocks  blocks
	pipes   pipes
	closed  bool
}

// NewSockets makes the Sockets of f on l. Close it before f and l.
func (f *Forwarder) NewSockets(l *loop.Loop) *Sockets {
	s := &Sockets{
		f: f, loop: l, scratch: new(block),
		pairs: make(map[*pair]struct{}), byTuple: make(map[flow.Tuple]*pair), dials: make(map[*Dial]struct{}),
		inbound: make(map[*inboundDial]struct{}), ports: make(map[*inboundPort]struct{}),
	}
	f.in.serve = s.serveInbound
	return s
}

// Close resets every flow and ends every dial. Further ones are refused.
func (s *Sockets) Close() {
	s.loop.Do(func() {
		s.closed = true
		for p := range s.ports {
			p.stop()
		}
		for d := range s.inbound {
			d.refuse(errClosing)
		}
		for d := range s.dials {
			d.Cancel()
		}
		for p := range s.pairs {
			p.abort()
		}
		s.pipes.close()
	})
}

// Dial is one connection attempt that is under way.
type Dial struct {
	s     *Sockets
	flow  *flow.Flow
	addrs []netip.AddrPort // still to be tried; the first is being dialled
	told  error            // the error to tell if no other address answers
	then  func(flow.Verdict)

	fd  int
	ref loop.Ref
}

// Begin decides about t and dials its target without blocking. then is called once
// with the verdict: before Begin returns, which then returns nil, or later on the
// loop's thread. A Host in the Verdict goes to Join, or to Relay, or is aborted.
func (s *Sockets) Begin(t flow.Tuple, then func(flow.Verdict)) *Dial {
	addrs, decision, err := s.f.policy.Route(t)
	if err != nil {
		then(s.f.denied(t, err))
		return nil
	}
	fl := &flow.Flow{Tuple: t, Decided: decision, Path: flow.Kernel, Dialled: addrs[0], Started: time.Now()}
	if s.closed || !s.f.open(fl) {
		then(flow.Verdict{Answer: flow.Silence}) // the guest will try again
		return nil
	}
	d := &Dial{s: s, flow: fl, addrs: addrs, then: then}
	s.dials[d] = struct{}{}
	if d.try() {
		return nil
	}
	return d
}

// try dials the addresses until one is connected, none is left, or the kernel needs
// time; it reports whether it is done.
func (d *Dial) try() bool {
	for len(d.addrs) > 0 {
		done, err := d.start(d.addrs[0])
		if err == nil {
			return done
		}
		d.fail(err)
	}
	d.end()
	d.s.f.close(d.flow)
	d.then(d.s.f.failed(d.flow.Tuple, d.told))
	return true
}

// start begins to connect to a. It reports whether the connection is there already, as
// it is when the target is on this machine.
func (d *Dial) start(a netip.AddrPort) (done bool, err error) {
	if d.fd, err = socketTCP(a.Addr()); err != nil {
		return false, &DialError{Target: a, Err: err}
	}
	if done, err = d.connect(a); done || err != nil {
		return done, err
	}
	d.ref, err = d.s.loop.Add(d.fd, loop.Writable, d)
	if err != nil {
		unix.Close(d.fd)
		return false, &DialError{Target: a, Err: errors.Unwrap(err)}
	}
	return false, nil
}

// connect asks the kernel how the connection is: a second connect(2) says EALREADY, or
// how the first one ended. On error the socket is closed.
func (d *Dial) connect(a netip.AddrPort) (done bool, err error) {
	sa := sockaddr(a)
	err = unix.Connect(d.fd, sa)
	if err == unix.EINPROGRESS {
		err = unix.Connect(d.fd, sa)
	}
	switch err {
	case nil, unix.EISCONN:
		d.connected(a)
		return true, nil
	case unix.EALREADY, unix.EINPROGRESS, unix.EINTR:
		return false, nil
	}
	err = dialError(d.fd, a, err)
	unix.Close(d.fd)
	return false, err
}

// connected hands the socket over.
func (d *Dial) connected(a netip.AddrPort) {
	d.end()
	setEstablished(d.fd, a.Addr())
	d.s.f.stats.connected.Add(1)
	d.flow.SetState(flow.Open)
	d.then(flow.Verdict{Answer: flow.Connect, Host: &heldHost{fd: d.fd}, Flow: d.flow})
}

// fail notes that the first address did not answer: a refusal tells more than "no such
// address" from a host without one of the families.
func (d *Dial) fail(err error) {
	if !errors.Is(d.told, syscall.ECONNREFUSED) {
		d.told = err
	}
	d.addrs = d.addrs[1:]
}

// Ready implements loop.Handler.
func (d *Dial) Ready(uint32) bool {
	a := d.addrs[0]
	ref := d.ref
	sa := sockaddr(a)
	err := unix.Connect(d.fd, sa)
	switch err {
	case unix.EALREADY, unix.EINPROGRESS, unix.EINTR:
		return false
	case nil, unix.EISCONN:
		d.s.loop.Remove(d.fd, ref)
		d.connected(a)
		return false
	}
	derr := dialError(d.fd, a, err)
	d.s.loop.Forget(ref)
	unix.Close(d.fd)
	d.fail(derr)
	d.try()
	return false
}

// Cancel ends the dial: then is called with Silence, if it was not called yet.
func (d *Dial) Cancel() {
	if _, ok := d.s.dials[d]; !ok {
		return
	}
	d.end()
	d.s.loop.Forget(d.ref)
	unix.Close(d.fd)
	d.s.f.close(d.flow)
	d.s.f.stats.cancelled.Add(1)
	d.then(flow.Verdict{Answer: flow.Silence})
}

func (d *Dial) end() { delete(d.s.dials, d) }

// Join joins guest, a connected socket that does not block, with v.Host, which Begin
// dialled. It takes over both.
func (s *Sockets) Join(guest int, v flow.Verdict) {
	host, ok := v.Host.(*heldHost).take()
	if !ok || s.closed {
		resetFD(guest)
		v.Host.Abort()
		s.f.close(v.Flow)
		return
	}
	if p := s.join(guest, host, v.Flow); !p.over {
		s.byTuple[v.Flow.Tuple] = p
	}
}

// join joins two sockets and takes over both, and fl.
func (s *Sockets) join(guest, host int, fl *flow.Flow) *pair {
	p := &pair{s: s, flow: fl}
	s.pairs[p] = struct{}{}
	for i, fd := range []int{guest, host} {
		p.legs[i] = leg{pair: p, fd: fd, writable: true}
	}
	for i := range p.legs {
		l := &p.legs[i]
		var err error
		// Adding reports at once what is there already.
		if l.ref, err = s.loop.Add(l.fd, watchAll, l); err != nil {
			p.abort()
			break
		}
	}
	return p
}

// resetFD closes a connected socket with a reset.
func resetFD(fd int) {
	lingerNone(fd)
	unix.Close(fd)
}

// Live reports whether t is a joined connection whose guest has not been reset: one that
// the guest began, or that Doors.Enter has made.
func (s *Sockets) Live(t flow.Tuple) bool {
	p := s.byTuple[t]
	return p != nil && p.last == nil
}

// heldHost is a connected host socket that belongs to nobody's poller yet: Join takes
// the descriptor, and a Relay that finds one makes it a hostConn.
type heldHost struct {
	flow.Conn // nil until open

	mu   sync.Mutex // guards the fields below
	fd   int
	gone bool // taken, opened or closed
}

// take returns the descriptor, which is then the caller's.
func (h *heldHost) take() (int, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gone {
		return -1, false
	}
	h.gone = true
	return h.fd, true
}

// open makes the Conn usable.
func (h *heldHost) open() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gone {
		return fmt.Errorf("open host socket: %w", unix.EBADF)
	}
	c, err := newHostConn(h.fd)
	if err != nil {
		return err
	}
	h.gone, h.Conn = true, c
	return nil
}

// Abort implements flow.Conn.
func (h *heldHost) Abort() {
	h.mu.Lock()
	c, mine := h.Conn, !h.gone
	h.gone = true
	h.mu.Unlock()
	switch {
	case c != nil:
		c.Abort()
	case mine:
		lingerNone(h.fd)
		unix.Close(h.fd)
	}
}
