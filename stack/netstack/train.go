package netstack

import (
	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// A guest that sends many datagrams to one target sends them one by one, and they lie in
// the device's queue one by one. When the reader takes several in a turn, those that
// follow each other with the same addresses, header and size are collected and given to
// the forwarder as one train, which the host's kernel cuts again (UDP_SEGMENT): the way
// down its network stack is most of what a datagram costs. What goes over the host's
// wires is the same. Nothing waits for anything: what the turn has brought is handed on
// at its end.

// trainMost is how many datagrams are collected; every kernel with UDP_SEGMENT takes 64.
const trainMost = 64

// train is what the turn has brought last. It belongs to the reading goroutine.
type train struct {
	d     flow.Datagram // its Payload is memory
	n     int           // datagrams in it
	short bool          // the last one is shorter than Segment: there can be no further
	mem   [maxUDPPayload]byte
}

// collect takes d and reports whether it did; else it is for somebody else, and the train
// has been sent.
func (s *Stack) collect(d *flow.Datagram) bool {
	t := s.train
	if t == nil || d.Segment != 0 || len(d.Payload) == 0 || len(d.Payload) > s.cfg.Link.MTU() {
		s.sendTrain()
		return false
	}
	if t.n > 0 && !t.fits(d) {
		s.sendTrain()
	}
	if t.n == 0 {
		payload := d.Payload
		t.d, t.short = *d, false
		t.d.Segment, t.d.Payload = len(payload), t.mem[:0]
	}
	t.short = len(d.Payload) < t.d.Segment
	t.d.Payload = append(t.d.Payload, d.Payload...)
	t.n++
	return true
}

// fits reports whether d can be the next of the train.
func (t *train) fits(d *flow.Datagram) bool {
	return !t.short && t.n < trainMost && len(d.Payload) <= t.d.Segment &&
		len(t.d.Payload)+len(d.Payload) <= len(t.mem) &&
		t.d.Guest == d.Guest && t.d.Target == d.Target &&
		t.d.Hops == d.Hops && t.d.TOS == d.TOS && t.d.DontFragment == d.DontFragment
}

// sendTrain hands on what was collected.
func (s *Stack) sendTrain() {
	t := s.train
	if t == nil || t.n == 0 {
		return
	}
	if t.n == 1 {
		t.d.Segment = 0
	}
	t.n = 0
	s.forward.Datagram(t.d)
}
