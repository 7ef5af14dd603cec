package forward

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// A relay joins the guest's connection with the host socket that was dialled for
// it. Each direction is a loop: wait until there is something to read, take a buffer
// from the pool, read, write, give the buffer back. An idle flow holds no buffer.
// There is no queue between the two sides: who writes faster than the other side
// reads is held back by its own window, and a flow never holds more than a buffer a
// direction beside what the two TCPs hold.
//
// A FIN is passed on as a half close and ends that direction only (RFC 9293 section
// 3.6); the other may go on for as long as it likes. A reset, or any other error,
// ends both directions with a reset of both sides: a guest must not see an orderly
// end of something that was cut off. What was sent before a reset is delivered first, also
// where it is a write that meets the reset.
// When both directions have ended in order both sides are closed.
//
// Counters are kept here, in the flow's entry, and not by wrapping connections.

// relay is one running pair.
type relay struct {
	guest, host     flow.Conn
	flow            *flow.Flow
	toHost, toGuest direction
	resetting       atomic.Bool // one side was reset, and the other hears of it soon
	aborted         atomic.Bool
}

// direction is one of a relay's two.
type direction struct {
	dst, src flow.Conn
	count    *flow.Counter
	ended    atomic.Bool
}

func newRelay(guest, host flow.Conn, fl *flow.Flow) *relay {
	return &relay{
		guest: guest, host: host, flow: fl,
		toHost:  direction{dst: host, src: guest, count: &fl.ToHost},
		toGuest: direction{dst: guest, src: host, count: &fl.ToGuest},
	}
}

// abort resets both sides and so ends both directions.
func (r *relay) abort() {
	r.aborted.Store(true)
	r.guest.Abort()
	r.host.Abort()
}

const (
	// resetLook is how often a side that is to be reset is looked at.
	resetLook = 2 * time.Millisecond
	// resetMost is how many looks it may take to acknowledge what was written before, half a
	// second: a side that does not read must hear of the reset, too. A machine that stands
	// still does not look.
	resetMost = 250
	// resetStill is how many looks what was sent before a reset may stay where it is, and
	// failMost how many it may take altogether.
	resetStill = 100
	failMost   = 2500
)

// reset passes the reset of one side on to the other, dst, behind what was written to
// it: a server that refuses an upload answers and closes with what it did not read, and
// the guest must get the answer.
func (r *relay) reset(dst flow.Conn) {
	if r.resetting.Swap(true) {
		return // so was the other
	}
	defer r.abort()
	if dst == r.host {
		r.guest.Abort()
	} else {
		r.host.Abort()
	}
	for look := 0; look < resetMost && !dst.Drained() && !r.aborted.Load(); look++ {
		time.Sleep(resetLook)
	}
	time.Sleep(resetLook) // for the last segment
}

// fail ends both directions because the side that d writes to takes no more. back brings what
// that has sent before, meets the reset behind it, and passes it on, unless its other side does
// not read. If it has met an end before the reset, that is for us to do.
func (r *relay) fail(d, back *direction) {
	d.ended.Store(true)
	passed, still := back.count.Packets.Load(), 0
	for look := 0; look < failMost && still < resetStill; look++ {
		if r.resetting.Load() || r.aborted.Load() {
			return
		}
		if back.ended.Load() {
			r.reset(back.dst)
			return
		}
		if n := back.count.Packets.Load(); n != passed {
			passed, still = n, 0
		}
		time.Sleep(resetLook)
		still++
	}
	if !r.resetting.Load() {
		r.abort()
	}
}

// Relay joins guest with v.Host until both have ended, or ctx does, and closes both.
func (f *Forwarder) Relay(ctx context.Context, guest flow.Conn, v flow.Verdict) {
	r := newRelay(guest, v.Host, v.Flow)
	defer f.close(r.flow)
	if !opened(v.Host) || !f.begin(r) {
		r.abort()
		return
	}
	defer f.end(r)
	defer context.AfterFunc(ctx, r.abort)()

	var back sync.WaitGroup
	back.Go(func() { r.pump(&r.toGuest, &r.toHost, &f.pool) })
	r.pump(&r.toHost, &r.toGuest, &f.pool)
	back.Wait()
	r.host.Close()
	r.guest.Close() // last, for it may wait
}

// opener is a Conn that has to be made usable before the first read or write.
type opener interface{ open() error }

func opened(c flow.Conn) bool {
	o, ok := c.(opener)
	return !ok || o.open() == nil
}

// begin and end keep the set of running relays, for Close.
func (f *Forwarder) begin(r *relay) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return false
	}
	f.relays[r] = struct{}{}
	return true
}

func (f *Forwarder) end(r *relay) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.relays, r)
	if len(f.relays) == 0 {
		f.idle.Broadcast()
	}
}

// pump carries one direction to its end; back is the other.
func (r *relay) pump(d, back *direction, pool *flow.BufPool) {
	defer d.ended.Store(true)
	for {
		buf, err := d.src.ReadBuf(pool)
		if errors.Is(err, io.EOF) {
			r.flow.SetState(flow.HalfOpen)
			if d.dst.CloseWrite() != nil {
				r.fail(d, back) // the other side was reset meanwhile
			}
			return
		}
		if err != nil {
			r.reset(d.dst)
			return
		}
		n, err := d.dst.Write(buf.Bytes)
		pool.Put(buf)
		if n > 0 {
			d.count.Add(n)
		}
		if err != nil {
			r.fail(d, back)
			return
		}
	}
}
