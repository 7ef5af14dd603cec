package kernel

import (
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/loop"
	"github.com/slipway-net/slipway/stack/link"
)

// Theory of operation.
//
// A guest's SYN has passed all of the guest's own rules when it leaves by the TUN. Once
// its target is connected, the very same packet is written back into the TUN. The rules
// of the agent (internal/nsagent) know it: a SYN that comes in by the TUN for an address
// that is not local is given to our listener (nft tproxy), and every later packet of a
// connection that a transparent socket has stays in the guest's kernel. The listener is
// transparent (IP_TRANSPARENT, ip(7)), so the accepted socket's own address is the
// target, its peer is the guest, and together they say which SYN it answers. No packet
// after the SYN is seen by us.
//
// The write runs the guest's receive path to its end: when it returns, the SYN-ACK has
// been sent and usually answered, and accept(2) finds the connection at once. Where it
// does not, the listener is watched meanwhile. If nothing was accepted after answerTime the guest
// never will complete the handshake: its own rules drop the SYN on INPUT or the SYN-ACK
// on OUTPUT, which a router's packets would not pass; or it forged its address. The
// caller then answers by other means.
//
// The listener is bound to the gateway's address, which is not local in the guest: no
// guest can reach it but by a SYN that we wrote. What is accepted without having been
// written is reset.
//
// Everything happens on the thread of one event loop.

// answerTime is how long a handshake may take. It has no wire in it, only the guest's
// kernel; the time is for a machine that is busy with other things.
const answerTime = 250 * time.Millisecond

// Relay joins accepted sockets with what was dialled for them.
type Relay interface {
	// Join takes over guest, a connected socket that does not block, and v.Host.
	Join(guest int, v flow.Verdict)
}

// Config is what a Path is made of.
type Config struct {
	Link  link.Link  // the guest's device
	Loop  *loop.Loop // whose thread calls and is called
	Relay Relay
	Wire  Wire         // for Enter
	Log   *slog.Logger // nil discards

	// Listener4 and Listener6 are transparent listening sockets in the guest's
	// namespace that do not block; -1 is a family without. The Path owns them.
	Listener4, Listener6 int
}

// Path answers SYNs. Its methods but Stats and Close are for the loop's thread.
type Path struct {
	cfg       Config
	log       *slog.Logger
	listeners [2]listener
	waiting   map[flow.Tuple]*answer
	entrance  entrance
	stats     counters
}

// counters count what became of SYNs that were written back, and of clients.
type counters struct {
	answered, unanswered, stray, acceptErrors atomic.Uint64
	entered, unentered                        atomic.Uint64
}

// Stats are a Path's counters since its start.
type Stats struct {
	Answered     uint64 // connections that the guest's kernel completed
	Unanswered   uint64 // handshakes that it did not complete in time
	Stray        uint64 // connections that nobody waited for, and were reset
	AcceptErrors uint64 // accept(2) failed, as without descriptors
	Entered      uint64 // clients of published ports whose place a socket took
	Unentered    uint64 // and whose place it could not take although the guest answered
}

// listener is one of the two listening sockets.
type listener struct {
	path *Path
	fd   int
	ref  loop.Ref // while something is waited for
}

// answer is a SYN that was written back.
type answer struct {
	v     flow.Verdict
	then  func(ok bool)
	timer *time.Timer
}

// New makes a Path.
func New(cfg Config) *Path {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := &Path{cfg: cfg, log: cfg.Log.With(slog.String("component", "kernel")), waiting: make(map[flow.Tuple]*answer)}
	for i, fd := range []int{cfg.Listener4, cfg.Listener6} {
		p.listeners[i] = listener{path: p, fd: fd}
	}
	return p
}

// Close closes the listeners and fails what still waits for its handshake.
func (p *Path) Close() {
	p.cfg.Loop.Do(func() {
		for i := range p.listeners {
			if l := &p.listeners[i]; l.fd >= 0 {
				l.watch(false)
				unix.Close(l.fd)
				l.fd = -1
			}
		}
		for t, a := range p.waiting {
			p.done(t, a, false)
		}
	})
}

// Stats returns the counters.
func (p *Path) Stats() Stats {
	return Stats{
		Answered: p.stats.answered.Load(), Unanswered: p.stats.unanswered.Load(),
		Stray: p.stats.stray.Load(), AcceptErrors: p.stats.acceptErrors.Load(),
		Entered: p.stats.entered.Load(), Unentered: p.stats.unentered.Load(),
	}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// Answer has the guest's kernel answer syn, t's SYN as it was read from the link with h,
// and joins the connection with v.Host. then is called once: with true when the
// connection is complete, and v is the relay's; or with false after a while, and v is
// still the caller's. A Verdict without Host is a probe, whose connection is closed.
func (p *Path) Answer(t flow.Tuple, syn []byte, h link.Header, v flow.Verdict, then func(ok bool)) {
	a := &answer{v: v, then: then}
	l := &p.listeners[family(t.Target.Addr())]
	if l.fd < 0 {
		then(false)
		return
	}
	p.waiting[t] = a
	if err := p.cfg.Link.WritePacket(h, [][]byte{syn}); err != nil {
		p.done(t, a, false)
		return
	}
	for p.waiting[t] == a && l.accept() {
	}
	if p.waiting[t] == a {
		l.watch(true)
		a.timer = time.AfterFunc(answerTime, func() {
			p.cfg.Loop.Post(func() {
				for p.waiting[t] == a && l.accept() { // it may lie in the queue since we were busy
				}
				if p.waiting[t] == a {
					p.done(t, a, false)
				}
			})
		})
	}
}

// done ends the wait of a.
func (p *Path) done(t flow.Tuple, a *answer, ok bool) {
	delete(p.waiting, t)
	if a.timer != nil {
		a.timer.Stop()
	}
	if len(p.waiting) == 0 {
		for i := range p.listeners {
			p.listeners[i].watch(false)
		}
	}
	if ok {
		p.stats.answered.Add(1)
	} else {
		p.stats.unanswered.Add(1)
	}
	a.then(ok)
}

// Ready implements loop.Handler: something came late, or from nobody knows where.
func (l *listener) Ready(uint32) (again bool) {
	for l.accept() {
	}
	return false
}

// accept accepts one connection, and reports whether there may be another.
func (l *listener) accept() bool {
	fd, guest, errno := accept(l.fd)
	switch errno {
	case 0:
		l.path.accepted(fd, guest)
	case unix.ECONNABORTED, unix.EINTR:
	case unix.EAGAIN:
		return false
	default:
		// Without descriptors the connection stays in the queue until another
		// SYN is answered, and what waits for it gives up.
		l.path.stats.acceptErrors.Add(1)
		return false
	}
	return true
}

// watch has late connections told, as long as somebody waits for one. On end, what is
// still in the queue is nobody's and waits for the next accept.
func (l *listener) watch(on bool) {
	switch {
	case on && l.ref == loop.Ref{}:
		var err error
		if l.ref, err = l.path.cfg.Loop.Add(l.fd, loop.Readable, l); err != nil {
			l.path.log.Warn("late answers of the guest's kernel are missed", slog.Any("err", err))
		}
	case !on && l.ref != loop.Ref{}:
		l.path.cfg.Loop.Remove(l.fd, l.ref)
		l.ref = loop.Ref{}
	}
}

// accepted finds out which SYN fd answers.
func (p *Path) accepted(fd int, guest netip.AddrPort) {
	t := flow.Tuple{Proto: flow.TCP, Guest: guest, Target: localAddr(fd)}
	a := p.waiting[t]
	if a == nil || a.v.Host == nil {
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(fd)
	}
	switch {
	case a == nil:
		p.stats.stray.Add(1)
		return
	case a.v.Host != nil:
		p.cfg.Relay.Join(fd, a.v)
	}
	p.done(t, a, true)
}
