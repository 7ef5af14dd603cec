package forward

import (
	"time"

	"golang.org/x/sys/unix"
)

// A reset discards what the kernel still has to send (SO_LINGER 0). So a side that is to
// be reset behind data is looked at until its peer has acknowledged everything, or takes
// no more. That takes an acknowledgement's time, up to 300 ms from the other side of the
// world. What is counted is the time that was meant to be between the looks: a machine that
// stands still does so for the peer, too.
const (
	drainLook  = 2 * time.Millisecond   // between the first two looks
	drainRest  = 32 * time.Millisecond  // between later ones, while nothing happens
	drainStill = 300 * time.Millisecond // without an acknowledgement: the peer does not read
	drainMost  = 5 * time.Second        // for a peer that reads slowly
)

// drain is the wait of a pair for leg, whose other side was reset.
type drain struct {
	pair  *pair
	leg   *leg
	left  int           // what was unsent at the last look
	still time.Duration // since that has changed
	wait  time.Duration // until the next look
	until time.Time
	timer *time.Timer
}

// look ends the pair when nothing is left to wait for, and else has itself called again.
func (d *drain) look() {
	p := d.pair
	if p.pump(p.other(d.leg), d.leg); p.over {
		return
	}
	left := d.unsent()
	if left != d.left {
		d.left, d.still, d.wait = left, 0, drainLook
	}
	if left == 0 || d.still > drainStill || time.Now().After(d.until) || p.s.closed {
		p.abort()
		return
	}
	if d.timer == nil {
		d.timer = time.AfterFunc(d.wait, func() {
			p.s.loop.Post(func() {
				if !p.over {
					d.timer = nil
					d.still += d.wait
					d.wait = min(2*d.wait, drainRest)
					d.look()
				}
			})
		})
	}
}

// unsent is how many bytes the peer has not acknowledged (SIOCOUTQ, tcp(7)), what the
// socket did not take yet, and what the other side sent before it was reset.
func (d *drain) unsent() int {
	n, err := unix.IoctlGetInt(d.leg.fd, unix.SIOCOUTQ)
	if err != nil {
		return 0
	}
	if unread, err := unix.IoctlGetInt(d.pair.other(d.leg).fd, unix.SIOCINQ); err == nil {
		n += unread
	}
	n += len(d.leg.left)
	if d.leg.pipe != nil {
		n += d.leg.pipe.n
	}
	return n
}
