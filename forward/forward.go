// Package forward replays a guest's flows through ordinary host sockets: it decides
// what may be dialled, dials it, and carries the bytes until both sides have ended.
// It knows nothing of how packets reach the guest.
//
// New, then give the Forwarder to a stack; Close ends every flow.
package forward

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
)

// Config is what a Forwarder is made of.
type Config struct {
	Guest  flow.Guest   // where datagrams, echo replies and errors go
	Table  *table.Table // every flow has an entry here while it lives
	Policy *Policy      // what may be dialled
	Log    *slog.Logger // nil discards

	// MaxTCP bounds the TCP flows that guests begin, and as many that clients of
	// published ports begin; MaxUDP the UDP mappings. Each costs a descriptor or two.
	// One guest's, or client's, address may have two thirds. Zero means 65536 and 16384.
	MaxTCP, MaxUDP int

	// MaxDials bounds the clients of published ports that the guest has not answered yet;
	// those of one guest port may be two thirds. Zero means 4096.
	MaxDials int
}

// Forwarder carries one guest's flows.
type Forwarder struct {
	table  *table.Table
	policy *Policy
	log    *slog.Logger
	pool   flow.BufPool
	udp    *udpMaps
	ports  *udpPorts
	pings  *pings
	tcp    *share[netip.Addr]
	wants  *rate.Limiter // of warnings that a dial failed for want of something
	stats  tcpCounters
	in     *inbounds

	mu     sync.Mutex // guards the fields below
	closed bool
	relays map[*relay]struct{}
	idle   sync.Cond // relays is empty
}

// tcpCounters count what became of TCP connections.
type tcpCounters struct {
	connected, refused, unreachable, timedOut, denied, cancelled, failed atomic.Uint64
}

// defaultMaxTCP is more than one target's ephemeral ports; at 40 KiB each it is 2.5
// GiB of memory.
const defaultMaxTCP = 65536

// New makes a Forwarder. The caller closes it.
func New(cfg Config) *Forwarder {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	log := cfg.Log.With(slog.String("component", "forward"))
	if cfg.MaxTCP == 0 {
		cfg.MaxTCP = defaultMaxTCP
	}
	if cfg.MaxDials == 0 {
		cfg.MaxDials = inboundDials
	}
	f := &Forwarder{
		table: cfg.Table, policy: cfg.Policy, log: log,
		tcp: newShare[netip.Addr](cfg.MaxTCP), wants: rate.NewLimiter(rate.Every(time.Second), 5), relays: make(map[*relay]struct{}),
		in: newInbounds(cfg.MaxTCP, cfg.MaxDials),
	}
	f.idle.L = &f.mu
	f.udp = newUDPMaps(udpConfig{Guest: cfg.Guest, Table: cfg.Table, Policy: cfg.Policy, Log: log, Max: cfg.MaxUDP})
	f.ports = newUDPPorts(f.udp, f.udp.sockets.(inboundSockets))
	f.pings = newPings(pingConfig{Guest: cfg.Guest, Table: cfg.Table, Policy: cfg.Policy, Log: log})
	return f
}

// Decide dials t's target and says what the guest is to be answered. It blocks as
// long as connect(2) does, and no longer than ctx.
func (f *Forwarder) Decide(ctx context.Context, t flow.Tuple) flow.Verdict {
	dials, decision, err := f.policy.Route(t)
	if err != nil {
		return f.denied(t, err)
	}
	fl := &flow.Flow{Tuple: t, Decided: decision, Path: flow.Netstack, Dialled: dials[0], Started: time.Now()}
	if !f.open(fl) {
		return flow.Verdict{Answer: flow.Silence} // the guest will try again
	}
	conn, err := dialAny(ctx, dials)
	if err != nil {
		f.close(fl)
		if ctx.Err() != nil {
			f.stats.cancelled.Add(1)
			return flow.Verdict{Answer: flow.Silence}
		}
		return f.failed(t, err)
	}
	f.stats.connected.Add(1)
	fl.SetState(flow.Open)
	return flow.Verdict{Answer: flow.Connect, Host: conn, Flow: fl}
}

// shareOf is what fl counts for, and for whom: the guest, or the client of a published
// port. These have a share of their own, or a neighbour could cut guests off from the world.
func (f *Forwarder) shareOf(fl *flow.Flow) (*share[netip.Addr], netip.Addr) {
	if fl.Decided == flow.Published {
		return f.in.flows, fl.Tuple.Target.Addr()
	}
	return f.tcp, fl.Tuple.Guest.Addr()
}

// open makes fl's entry, unless who began it has too many; close takes it away.
func (f *Forwarder) open(fl *flow.Flow) bool {
	if s, by := f.shareOf(fl); !s.take(by) {
		return false
	}
	f.table.Open(fl)
	return true
}

func (f *Forwarder) close(fl *flow.Flow) {
	fl.SetState(flow.Closed)
	f.table.Close(fl)
	s, by := f.shareOf(fl)
	s.give(by)
}

// denied is the answer to a target that policy refuses; it counts it.
func (f *Forwarder) denied(t flow.Tuple, err error) flow.Verdict {
	f.stats.denied.Add(1)
	f.log.Debug("denied", slog.Any("flow", t), slog.Any("err", err))
	var denied *DeniedError
	if errors.As(err, &denied) {
		return denied.Verdict()
	}
	return flow.Verdict{Answer: flow.Reset}
}

// dialAny tries addrs in order until one answers. It returns the first refusal, which
// tells more than "no such address" from a host without one of the families, or the
// last error.
func dialAny(ctx context.Context, addrs []netip.AddrPort) (flow.Conn, error) {
	var told error
	for _, a := range addrs {
		conn, err := dialTCP(ctx, a)
		if err == nil {
			return conn, nil
		}
		if !errors.Is(told, syscall.ECONNREFUSED) {
			told = err
		}
	}
	return nil, told
}

// failed turns a dial's error into an answer, and counts it.
func (f *Forwarder) failed(t flow.Tuple, err error) flow.Verdict {
	var de *DialError
	if !errors.As(err, &de) {
		de = &DialError{Err: err}
	}
	v := de.verdict(t.Target.Addr().Is4())
	f.log.Debug("not connected", slog.Any("flow", t), slog.Any("err", err), slog.String("answer", v.Answer.String()))
	switch v.Answer {
	case flow.Reset:
		f.stats.refused.Add(1)
	case flow.Unreachable:
		f.stats.unreachable.Add(1)
	default:
		if de.Timeout() {
			f.stats.timedOut.Add(1)
			break
		}
		f.stats.failed.Add(1)
		if f.wants.Allow() {
			f.log.Warn("dial failed for want of something on the host", slog.Any("flow", t), slog.Any("err", err))
		}
	}
	return v
}

// Discard takes back a connecting Verdict whose guest has gone.
func (f *Forwarder) Discard(v flow.Verdict) {
	v.Host.Abort()
	f.close(v.Flow)
}

// Datagram carries a guest's UDP datagram. It does not block.
func (f *Forwarder) Datagram(d flow.Datagram) {
	if !f.ports.datagram(d) {
		f.udp.Datagram(d)
	}
}

// Echo carries a guest's echo request. It does not block.
func (f *Forwarder) Echo(e flow.Echo) { f.pings.Echo(e) }

// Close resets every connection, ends every mapping, and waits until the last is
// gone. Further flows are refused.
func (f *Forwarder) Close() {
	f.mu.Lock()
	f.closed = true
	for r := range f.relays {
		r.abort()
	}
	for len(f.relays) > 0 {
		f.idle.Wait()
	}
	f.mu.Unlock()
	f.in.close()
	f.ports.close()
	f.udp.close()
	f.pings.close()
}
