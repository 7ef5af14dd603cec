package netstack

import (
	"crypto/rand"
	"encoding/binary"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// Handshake is the beginning of a Dial without gVisor, for a connection that goes on as a
// socket of the guest's namespace (stack/kernel). Its packets are written and read by
// hand:
//
//	SYN      written into the device, so that all rules of the guest apply to it as to
//	         any from a network; again after 1, 2, 4 ... s
//	SYN-ACK  told, and nothing is answered until end says how it goes on: by the ACK
//	         that completes the handshake, or by a RST
//	RST      a refusal, if it acknowledges the SYN
//	ACK      of another number belongs to an old connection of the guest's: it gets the
//	         RST that ends that (RFC 9293 section 3.5.1). The first is also followed by
//	         the SYN, for which there is room now: it is a server's in TIME_WAIT, where
//	         a client comes again from the same port before our timestamp has grown
//	ICMP     as for a Dial (icmperror.go)
//
// A guest's kernel may pass over the ACK that completes the handshake: its server has no
// room for another client, or wants data with it (TCP_DEFER_ACCEPT, tcp(7)). It then repeats
// the SYN-ACK, which the socket that has gone on never sees, and gets the same ACK again.
//
// All else that the guest sends of these four numbers meanwhile is dropped, a SYN of its
// own included. There is no limit in time but the caller's. An answer after the end
// is gVisor's, who knows nothing of it and answers with a RST.
//
// The four numbers belong to one at a time: a Handshake, a Dial, a SYN of the guest's, a
// connection of either path. Handshakes count as dials for MaxDials.
//
// What the guest's options say is believed as far as it can be true: the largest
// scale is 14, the smallest segment 48.

const (
	// handWindow and handScale are what a SYN announces: the most that goes without a
	// scale, and 32 MiB with, which is what a kernel lets windows grow to.
	handWindow = 65535
	handScale  = 9
	// mostCookieMSS is the least segment of a SYN with which a kernel that answers by SYN
	// cookies takes no window probe for the last ACK: the probe's number is one less, and in a
	// cookie that is the next larger of four segment sizes, if there is one (Linux: up to 1460
	// and 8940). Segments to the client are bounded by the guest's routes all the same.
	mostCookieMSS = 8940
	// synOptionsLen and ackOptionsLen are those of our segments.
	synOptionsLen = 20
	ackOptionsLen = 12
)

// handshake is one that is under way. What is guarded is by the pendingDials' mu.
type handshake struct {
	pendingDial
	s    *Stack
	isn  uint32
	then func(flow.Handshake, error)
	made flow.Handshake
	echo uint32 // the guest's timestamp
	old  bool   // an old connection was reset

	answered bool        // guarded
	over     bool        // guarded
	timer    *time.Timer // guarded
}

// Handshake begins a TCP handshake with the guest's port to, as if from were a host beyond
// the guest's default route. It needs a kernel path, and is called on its thread; so is
// then, later and at most once: when the guest has answered, or with an error as Dial's.
// end is called once, also after an error, on any thread: with true it completes the
// handshake, if the guest has answered; else it gives it up, and then is not called
// any more.
func (s *Stack) Handshake(from, to netip.AddrPort, then func(flow.Handshake, error)) (end func(done bool), err error) {
	k := &handshake{s: s, then: then}
	k.from, k.to, k.hand = from, to, k
	if err := s.enterHandshake(k); err != nil {
		return nil, &dialError{from, to, err}
	}
	k.writeSYN()
	return k.end, nil
}

// enterHandshake makes k known.
func (s *Stack) enterHandshake(k *handshake) error {
	t := k.tuple()
	if !s.canBeClient(k.from.Addr()) || k.from.Port() == 0 || k.from.Addr().Is4() != k.to.Addr().Is4() {
		return syscall.EADDRNOTAVAIL
	}
	if s.kernel.Live(t) || s.hasConnection(t) {
		return syscall.EADDRINUSE
	}
	var isn [4]byte
	rand.Read(isn[:])
	k.isn = binary.NativeEndian.Uint32(isn[:])
	s.dials.mu.Lock()
	defer s.dials.mu.Unlock()
	switch {
	case s.dials.closed:
		return syscall.ENETDOWN
	case s.dials.byFlow[t] != nil:
		return syscall.EADDRINUSE
	}
	return s.out.beginByHand(k, s.cfg.MaxDials)
}

// beginByHand counts k and makes it known.
func (o *pendingDials) beginByHand(k *handshake, most int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.beginLocked(&k.pendingDial, most); err != nil {
		return err
	}
	o.byHand.Add(1)
	k.repeat(firstRetry)
	return nil
}

// repeat writes the SYN again after gap, and then ever more rarely. The caller holds the
// lock.
func (k *handshake) repeat(gap time.Duration) {
	k.timer = time.AfterFunc(gap, func() {
		if k.again(gap) {
			k.writeSYN()
		}
	})
}

// again reports whether the guest has not answered.
func (k *handshake) again(gap time.Duration) bool {
	o := &k.s.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if k.over || k.answered {
		return false
	}
	k.repeat(2 * gap)
	return true
}

// end is what Handshake returns.
func (k *handshake) end(done bool) {
	over, answered := k.leave()
	switch {
	case over || !answered:
	case done:
		k.s.writeACK(&k.made, k.echo)
	default:
		k.s.writeSegment(k.from, k.to, header.TCPFields{SeqNum: k.made.Next, Flags: header.TCPFlagRst}, nil)
	}
}

// leave ends it, and reports whether it had ended, or else whether the guest has answered.
func (k *handshake) leave() (over, answered bool) {
	o := &k.s.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if k.over {
		return true, false
	}
	k.over = true
	k.timer.Stop()
	o.byHand.Add(-1)
	o.remove(&k.pendingDial)
	return false, k.answered
}

// fail tells err, if the guest has not answered.
func (k *handshake) fail(err error) {
	if k.isAnswered() {
		return
	}
	if over, _ := k.leave(); !over {
		k.then(flow.Handshake{}, &dialError{k.from, k.to, err})
	}
}

// isAnswered reports whether the guest has answered: the thread that calls us is the only
// one that changes it.
func (k *handshake) isAnswered() bool {
	k.s.out.mu.Lock()
	defer k.s.out.mu.Unlock()
	return k.answered
}

// byHand takes a segment of a handshake, and reports whether it was one.
func (s *Stack) byHand(t flow.Tuple, h header.TCP) bool {
	s.out.mu.Lock()
	p := s.out.byFlow[t]
	if p == nil || p.hand == nil {
		s.out.mu.Unlock()
		return false
	}
	s.out.mu.Unlock()
	if !p.hand.isAnswered() {
		p.hand.take(h)
	}
	return true
}

// take takes the guest's answer.
func (k *handshake) take(h header.TCP) {
	const syn, ack, rst = header.TCPFlagSyn, header.TCPFlagAck, header.TCPFlagRst
	flags := h.Flags()
	mine := flags&ack != 0 && h.AckNumber() == k.isn+1
	switch {
	case flags&rst != 0:
		if mine {
			k.fail(syscall.ECONNREFUSED)
		}
	case flags&ack != 0 && !mine:
		k.s.writeSegment(k.from, k.to, header.TCPFields{SeqNum: h.AckNumber(), Flags: rst}, nil)
		if !k.old { // once: it may not heed the RST (net.ipv4.tcp_rfc1337)
			k.old = true
			k.writeSYN()
		}
	case flags&syn != 0 && mine:
		if k.s.wellFormed(h) {
			k.answer(h)
		}
	}
}

// wellFormed reports whether h's options are in h; it counts it if not.
func (s *Stack) wellFormed(h header.TCP) bool {
	end := int(h.DataOffset())
	if end < header.TCPMinimumSize || end > len(h) {
		s.stats.malformed.Add(1)
		return false
	}
	return true
}

// answer notes what the SYN-ACK h says, and tells it.
func (k *handshake) answer(h header.TCP) {
	o := header.ParseSynOptions(h.Options(), true)
	k.made = flow.Handshake{
		Client: k.from, Guest: k.to,
		Next: k.isn + 1, GuestNext: h.SequenceNumber() + 1,
		Window: handWindow, GuestWindow: uint32(h.WindowSize()),
		GuestMSS: o.MSS, SACK: o.SACKPermitted, Timestamps: o.TS, Clock: k.s.tcpClock(),
	}
	if o.WS >= 0 {
		k.made.Scale, k.made.GuestScale = handScale, uint8(o.WS)
	}
	k.echo = o.TSVal
	k.s.out.mu.Lock()
	over := k.over
	k.answered = true
	k.s.out.mu.Unlock()
	if !over {
		k.then(k.made, nil)
	}
}

// tcpClock is our timestamp: one clock for all, so that a guest that remembers an old
// connection of these numbers takes a new one for new (RFC 6191). Its last bit means
// microseconds to kernels (TCP_TIMESTAMP since Linux 6.7).
func (s *Stack) tcpClock() uint32 {
	return (s.clockBase + uint32(time.Since(s.clockStart).Milliseconds())) &^ 1
}

// writeSYN writes the SYN.
func (k *handshake) writeSYN() {
	mss := max(k.s.cfg.Link.MTU()-ipHeaderLen(k.to.Addr())-header.TCPMinimumSize, mostCookieMSS)
	var b [synOptionsLen]byte
	n := header.EncodeMSSOption(uint32(mss), b[:])
	n += header.EncodeSACKPermittedOption(b[n:])
	n += header.EncodeTSOption(k.s.tcpClock(), 0, b[n:])
	n += header.EncodeNOP(b[n:])
	header.EncodeWSOption(handScale, b[n:])
	k.s.writeSegment(k.from, k.to, header.TCPFields{SeqNum: k.isn, Flags: header.TCPFlagSyn, WindowSize: handWindow}, b[:])
}

// completeAgain answers a SYN-ACK that the guest has repeated although t is a connection.
// Its timestamp is the last one that the guest has seen, so that none of the socket's is older.
func (s *Stack) completeAgain(t flow.Tuple, h header.TCP) {
	if !s.wellFormed(h) {
		return
	}
	o := header.ParseSynOptions(h.Options(), true)
	m := flow.Handshake{
		Client: t.Target, Guest: t.Guest, Next: h.AckNumber(), GuestNext: h.SequenceNumber() + 1,
		Window: handWindow, Timestamps: o.TS, Clock: o.TSEcr,
	}
	if o.WS >= 0 {
		m.Scale = handScale
	}
	s.writeACK(&m, o.TSVal)
}

// writeACK writes the last segment of the handshake m, in which the guest's timestamp was echo.
func (s *Stack) writeACK(m *flow.Handshake, echo uint32) {
	var b [ackOptionsLen]byte
	options := b[:0]
	if m.Timestamps {
		n := header.EncodeNOP(b[:])
		n += header.EncodeNOP(b[n:])
		header.EncodeTSOption(m.Clock, echo, b[n:])
		options = b[:]
	}
	s.writeSegment(m.Client, m.Guest, header.TCPFields{
		SeqNum: m.Next, AckNum: m.GuestNext, Flags: header.TCPFlagAck, WindowSize: uint16(m.Window >> m.Scale),
	}, options)
}
