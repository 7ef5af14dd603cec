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
// end of something that was cut off. What was read before a reset is delivered first.
// When both directions have ended in order both sides are closed.
//
// Counters are kept here, in the flow's entry, and not by wrapping connections.

// relay is one running pair.
type relay struct {
	guest, host flow.Conn
	flow        *flow.Flow
	resetting   atomic.Bool // one side was reset, and the other hears of it soon
	aborted     atomic.Bool
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
	// resetMost is how long it may take to acknowledge what was written before: a
	// side that does not read must hear of the reset, too.
	resetMost = 500 * time.Millisecond
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
	for end := time.Now().Add(resetMost); !dst.Drained() && !r.aborted.Load() && time.Now().Before(end); {
		time.Sleep(resetLook)
	}
	time.Sleep(resetLook) // for the last segment
}

// fail ends both directions because something could not be written, unless reset is
// about to do it.
func (r *relay) fail() {
	if !r.resetting.Load() {
		r.abort()
	}
}

// Relay joins guest with v.Host until both have ended, or ctx does, and closes both.
func (f *Forwarder) Relay(ctx context.Context, guest flow.Conn, v flow.Verdict) {
	r := &relay{guest: guest, host: v.Host, flow: v.Flow}
	defer f.close(r.flow)
	if !opened(v.Host) || !f.begin(r) {
		r.abort()
		return
	}
	defer f.end(r)
	defer context.AfterFunc(ctx, r.abort)()

	var back sync.WaitGroup
	back.Go(func() { r.pump(r.guest, r.host, &r.flow.ToGuest, &f.pool) })
	r.pump(r.host, r.guest, &r.flow.ToHost, &f.pool)
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

// pump carries one direction to its end.
func (r *relay) pump(dst, src flow.Conn, count *flow.Counter, pool *flow.BufPool) {
	for {
		buf, err := src.ReadBuf(pool)
		if errors.Is(err, io.EOF) {
			r.flow.SetState(flow.HalfOpen)
			if dst.CloseWrite() != nil {
				r.fail() // the other side was reset meanwhile
			}
			return
		}
		if err != nil {
			r.reset(dst)
			return
		}
		n, err := dst.Write(buf.Bytes)
		pool.Put(buf)
		if n > 0 {
			count.Add(n)
		}
		if err != nil {
			r.fail()
			return
		}
	}
}
