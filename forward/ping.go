package forward

import (
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// A ping is what one guest address sends to one target with one ICMP identifier. Each
// echo request of the guest becomes one of the host's, with the guest's sequence
// number, payload, TTL, TOS and DF; the identifier is the host's. Each reply that
// really comes back goes to the guest with the TTL it arrived with, less one. Nothing
// is ever answered in a target's name.
//
// ICMP errors about a request come from the socket's error queue. They quote the
// request, whose sequence number tells which one it was, and go to the guest with the
// router that sent them: so traceroute -I and mtr show the true path behind the
// gateway. What the host's kernel refuses by itself becomes the message that a router
// with the same routes would send.
//
// The host needs ping sockets, which net.ipv4.ping_group_range opens to groups, or the
// right to raw sockets (ping_linux.go). With neither, requests are answered with
// "administratively prohibited" by the gateway, and Mode says what to do.
//
// A ping of the host address goes to the host's loopback as soon as any port is open
// to the guest: a host that is closed altogether does not answer either.
//
// A ping without traffic for pingIdle ends. At the limits one of the guest address
// that has the most gives way, one that was never answered first.

const (
	// pingIdle is several times the interval of any ping; an answer that comes
	// later is lost.
	pingIdle = 30 * time.Second

	pingSweep = 5 * time.Second

	// pingMax bounds the pings; a guest address gets two thirds. Each may cost the
	// host a socket.
	pingMax = 1024
)

// pingSocket sends the requests of one ping.
type pingSocket interface {
	// send sends a request to the host address to, as udpSocket.send does.
	send(e flow.Echo, to netip.Addr) error
	close()
}

// pingSockets make pingSockets. What they receive goes to the ping's fromHost and
// hostError, until the close and at times just after.
type pingSockets interface {
	open(p *ping) (pingSocket, error)
	mode() PingMode
	close() // waits for the last call of a ping
}

// PingMode says whether and how a guest's pings work.
type PingMode struct {
	Mode string // "ping socket", "raw socket" or "unavailable"
	Why  string // why it is unavailable
	Hint string // what would make it available
}

// The values of PingMode.Mode.
const (
	PingSocket      = "ping socket"
	PingRaw         = "raw socket"
	PingUnavailable = "unavailable"
)

// pingConfig is what pings are made of.
type pingConfig struct {
	Guest  flow.Guest
	Table  flowTable
	Policy *Policy
	Log    *slog.Logger

	max     int         // for tests; zero means pingMax
	sockets pingSockets // for tests; nil means the host's
}

// pings are a guest's pings.
type pings struct {
	cfg     pingConfig
	sockets pingSockets
	errors  *rate.Limiter // of ICMP messages of our own
	warn    *rate.Limiter // of warnings
	count   pingCounters
	sweeper sweeper

	mu     sync.RWMutex // guards the fields below
	closed bool
	live   map[pingKey]*ping
	guests map[netip.Addr]int // pings of each guest address
}

type pingKey struct {
	guest, target netip.Addr
	id            uint16
}

// ping is one of them.
type ping struct {
	pings *pings
	key   pingKey
	dial  netip.Addr // the target, or the host's loopback
	flow  *flow.Flow

	answered atomic.Bool

	mu   sync.Mutex // held while sending; guards sock
	sock pingSocket // nil once ended
}

// pingCounters count what became of echo requests.
type pingCounters struct {
	denied, filtered, full, tooBig, failed           atomic.Uint64
	errorsRelayed, errorsLimited                     atomic.Uint64
	evicted, refused, noSocket, unavailable, expired atomic.Uint64
}

// PingStats are counters since the start, but for Pings, which is now.
type PingStats struct {
	Pings int // live pings
	Limit int // most pings

	Denied      uint64 // requests that policy refused
	Filtered    uint64 // replies from another address than the target
	Full        uint64 // requests dropped because the host's socket was full
	TooBig      uint64 // requests with DF beyond the MTU of the host's route
	Failed      uint64 // requests that the host's kernel refused for another reason
	Unavailable uint64 // requests refused because the host allows no pings

	ErrorsRelayed uint64 // ICMP messages passed on to the guest
	ErrorsLimited uint64 // ICMP messages of ours not sent, because of the rate limit

	Evicted  uint64 // pings that gave way at a limit
	Refused  uint64 // requests dropped because a limit left no room
	NoSocket uint64 // requests dropped because the host gave no socket
	Expired  uint64 // pings that were idle
}

// newPings makes pings. The caller closes them.
func newPings(cfg pingConfig) *pings {
	if cfg.max == 0 {
		cfg.max = pingMax
	}
	p := &pings{
		cfg: cfg, sockets: cfg.sockets,
		errors: rate.NewLimiter(errorRate, errorBurst), warn: rate.NewLimiter(rate.Every(time.Minute), 1),
		live: make(map[pingKey]*ping), guests: make(map[netip.Addr]int),
	}
	if p.sockets == nil {
		p.sockets = newPingSockets()
	}
	p.sweeper.start(pingSweep, p.sweep)
	return p
}

// mode says whether and how pings work on this host.
func (p *pings) mode() PingMode { return p.sockets.mode() }

// errPingUnavailable is what open wraps where the host allows no pings.
var errPingUnavailable = errors.New("pings are unavailable")

// Echo carries a guest's echo request to its target. It does not block and does not
// keep e.Payload.
func (p *pings) Echo(e flow.Echo) {
	k := pingKey{e.Guest, e.Target, e.ID}
	p.mu.RLock()
	one := p.live[k]
	p.mu.RUnlock()
	var err error
	if one == nil {
		if one, err = p.start(k); err != nil {
			p.failed(e, err)
			return
		}
	}
	if err := one.send(e); err != nil {
		p.failed(e, err)
	}
}

// start makes the ping of k. The error is a *DeniedError, errNoRoom, or wraps
// errPingUnavailable or errNoSocket.
func (p *pings) start(k pingKey) (*ping, error) {
	r, err := p.cfg.Policy.route(flow.Ping, netip.AddrPortFrom(k.target, 0))
	if err != nil {
		return nil, err
	}
	victim, ok := p.reserve(k.guest)
	if !ok {
		return nil, errNoRoom
	}
	if victim != nil {
		p.count.evicted.Add(1)
		victim.end()
	}
	one := &ping{pings: p, key: k, dial: r.dials[0].Addr()}
	one.flow = &flow.Flow{
		Tuple: flow.Tuple{
			Proto: flow.Ping, Guest: netip.AddrPortFrom(k.guest, k.id), Target: netip.AddrPortFrom(k.target, 0),
		},
		Decided: r.decision, Dialled: r.dials[0], Path: flow.Netstack, Started: time.Now(),
	}
	one.flow.SetState(flow.Open)
	one.sock, err = p.sockets.open(one)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err != nil:
		p.releaseLocked(k.guest)
		return nil, err
	case p.closed || p.live[k] != nil:
		p.releaseLocked(k.guest)
		one.sock.close()
		return nil, errNoRoom
	}
	p.live[k] = one
	p.cfg.Table.Open(one.flow)
	p.sweeper.notify()
	return one, nil
}

// failed tells the guest why e was not sent, and counts it.
func (p *pings) failed(e flow.Echo, err error) {
	var denied *DeniedError
	var big *tooBigError
	v := (&DialError{Err: err}).verdict(e.Target.Is4())
	switch {
	case errors.As(err, &denied):
		p.count.denied.Add(1)
		v = denied.Verdict()
	case errors.Is(err, errPingUnavailable):
		p.count.unavailable.Add(1)
		v = (&DeniedError{Target: netip.AddrPortFrom(e.Target, 0), Answer: flow.Unreachable}).Verdict()
	case errors.As(err, &big):
		p.count.tooBig.Add(1)
		v = flow.Verdict{Answer: flow.Unreachable, ICMP: tooBigICMP(e.Target), MTU: big.mtu}
	case err == errNoRoom:
		p.count.refused.Add(1)
	case err == errSocketFull:
		p.count.full.Add(1)
	case errors.Is(err, errNoSocket):
		p.count.noSocket.Add(1)
		if p.warn.Allow() {
			p.cfg.Log.Warn("pings dropped", slog.Any("err", err))
		}
	default:
		p.count.failed.Add(1)
	}
	if v.Answer == flow.Unreachable {
		p.answer(e, v)
	}
}

// answer tells the guest about e with a message of our own.
func (p *pings) answer(e flow.Echo, v flow.Verdict) {
	if !p.errors.Allow() {
		p.count.errorsLimited.Add(1)
		return
	}
	p.cfg.Guest.WriteError(flow.Error{ // fails only when the link is closed
		Tuple: flow.Tuple{
			Proto: flow.Ping, Guest: netip.AddrPortFrom(e.Guest, e.ID), Target: netip.AddrPortFrom(e.Target, e.Seq),
		},
		ICMP: v.ICMP, From: v.From, MTU: v.MTU, Quote: e.Payload,
	})
}

// send sends a request.
func (o *ping) send(e flow.Echo) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sock == nil {
		return errNoRoom // ended a moment ago; the next request starts anew
	}
	if err := o.sock.send(e, o.dial); err != nil {
		return err
	}
	o.flow.Touch(time.Now())
	o.flow.ToHost.Add(len(e.Payload))
	return nil
}

// fromHost passes a reply on to the guest. It waits while the guest's link is full.
func (o *ping) fromHost(from netip.Addr, seq uint16, payload []byte, hops, tos uint8) {
	if from != o.dial {
		o.pings.count.filtered.Add(1)
		return
	}
	o.answered.Store(true)
	o.flow.Touch(time.Now())
	o.flow.ToGuest.Add(len(payload))
	o.pings.cfg.Guest.WriteEcho(flow.Echo{ // fails only when the link is closed
		Guest: o.key.guest, Target: o.key.target, ID: o.key.id, Seq: seq, Payload: payload,
		Hops: max(hops, 2) - 1, TOS: tos, // as for a datagram
	})
}

// hostError passes an ICMP message about the request seq on to the guest. The quote is
// of the request's payload.
func (o *ping) hostError(icmp flow.ICMP, from netip.Addr, mtu uint32, seq uint16, quote []byte) {
	switch {
	case from == o.dial:
		from = o.key.target
	case from.IsLoopback():
		from = netip.Addr{}
	}
	o.flow.Touch(time.Now())
	o.pings.count.errorsRelayed.Add(1)
	o.pings.cfg.Guest.WriteError(flow.Error{ // fails only when the link is closed
		Tuple: flow.Tuple{
			Proto: flow.Ping, Guest: netip.AddrPortFrom(o.key.guest, o.key.id), Target: netip.AddrPortFrom(o.key.target, seq),
		},
		ICMP: icmp, From: from, MTU: mtu, Quote: quote,
	})
}

// close ends every ping and waits until nothing is written to the guest any more.
// Requests that come later are dropped.
func (p *pings) close() {
	p.mu.Lock()
	closed := p.closed
	p.closed = true
	all := make([]*ping, 0, len(p.live))
	for _, one := range p.live {
		all = append(all, one)
	}
	p.mu.Unlock()
	if closed {
		return
	}
	p.sweeper.stop()
	for _, one := range all {
		p.remove(one)
	}
	p.sockets.close()
}

// stats returns the counters.
func (p *pings) stats() PingStats {
	p.mu.RLock()
	n := len(p.live)
	p.mu.RUnlock()
	c := &p.count
	return PingStats{
		Pings: n, Limit: p.cfg.max,
		Denied: c.denied.Load(), Filtered: c.filtered.Load(), Full: c.full.Load(), TooBig: c.tooBig.Load(),
		Failed: c.failed.Load(), Unavailable: c.unavailable.Load(),
		ErrorsRelayed: c.errorsRelayed.Load(), ErrorsLimited: c.errorsLimited.Load(),
		Evicted: c.evicted.Load(), Refused: c.refused.Load(), NoSocket: c.noSocket.Load(), Expired: c.expired.Load(),
	}
}
