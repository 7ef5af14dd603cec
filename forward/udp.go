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
// A mapping joins one UDP address and port of a guest with one unconnected host
// socket of one family. It starts with the guest's first datagram and serves every
// target the guest sends to from there: a peer sees the same host port as all others
// (endpoint-independent mapping, RFC 4787 REQ-1). What comes back is let through if
// the guest has sent something to that address before, on whatever port
// (address-dependent filtering, REQ-8); the rest is counted and dropped.
//
// Guest to host: Datagram runs on the goroutine that reads the guest's link. A
// datagram to the same target as the one before costs a map lookup and a system
// call; any other target asks the policy. Host to guest: one goroutine serves the
// sockets of all mappings (udppoll_linux.go says why).
//
// Neither side holds datagrams back. When the host's socket is full the datagram is
// dropped and counted, as a router would; towards the guest the link waits.
//
// Errors. ICMP messages about a mapping's datagrams come from the host socket's error
// queue, and go to the guest as they are, with the router that sent them. Errors that
// the host's kernel finds itself become the message a router with the same routes
// would send. None of them ends a mapping.
//
// The host address. A datagram to it goes to the host's loopback of the guest's family
// first. When that port is closed there, the datagram (if the ICMP message quotes all
// of it) and those that follow go to the other family, through a mapping of their own;
// the guest hears of the refusal when both families refused.
//
// Ends. A mapping without traffic in either direction goes after udpUnansweredIdle,
// or udpAnsweredIdle once anything came back, or udpDNSIdle when all it ever talked to
// was port 53. When there are too many, the oldest that were never answered go first
// (udplimit.go).
//
// Not handled: multicast and broadcast (silence), IP options, and endpoint-independent
// filtering.

const (
	// udpUnansweredIdle and udpAnsweredIdle close a mapping after this long without
	// a datagram. RFC 4787 REQ-5: a mapping must not expire in less than 2 minutes;
	// one that was never answered is a probe and may go sooner.
	udpUnansweredIdle = 60 * time.Second
	udpAnsweredIdle   = 5 * time.Minute

	// udpDNSIdle is for queries: REQ-5 exempts well-known ports. Resolvers give up
	// after 5 s and use a new port for every query.
	udpDNSIdle = 10 * time.Second

	// udpSweep is how often idle mappings are looked for.
	udpSweep = 2 * time.Second

	// udpMaxSegments bounds a train from the guest; its kernel makes at most 128
	// (UDP_MAX_SEGMENTS). More would be a cheap way to make us send a lot.
	udpMaxSegments = 128

	// errorRate and errorBurst limit the ICMP messages that we make ourselves
	// (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4 f), per second.
	errorRate  = 1000
	errorBurst = 200

	dnsPort = 53
)

// flowTable is where mappings and pings are seen.
type flowTable interface {
	Open(*flow.Flow)
	Close(*flow.Flow)
}

// udpSocket is an unconnected host socket of one family.
type udpSocket interface {
	// send sends d's payload to the host address to. It does not block and does
	// not keep the payload. A full socket is errSocketFull, a datagram longer than
	// the route takes a *tooBigError, any other error wraps the kernel's errno.
	// Calls are serialised by the caller.
	send(d flow.Datagram, to netip.AddrPort) error
	close()
}

// udpOwner is who a socket receives for.
type udpOwner interface {
	// fromHost takes a datagram, or a train of them, that arrived with the given hops.
	// The payload is borrowed.
	fromHost(from netip.AddrPort, payload []byte, segment int, hops, tos uint8)
	hostError(hostError)
	lost(n uint32) // datagrams that nobody read in time
}

// udpSockets opens sockets. What a socket receives goes to the mapping's fromHost and
// hostError, until the socket's close and at times just after.
type udpSockets interface {
	open(v6 bool, m *udpMapping) (udpSocket, error)
	close() // waits for the last call of a mapping
}

// errSocketFull says that the host had no room for a datagram.
var errSocketFull = errors.New("host socket is full")

// tooBigError says that a datagram with DF does not fit the route's MTU in bytes.
type tooBigError struct{ mtu uint32 }

func (e *tooBigError) Error() string { return "datagram is longer than the route's MTU" }

// hostError is an ICMP message about something that we sent.
type hostError struct {
	flow.ICMP                // in the family of to
	from      netip.Addr     // who sent it
	to        netip.AddrPort // where our datagram went
	mtu       uint32
	quote     []byte // what is known of the payload; borrowed
}

// udpConfig is what udpMaps are made of.
type udpConfig struct {
	Guest  flow.Guest
	Table  flowTable
	Policy *Policy
	Log    *slog.Logger
	Max    int // mappings; zero means as many as the host's limits allow, at most udpMaxMappings

	sockets udpSockets // for tests; nil means the host's
}

// udpMaps are the mappings of a guest.
type udpMaps struct {
	cfg     udpConfig
	sockets udpSockets
	errors  *rate.Limiter // of ICMP messages of our own
	warn    *rate.Limiter // of warnings
	prefer  loopbackPreference
	count   udpCounters

	sweeper sweeper

	mu sync.RWMutex // guards the fields below
	udpLimits
	closed bool
	live   map[udpKey]*udpMapping
}

// udpKey names a mapping: the guest's address and port, and the family of the host
// socket, which differs from the guest's only on the way to the host's loopback.
type udpKey struct {
	guest netip.AddrPort
	v6    bool
}

// udpCounters count what became of datagrams.
type udpCounters struct {
	denied, filtered, full, tooBig, failed, malformed atomic.Uint64
	errorsRelayed, errorsLimited, errorsUnknown       atomic.Uint64
	evicted, evictedAnswered, refused, noSocket       atomic.Uint64
	expired, overrun                                  atomic.Uint64
}

// UDPStats are counters since the start, but for Mappings, which is now.
type UDPStats struct {
	Mappings int // live mappings
	Limit    int // most mappings

	Denied    uint64 // datagrams that policy refused
	Filtered  uint64 // datagrams from addresses the guest had not sent to
	Full      uint64 // datagrams to a target dropped because the host's socket was full
	Overrun   uint64 // datagrams to the guest dropped because we were slower than they came
	TooBig    uint64 // datagrams with DF beyond the MTU of the host's route
	Failed    uint64 // datagrams that the host's kernel refused for another reason
	Malformed uint64 // trains with more datagrams than any kernel makes

	ErrorsRelayed uint64 // ICMP messages passed on to the guest
	ErrorsLimited uint64 // ICMP messages of ours not sent, because of the rate limit
	ErrorsUnknown uint64 // ICMP messages about nothing that is known any more

	Evicted         uint64 // mappings never answered that gave way at a limit
	EvictedAnswered uint64 // answered mappings that gave way to their own guest's new ones
	Refused         uint64 // datagrams dropped because a limit left no room
	NoSocket        uint64 // datagrams dropped because the host gave no socket
	Expired         uint64 // mappings that were idle

	Clients        int    // live mappings of published ports' clients
	ClientsEvicted uint64 // of those that gave way at a limit
}

// newUDPMaps makes udpMaps. The caller closes them.
func newUDPMaps(cfg udpConfig) *udpMaps {
	if cfg.Max == 0 {
		cfg.Max = socketShare()
	}
	u := &udpMaps{
		cfg: cfg, sockets: cfg.sockets,
		errors: rate.NewLimiter(errorRate, errorBurst), warn: rate.NewLimiter(rate.Every(time.Minute), 1),
		live: make(map[udpKey]*udpMapping),
	}
	u.udpLimits.init(cfg.Max)
	if u.sockets == nil {
		u.sockets = newUDPSockets()
	}
	u.sweeper.start(udpSweep, u.sweep)
	return u
}

// Datagram carries a datagram, or a train of them, of a guest to its target. It does
// not block and does not keep d.Payload.
func (u *udpMaps) Datagram(d flow.Datagram) {
	if d.Segment > 0 && len(d.Payload) > d.Segment*udpMaxSegments {
		u.count.malformed.Add(1)
		return
	}
	u.mu.RLock()
	m := u.live[udpKey{d.Guest, d.Target.Addr().Is6()}]
	u.mu.RUnlock()
	if m != nil && m.sendAgain(d) {
		return
	}
	u.sendNew(d)
}

// sendNew asks the policy about d and sends it, through the second dialled address
// when the host's kernel says that it cannot reach the first.
func (u *udpMaps) sendNew(d flow.Datagram) {
	r, err := u.cfg.Policy.route(flow.UDP, d.Target)
	if err != nil {
		u.count.denied.Add(1)
		u.answer(d, asDenied(err, d.Target).Verdict())
		return
	}
	first := u.prefer.first(d.Target, &r)
	for i := range r.n {
		err = u.sendVia(d, r.dials[(first+i)%r.n], r.decision)
		if err == nil {
			return
		}
		if localVerdict(d, err).Answer != flow.Unreachable && !errors.Is(err, errNoSocket) {
			break // the other family would not help
		}
	}
	u.sendFailed(d, err)
}

// localVerdict is what an error of the host's own kernel means to the guest.
func localVerdict(d flow.Datagram, err error) flow.Verdict {
	return (&DialError{Target: d.Target, Err: err}).verdict(d.Target.Addr().Is4())
}

// errNoRoom says that a limit allows no mapping, errNoSocket that the host gave none;
// the latter wraps the host's error.
var (
	errNoRoom   = errors.New("no room for a mapping")
	errNoSocket = errors.New("no host socket")
)

// sendVia sends d to dial through the mapping of that family.
func (u *udpMaps) sendVia(d flow.Datagram, dial netip.AddrPort, decision flow.Decision) error {
	k := udpKey{d.Guest, dial.Addr().Is6()}
	for {
		m, err := u.obtain(k, d.Target, dial, decision)
		if err != nil {
			return err
		}
		if err := m.send(d, dial); err != errMappingClosed {
			return err
		}
	}
}

// sendFailed tells the guest why d was not sent, and counts it.
func (u *udpMaps) sendFailed(d flow.Datagram, err error) {
	var big *tooBigError
	switch {
	case err == errNoRoom:
		u.count.refused.Add(1)
		return
	case err == errSocketFull:
		u.count.full.Add(1)
		return
	case errors.As(err, &big):
		u.count.tooBig.Add(1)
		u.answer(d, flow.Verdict{Answer: flow.Unreachable, ICMP: tooBigICMP(d.Target.Addr()), MTU: big.mtu})
		return
	case errors.Is(err, errNoSocket):
		u.count.noSocket.Add(1)
		if u.warn.Allow() {
			u.cfg.Log.Warn("udp datagrams dropped", slog.Any("err", err))
		}
	default:
		u.count.failed.Add(1)
	}
	if v := localVerdict(d, err); v.Answer == flow.Unreachable {
		u.answer(d, v)
	}
}

// ICMP types and codes, as a pair for IPv4 (RFC 792) and one for IPv6 (RFC 4443).
var (
	portUnreachable4 = flow.ICMP{Type: typeUnreachable4, Code: 3}
	portUnreachable6 = flow.ICMP{Type: typeUnreachable6, Code: 4}
	fragNeeded4      = flow.ICMP{Type: typeUnreachable4, Code: 4}
	packetTooBig6    = flow.ICMP{Type: 2}
)

// portUnreachable and tooBigICMP return the message in the family of a.
func portUnreachable(a netip.Addr) flow.ICMP {
	if a.Is4() {
		return portUnreachable4
	}
	return portUnreachable6
}

func tooBigICMP(a netip.Addr) flow.ICMP {
	if a.Is4() {
		return fragNeeded4
	}
	return packetTooBig6
}

// answer tells the guest about d with a message of our own.
func (u *udpMaps) answer(d flow.Datagram, v flow.Verdict) {
	e := flow.Error{Tuple: flow.Tuple{Proto: flow.UDP, Guest: d.Guest, Target: d.Target}, Quote: d.Payload}
	switch v.Answer {
	case flow.Reset: // comes from the target itself
		e.ICMP, e.From = portUnreachable(d.Target.Addr()), d.Target.Addr()
	case flow.Unreachable:
		e.ICMP, e.From, e.MTU = v.ICMP, v.From, v.MTU
	default:
		return
	}
	if d.Segment > 0 {
		e.Quote = e.Quote[:min(d.Segment, len(e.Quote))]
	}
	if !u.errors.Allow() {
		u.count.errorsLimited.Add(1)
		return
	}
	u.cfg.Guest.WriteError(e) // fails only when the link is closed
}

// sweep ends the mappings that are idle at now and returns how many there are left.
func (u *udpMaps) sweep(now time.Time) int {
	var idle []*udpMapping
	u.mu.RLock()
	left := len(u.live)
	for _, m := range u.live {
		if m.idleAt(now) {
			idle = append(idle, m)
		}
	}
	u.mu.RUnlock()
	for _, m := range idle {
		if u.remove(m) {
			u.count.expired.Add(1)
			left--
		}
	}
	return left
}

// close ends every mapping and waits until nothing is written to the guest any more.
// Datagrams that come later are dropped.
func (u *udpMaps) close() {
	u.mu.Lock()
	closed := u.closed
	u.closed = true
	all := make([]*udpMapping, 0, len(u.live))
	for _, m := range u.live {
		all = append(all, m)
	}
	u.mu.Unlock()
	if closed {
		return
	}
	u.sweeper.stop()
	for _, m := range all {
		u.remove(m)
	}
	u.sockets.close()
}

// stats returns the counters.
func (u *udpMaps) stats() UDPStats {
	u.mu.RLock()
	n := len(u.live)
	u.mu.RUnlock()
	s := &u.count
	return UDPStats{
		Mappings: n, Limit: u.cfg.Max,
		Denied: s.denied.Load(), Filtered: s.filtered.Load(), Full: s.full.Load(), TooBig: s.tooBig.Load(), Overrun: s.overrun.Load(),
		Failed: s.failed.Load(), Malformed: s.malformed.Load(),
		ErrorsRelayed: s.errorsRelayed.Load(), ErrorsLimited: s.errorsLimited.Load(), ErrorsUnknown: s.errorsUnknown.Load(),
		Evicted: s.evicted.Load(), EvictedAnswered: s.evictedAnswered.Load(), Refused: s.refused.Load(),
		NoSocket: s.noSocket.Load(), Expired: s.expired.Load(),
	}
}
