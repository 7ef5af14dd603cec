package netstack

import (
	"context"
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// While a target is being dialled the guest's SYN is held: nothing is answered. The
// guest repeats it, after 1 s, 2 s, 4 s ... (RFC 6298), Linux since 6.5 also four
// times at 1 s first. A guest that closed its socket sends nothing at all, so its
// silence is the only sign: when the repetition did not come within twice the
// longest gap it may have chosen, and at least 3 s, the dial is cancelled.
//
// Two things say it sooner: a RST, and a SYN of the same ports with another sequence
// number, which is another socket's. Its dial begins with its first repetition.
//
// Held SYNs are bounded, and no guest address may use more than two thirds, so that
// one container that scans a black hole leaves room for the others. A flood from forged
// addresses looks like many guests; but none of them ever completes a handshake. So a
// quarter of the room is kept for addresses that have. A SYN beyond the bounds is
// dropped and counted; the guest will repeat it.

const (
	firstRetry  = time.Second     // RFC 6298 section 2: the initial retransmission timeout
	gaveUpFloor = 3 * time.Second // never call a guest gone sooner than this
	sweepEvery  = 500 * time.Millisecond
)

// dial is one held SYN.
type dial struct {
	tuple  flow.Tuple
	syn    [8]byte         // ports and sequence number, to quote in an ICMP error
	rest   []byte          // what followed in the TCP header
	ctx    context.Context // nil while the kernel path dials
	cancel context.CancelFunc

	seen time.Time     // the last SYN
	gap  time.Duration // the longest time between two of them so far
	gone bool          // cancelled because the guest gave up

	held heldSYN // for the kernel path, see held.go
}

// seq is the SYN's sequence number.
func (d *dial) seq() uint32 { return binary.BigEndian.Uint32(d.syn[4:]) }

// giveUp cancels the dial because the guest wants it no more. The caller holds the
// dials' mu.
func (d *dial) giveUp() {
	d.gone = true
	d.stop()
}

// stop cancels the dial, once. The caller holds the dials' mu.
func (d *dial) stop() {
	cancel := d.cancel
	d.cancel = func() {}
	cancel()
}

// overdue reports whether the guest should have repeated its SYN long ago.
func (d *dial) overdue(now time.Time) bool {
	next := max(firstRetry, 2*d.gap)
	return now.Sub(d.seen) > max(gaveUpFloor, 2*next)
}

// dials is the set of held SYNs.
type dials struct {
	max, maxPerGuest, maxStrangers int

	mu     sync.Mutex // guards the fields below
	byFlow map[flow.Tuple]*dial
	guests map[netip.Addr]int
	known  map[netip.Addr]struct{} // addresses that completed a handshake
	closed bool
}

// maxKnown bounds the addresses that are remembered. They are forgotten all at once,
// which costs them a repeated SYN at the worst.
const maxKnown = 4096

func (ds *dials) init(most int) {
	ds.max, ds.maxPerGuest, ds.maxStrangers = most, max(1, most*2/3), max(1, most*3/4)
	ds.known = make(map[netip.Addr]struct{})
	ds.byFlow = make(map[flow.Tuple]*dial)
	ds.guests = make(map[netip.Addr]int)
}

// verdicts of begin.
type admission int

const (
	admitted   admission = iota // go on and dial
	repeated                    // this SYN is held already
	replaced                    // the held SYN was another socket's, which has gone
	overDials                   // too many of all guests
	overGuest                   // too many of this one
	closedDown                  // we are about to end
)

// begin holds a SYN. When it is admitted, admit has been called with the lock held and may
// give the dial a context. The dial is returned if it is admitted or repeated.
func (ds *dials) begin(t flow.Tuple, tcpHeader []byte, now time.Time, admit func(*dial)) (*dial, admission) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if d := ds.byFlow[t]; d != nil {
		if !d.gone && quote8(tcpHeader) != d.syn {
			d.giveUp()
			return nil, replaced
		}
		d.gap = max(d.gap, now.Sub(d.seen))
		d.seen = now
		return d, repeated
	}
	guest := t.Guest.Addr()
	switch {
	case ds.closed:
		return nil, closedDown
	case ds.guests[guest] >= ds.maxPerGuest:
		return nil, overGuest
	case len(ds.byFlow) >= ds.max, len(ds.byFlow) >= ds.maxStrangers && !ds.isKnown(guest):
		return nil, overDials
	}
	d := &dial{tuple: t, syn: quote8(tcpHeader), seen: now}
	if len(tcpHeader) > len(d.syn) {
		d.rest = append(d.rest, tcpHeader[len(d.syn):]...)
	}
	d.cancel = func() {}
	ds.byFlow[t] = d
	ds.guests[guest]++
	admit(d)
	return d, admitted
}

// isKnown reports whether guest is real. The caller holds mu.
func (ds *dials) isKnown(guest netip.Addr) bool {
	_, ok := ds.known[guest]
	return ok
}

// know remembers that guest completed a handshake.
func (ds *dials) know(guest netip.Addr) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if len(ds.known) >= maxKnown && !ds.isKnown(guest) {
		clear(ds.known)
	}
	ds.known[guest] = struct{}{}
}

// reset cancels the dial of t whose SYN seq belongs to, and reports whether there was
// one. A socket that sent nothing but a SYN resets with the next number, or the same.
func (ds *dials) reset(t flow.Tuple, seq uint32) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d := ds.byFlow[t]
	if d == nil || d.gone || seq-d.seq() > 1 {
		return false
	}
	if d.held.ownReset {
		d.held.ownReset = false
		return false
	}
	d.giveUp()
	return true
}

// get returns the held SYN of t, which must have been admitted.
func (ds *dials) get(t flow.Tuple) *dial {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	return ds.byFlow[t]
}

// end lets go of t's SYN.
func (ds *dials) end(t flow.Tuple) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d := ds.byFlow[t]
	if d == nil {
		return
	}
	d.stop()
	delete(ds.byFlow, t)
	guest := t.Guest.Addr()
	if ds.guests[guest]--; ds.guests[guest] == 0 {
		delete(ds.guests, guest)
	}
}

func (ds *dials) len() int {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	return len(ds.byFlow)
}

// close refuses every further SYN and cancels the dials in flight.
func (ds *dials) close() {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.closed = true
	for _, d := range ds.byFlow {
		d.stop()
	}
}

// sweepLoop cancels the dials of guests that gave up, until ctx ends.
func (ds *dials) sweepLoop(ctx context.Context, gaveUp func()) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			ds.sweep(now, gaveUp)
		}
	}
}

func (ds *dials) sweep(now time.Time, gaveUp func()) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for _, d := range ds.byFlow {
		if !d.gone && d.overdue(now) {
			d.giveUp()
			gaveUp()
		}
	}
}
