package forward

import (
	"github.com/slipway-net/slipway/internal/loop"
)

// eventLoop serves the sockets of pollers on a loop's thread, with one batch for all.
type eventLoop struct {
	loop *loop.Loop

	// of the loop's thread
	rx   *recvBatch
	more bool // the socket being served wants another turn
	refs map[pollable]loop.Ref
}

// UseLoop has l's thread receive for the sockets of UDP mappings and pings. It is called
// before the first datagram.
func (f *Forwarder) UseLoop(l *loop.Loop) {
	on := &eventLoop{loop: l, rx: newRecvBatch(), refs: make(map[pollable]loop.Ref)}
	if u, ok := f.udp.sockets.(*hostUDPSockets); ok {
		u.poll.on = on
	}
	if p, ok := f.pings.sockets.(*hostPingSockets); ok {
		p.poll.on = on
	}
}

// polled is one socket on the loop.
type polled struct {
	on     *eventLoop
	socket pollable
}

// Ready implements loop.Handler.
func (p polled) Ready(events uint32) bool {
	p.on.more = false
	p.socket.ready(events, p.on.rx)
	return p.on.more
}

// add starts to receive from fd. It is called on the loop's thread, where the guest's
// datagrams are read.
func (e *eventLoop) add(fd int, s pollable) error {
	ref, err := e.loop.Add(fd, loop.Readable, polled{e, s})
	if err == nil {
		e.refs[s] = ref
	}
	return err
}

// remove stops to receive for s, whose descriptor the caller closes next. Its number may
// be another's by the time it is forgotten; the Ref is not.
func (e *eventLoop) remove(s pollable) {
	forget := func() {
		e.loop.Forget(e.refs[s])
		delete(e.refs, s)
	}
	if e.loop.Inside() {
		forget()
		return
	}
	e.loop.Post(forget)
}
