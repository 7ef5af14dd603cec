package kernel

import (
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// Enter is the way into the guest for a client whose address is kept. The guest is to see
// packets of a network, and the bytes are to go between sockets. So the handshake's
// packets come in by the device (Wire), and then a transparent socket of the guest's
// namespace is put in the client's place (TCP_REPAIR, which was made to move connections
// from one machine to another):
//
//	SYN in, SYN-ACK out      by the device
//	connect(2)               in repair, at once and without a packet, with the numbers
//	                         and options that were agreed on
//	repair off               sends a window probe by the namespace's OUTPUT, from where
//	                         the connection's translation by the guest applies to it;
//	                         the rules (internal/nsagent) label the connection
//	the guest's answer       to the probe, an ACK, is kept inside by the label and
//	                         reaches the socket: both directions have been proven
//	ACK in                   by the device; only now the guest has a connection
//
// Nobody in the guest has seen a connection before the end, so any failure leads to
// ErrNoEntry, after a reset of what is half open, and the caller takes gVisor's way. If
// nothing arrives within a second, the guest's own rules drop on INPUT or OUTPUT what
// a router's packets would not pass, or its TCP does not answer such a probe: that
// address and port is not entered for avoidTime.
//
// The socket's numbers belong to it until it is closed. A client that comes again takes over
// its TIME_WAIT at once, as bind(2) to the port lets it, if timestamps tell the two
// connections apart; without timestamps it gets ErrNoEntry, too, for 60 s.
//
// When somebody empties the guest's table of connections, the next packet of the socket's
// gets a new entry its label. What the guest sends before that comes out of the device
// and is given back (netstack), unless the guest has translated it: then the connection
// is lost, as it would be with a router in our place.

const (
	// proofFirst is when to look again for the answer to the probe, then after twice as
	// long, up to proofLast. After that, 511 ms, there is a second probe: a guest that has
	// just answered a repeated SYN says nothing for 500 ms (net.ipv4.tcp_invalid_ratelimit).
	proofFirst, proofLast = time.Millisecond, 256 * time.Millisecond
	probes                = 2
	// avoidTime is how long an address and port is not entered after no probe was answered,
	// and avoidMost how many are remembered; beyond it they are forgotten all at once.
	avoidTime = time.Minute
	avoidMost = 1024
	// leastMSS and mostMSS are what a kernel takes (TCP_MAXSEG).
	leastMSS, mostMSS = 88, 32767
)

// ErrNoEntry says that a client cannot be entered, but may be dialled.
var ErrNoEntry = errors.New("a socket cannot take the client's place")

// Wire makes handshakes with the guest by its device.
type Wire interface {
	// Handshake begins one, as if from were a host beyond the device; then is told later,
	// at most once, on the loop's thread. end is called once: with true it completes the
	// handshake if the guest has answered, else it gives up.
	Handshake(from, to netip.AddrPort, then func(flow.Handshake, error)) (end func(done bool), err error)
}

// entrance is what a Path knows about it. It belongs to the loop's thread.
type entrance struct {
	shut     bool // the kernel does not let us
	bindPort bool // bind(2) has to choose the port, as connect(2) cannot
	avoided  map[netip.AddrPort]time.Time
	told     bool // a failure was logged
}

// entry is a client on its way in.
type entry struct {
	p     *Path
	fd    int
	from  netip.AddrPort
	to    netip.AddrPort
	end   func(done bool)
	then  func(error)
	timer *time.Timer
	tries int // probes that were sent
	over  bool
}

// Enters reports whether clients of to may be entered.
func (p *Path) Enters(to netip.AddrPort) bool {
	in := &p.entrance
	if in.shut || p.listeners[family(to.Addr())].fd < 0 {
		return false
	}
	until, ok := in.avoided[to]
	if ok && time.Now().After(until) {
		delete(in.avoided, to)
		return true
	}
	return !ok
}

// Enter connects fd, a transparent socket of the guest's namespace, to to from from by the
// wire. then is told later, at most once: nil, or the guest's refusal, or ErrNoEntry. cancel
// ends it, and then is not called any more. fd stays the caller's; where it is not
// connected it is only good to be closed, which sends nothing.
func (p *Path) Enter(fd int, from, to netip.AddrPort, then func(error)) (cancel func(), err error) {
	if err := startRepair(fd); err != nil {
		p.noEntry(from, to, err)
		return nil, ErrNoEntry
	}
	e := &entry{p: p, fd: fd, from: from, to: to, then: then}
	if e.end, err = p.cfg.Wire.Handshake(from, to, e.answered); err != nil {
		return nil, err
	}
	return e.cancel, nil
}

// cancel is what Enter returns.
func (e *entry) cancel() {
	if !e.over {
		e.stop()
		startRepair(e.fd)
		e.end(false)
	}
}

// stop ends the wait.
func (e *entry) stop() {
	e.over = true
	if e.timer != nil {
		e.timer.Stop()
	}
}

// errNoProof says that nothing came back to the socket.
var errNoProof = errors.New("the guest's kernel did not answer it: do rules for INPUT or OUTPUT drop what is established?")

// answered puts the socket into the client's place.
func (e *entry) answered(h flow.Handshake, err error) {
	if e.over {
		return
	}
	if err != nil {
		e.stop()
		e.then(err)
		return
	}
	if err := e.p.adopt(e.fd, &h); err != nil {
		e.p.noEntry(e.from, e.to, err)
		e.giveUp()
		return
	}
	e.tries = 1
	e.prove(proofFirst)
}

// prove completes the handshake when the probe was answered, and looks again after wait
// otherwise.
func (e *entry) prove(wait time.Duration) {
	info, err := unix.GetsockoptTCPInfo(e.fd, unix.SOL_TCP, unix.TCP_INFO)
	switch {
	case err == nil && (info.State != tcpEstablished || info.Data_segs_in > 0):
		// A RST: who said SYN-ACK does not know the connection, as with SYN cookies. Or data
		// that nobody can have sent yet: he knows another one.
		e.p.noEntry(e.from, e.to, unix.ECONNRESET)
		e.giveUp()
	case err == nil && info.Segs_in > 0:
		e.stop()
		e.p.stats.entered.Add(1)
		e.end(true)
		e.then(nil)
	case err != nil || wait > proofLast && (e.tries == probes || probe(e.fd) != nil):
		e.p.avoid(e.to)
		e.p.noEntry(e.from, e.to, errNoProof)
		e.giveUp()
	case wait > proofLast:
		e.tries++
		e.prove(proofFirst)
	default:
		e.timer = time.AfterFunc(wait, func() {
			e.p.cfg.Loop.Post(func() {
				if !e.over {
					e.prove(2 * wait)
				}
			})
		})
	}
}

// tcpEstablished is TCP_ESTABLISHED of net/tcp_states.h.
const tcpEstablished = 1

// giveUp resets what the guest has of it.
func (e *entry) giveUp() {
	e.cancel()
	e.then(ErrNoEntry)
}

func (p *Path) avoid(to netip.AddrPort) {
	in := &p.entrance
	if in.avoided == nil || len(in.avoided) >= avoidMost {
		in.avoided = make(map[netip.AddrPort]time.Time)
	}
	in.avoided[to] = time.Now().Add(avoidTime)
}

// noEntry counts a failure of ours, and says so the first time. Where the kernel has not
// what it takes, or does not let us, nobody tries again.
func (p *Path) noEntry(from, to netip.AddrPort, err error) {
	p.stats.unentered.Add(1)
	in := &p.entrance
	in.shut = in.shut || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOPROTOOPT)
	say := p.log.Debug
	if !in.told && !inUse(err) {
		in.told, say = true, p.log.Warn
	}
	say("a client of a published port takes netstack", slog.Any("client", from), slog.Any("guest", to), slog.Any("err", err))
}

// inUse reports whether err is about numbers that are in TIME_WAIT, say.
func inUse(err error) bool {
	return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EADDRINUSE)
}
