package forward

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/loop"
)

// Theory of operation.
//
// A pair joins two sockets: the guest's, which the kernel path accepted in the guest's
// namespace, or which a published port accepted on the host, and the one that was
// dialled for it. Both are descriptors of one event loop, and everything about a pair
// happens on its thread. There is no goroutine a flow, and an idle flow holds two
// descriptors and this struct.
//
// Each direction is read from one leg (src) and written to the other (dst):
//
//   - nothing is read that could not be written: while dst takes no more, src is left
//     alone, and its window closes. What the kernel did not take of one read stays with
//     dst (left, or a pipe) and goes first. So a flow holds at most one buffer or pipe
//     a direction, and only while it is blocked; of the large ones there are maxBlocks
//     and maxPipes for all flows.
//   - small messages are read into a buffer that all flows share and written from it:
//     two system calls. When a read brings smallRead bytes the flow is a bulk transfer;
//     after a few short reads it is treated as small again.
//   - the bytes of a bulk transfer go through a pipe with splice(2), which moves pages
//     instead of copying them, unless dst takes large segments, as sockets on loopback
//     do. A spliced segment has at most 17 pages of 4 KiB (MAX_SKB_FRAGS in
//     include/linux/skbuff.h, skb_splice_from_iter), and those pages are freed on a
//     processor that is often not the sender's, who then writes to memory that no cache
//     holds. Copies of readMost bytes leave in segments of up to 256 KiB (see
//     nsagent's widenLoopback), and both their pages and the sender's come back to who
//     filled them: a quarter more bytes in a second. See docs/benchmarks.md.
//   - a FIN (end of file on src) is passed on as shutdown(2) of dst when everything
//     before it has been written, and ends that direction only (RFC 9293 section 3.6).
//     The second FIN closes both sockets, which sends it.
//   - an error on either side resets both (SO_LINGER 0, socket(7)): a peer must not see
//     an orderly end of something that was cut off, and a reset leaves no TIME_WAIT to
//     use up the host's ports. An error is noticed even while nothing can be written:
//     epoll reports it whatever is asked for. Where a reset came behind data, whether it
//     is read or met by a write, the other side gets that data first, as long as it takes
//     it: a server that refuses an upload answers, and closes with what it did not read,
//     which is a reset right behind the answer.
//   - urgent data is read in line with all other, without its mark.
//
// A busy flow stops after turnRounds and is called again after the others.
//
// Measured on 2 cores against goroutines with Go's poller, see docs/paths.md.

const (
	// smallRead is how many bytes are read at once of what is no bulk transfer; a read
	// that brings as many makes it one.
	smallRead = 64 << 10
	// readMost is the size in bytes of the shared buffer, which a bulk transfer to a
	// socket with large segments fills. It should stay in a processor's second level
	// cache together with what is copied to and from it.
	readMost = 384 << 10
	// largeSegment is a maximum segment size in bytes that hardly any but loopback devices
	// have: their MTU is 64 KiB, and a connection of theirs begins with half of it
	// (include/net/tcp.h, tcp_bound_to_half_wnd).
	largeSegment = 16 << 10
	// bulkFloor is how many bytes a read of a bulk transfer brings at least; shortMost
	// of less in a row make it small again.
	bulkFloor = 16 << 10
	shortMost = 4
	// turnRounds bounds the reads of one direction in one turn: 8 MiB at most.
	turnRounds = 16
)

// pair is one joined flow.
type pair struct {
	s    *Sockets
	flow *flow.Flow
	legs [2]leg // guest, host
	over bool
	last *drain // the end of it, once one side was reset
}

// leg is one socket of a pair.
type leg struct {
	pair *pair
	fd   int
	ref  loop.Ref

	readable bool // there may be something to read
	writable bool // it may take more
	ended    bool // the kernel told of a FIN or an error: read on until it shows
	urgent   bool // there was urgent data: reads stop at its mark, splice(2) for good
	failed   bool // the socket has an error
	eof      bool // its FIN was read
	shut     bool // our FIN was sent to it
	bulk     bool // reads bring much
	short    uint8
	large    bool // it sends large segments: known while the other leg is bulk

	left []byte    // bytes for this socket that it did not take yet, nil without,
	buf  *flow.Buf // which are here,
	blk  *block    // or here
	pipe *pipe     // the same, in a pipe
}

// Ready implements loop.Handler.
func (l *leg) Ready(events uint32) bool {
	if events&(loop.Readable|loop.PeerShut|loop.HangUp|loop.Failed) != 0 {
		l.readable = true
	}
	if events&(loop.Writable|loop.HangUp|loop.Failed) != 0 {
		l.writable = true
	}
	if events&(loop.PeerShut|loop.HangUp|loop.Failed) != 0 {
		l.ended = true
	}
	if events&loop.Failed != 0 {
		l.failed = true
	}
	if events&loop.Urgent != 0 {
		l.urgent, l.readable = true, true
	}
	p := l.pair
	if p.last != nil {
		if l.failed && l == p.last.leg {
			p.abort()
		} else {
			p.last.look()
		}
		return false
	}
	o := p.other(l)
	more := p.pump(l, o)
	if !p.over && p.last == nil {
		more = p.pump(o, l) || more
	}
	if p.over || p.last != nil {
		return false
	}
	if l.bulk || o.bulk {
		p.s.loop.Calm()
	}
	if l.failed && !more { // and reading did not bring it up: the other side is blocked
		p.reset(o)
		return false
	}
	return more
}

func (p *pair) other(l *leg) *leg {
	if l == &p.legs[0] {
		return &p.legs[1]
	}
	return &p.legs[0]
}

// counter is where bytes that l sent are counted.
func (p *pair) counter(l *leg) *flow.Counter {
	if l == &p.legs[0] {
		return &p.flow.ToHost
	}
	return &p.flow.ToGuest
}

// pump carries src's bytes to dst as far as both allow, and reports whether it stopped
// only to give others a turn.
func (p *pair) pump(src, dst *leg) (more bool) {
	for range turnRounds {
		if !p.flush(src, dst) {
			return false
		}
		if src.eof {
			p.passEnd(dst)
			return false
		}
		if !src.readable || !dst.writable {
			return false
		}
		if !p.carry(src, dst) {
			return false
		}
	}
	return true
}

// watchAll is what a leg is watched for.
const watchAll = loop.Readable | loop.Writable | loop.PeerShut | loop.Urgent

// carry does one read and what follows from it; false ends the turn.
func (p *pair) carry(src, dst *leg) bool {
	if src.bulk && !src.urgent && p.s.splices(dst) {
		if pp := p.s.pipes.get(); pp != nil {
			return p.splice(src, dst, pp)
		}
	}
	return p.copy(src, dst)
}

// splices reports whether bulk transfers to dst are spliced. Half of the pipes are for those
// that are never copied.
func (s *Sockets) splices(dst *leg) bool {
	return !dst.large || !s.blocks.spare() && s.pipes.made <= maxPipes/2
}

// copy reads once and writes what it got.
func (p *pair) copy(src, dst *leg) bool {
	room := p.s.scratch[:smallRead]
	if src.bulk && dst.large && p.s.blocks.spare() {
		room = p.s.scratch[:]
	}
	n, errno := rawRead(src.fd, room)
	if errno != 0 || n == 0 {
		return p.readEnd(src, dst, errno)
	}
	p.sized(src, dst, n)
	b := room[:n]
	if n < len(room) && !src.ended && !src.urgent {
		src.readable = false // a short read has emptied the socket (epoll(7), Q9)
	}
	m, errno := rawWrite(dst.fd, b)
	switch {
	case errno == unix.EAGAIN, errno == unix.EINTR:
		m = 0
	case errno != 0:
		p.broken(dst)
		return false
	}
	if m > 0 {
		p.counter(src).Add(m)
	}
	if m < n {
		dst.writable = false
		p.keep(dst, b[m:])
	}
	return true
}

// sized decides by a read of n bytes whether src is a bulk transfer.
func (p *pair) sized(src, dst *leg, n int) {
	switch {
	case n >= bulkFloor:
		src.short = 0
		if n >= smallRead && !src.bulk {
			src.bulk = true
			size, err := unix.GetsockoptInt(dst.fd, unix.SOL_TCP, unix.TCP_MAXSEG)
			dst.large = err == nil && size >= largeSegment
		}
	case src.bulk:
		if src.short++; src.short >= shortMost {
			src.bulk = false
		}
	}
}

// keep keeps rest, the end of what is in scratch, for dst.
func (p *pair) keep(dst *leg, rest []byte) {
	if len(rest) > smallRead {
		dst.left, dst.blk, p.s.scratch = rest, p.s.scratch, p.s.blocks.take()
		return
	}
	dst.buf = p.s.f.pool.Get()
	dst.left = dst.buf.Room()[:copy(dst.buf.Room(), rest)]
}

// letGo gives back what holds bytes for l.
func (l *leg) letGo(s *Sockets) {
	if l.buf != nil {
		s.f.pool.Put(l.buf)
	}
	if l.blk != nil {
		s.blocks.put(l.blk)
	}
	if l.pipe != nil {
		s.pipes.put(l.pipe)
	}
	l.left, l.buf, l.blk, l.pipe = nil, nil, nil, nil
}

// splice reads once into pp and writes what it got.
func (p *pair) splice(src, dst *leg, pp *pipe) bool {
	n, errno := rawSplice(src.fd, pp.w, pipeBytes)
	if n == 0 && errno == 0 { // the end, or urgent data: read(2) knows
		p.s.pipes.put(pp)
		return p.copy(src, dst)
	}
	if errno != 0 {
		p.s.pipes.put(pp)
		return p.readEnd(src, dst, errno)
	}
	p.sized(src, dst, n)
	pp.n = n
	dst.pipe = pp
	return p.flush(src, dst) || !p.over && p.last == nil
}

// readEnd handles a read that brought nothing; it reports whether to go on.
func (p *pair) readEnd(src, dst *leg, errno syscall.Errno) bool {
	switch errno {
	case 0:
		src.eof = true // or the error was read already, and p.last is set
		p.flow.SetState(flow.HalfOpen)
		return true
	case unix.EAGAIN:
		src.readable = false
		return false
	case unix.EINTR:
		return true
	}
	src.eof = true
	p.reset(dst)
	return false
}

// flush writes what dst did not take before, and reports whether nothing is left.
func (p *pair) flush(src, dst *leg) bool {
	for dst.left != nil || dst.pipe != nil {
		if !dst.writable {
			return false
		}
		n, errno := dst.drain(p.s)
		switch {
		case errno == unix.EAGAIN:
			dst.writable = false
			return false
		case errno == unix.EINTR:
		case errno != 0:
			p.broken(dst)
			return false
		default:
			p.counter(src).Add(n)
		}
	}
	return true
}

// drain writes what is left once, and lets go of what holds it when it is empty.
func (l *leg) drain(s *Sockets) (int, syscall.Errno) {
	if l.pipe != nil {
		n, errno := rawSplice(l.pipe.r, l.fd, l.pipe.n)
		if errno != 0 {
			return 0, errno
		}
		if l.pipe.n -= n; l.pipe.n == 0 {
			s.pipes.put(l.pipe)
			l.pipe = nil
		}
		return n, 0
	}
	n, errno := rawWrite(l.fd, l.left)
	if errno != 0 {
		return 0, errno
	}
	if l.left = l.left[n:]; len(l.left) == 0 {
		l.letGo(s)
	}
	return n, 0
}

// passEnd ends the direction towards dst; after the second one the pair is over. A reset
// is p.last's to pass on.
func (p *pair) passEnd(dst *leg) {
	if dst.shut || p.last != nil {
		return
	}
	dst.shut = true
	if p.legs[0].shut && p.legs[1].shut {
		p.end()
		return
	}
	if rawShutdown(dst.fd) != 0 {
		p.broken(dst)
	}
}

// broken is what follows from a write that found dst reset. What dst sent before may be
// unread, and goes to the other side first.
func (p *pair) broken(dst *leg) {
	if p.last != nil { // and dst was to hear of the other's
		p.abort()
		return
	}
	dst.letGo(p.s)
	dst.readable, dst.ended = true, true
	p.reset(p.other(dst))
}

// abort resets both sides.
func (p *pair) abort() {
	if p.over {
		return
	}
	for i := range p.legs {
		lingerNone(p.legs[i].fd)
	}
	p.end()
}

// reset passes a reset on to dst, behind what was written to it.
func (p *pair) reset(dst *leg) {
	if p.last != nil {
		return
	}
	if dst.failed { // so was dst itself
		p.abort()
		return
	}
	src := p.other(dst)
	lingerNone(src.fd)
	p.last = &drain{pair: p, leg: dst, wait: drainLook, until: time.Now().Add(drainMost)}
	p.last.look()
}

// end closes both sockets and lets go of everything.
func (p *pair) end() {
	p.over = true
	if p.last != nil && p.last.timer != nil {
		p.last.timer.Stop()
	}
	for i := range p.legs {
		l := &p.legs[i]
		p.s.loop.Forget(l.ref)
		unix.Close(l.fd)
		l.letGo(p.s)
	}
	delete(p.s.pairs, p)
	if t := p.flow.Tuple; p.s.byTuple[t] == p {
		delete(p.s.byTuple, t)
	}
	p.s.f.close(p.flow)
}

// lingerNone turns the close of fd into a RST.
func lingerNone(fd int) {
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}
