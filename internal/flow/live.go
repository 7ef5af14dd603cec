package flow

import (
	"net/netip"
	"sync/atomic"
	"time"
)

// State is where a flow stands.
type State uint32

// The states of a flow.
const (
	Dialling State = iota // the guest waits for our verdict
	Open                  // bytes may pass both ways
	HalfOpen              // one side sent FIN
	Closed                // over; the entry leaves the table
)

// String returns "dialling", "open", "half-open" or "closed".
func (s State) String() string {
	return [...]string{"dialling", "open", "half-open", "closed"}[s&3]
}

// Decision says what was done with a flow.
type Decision string

// The decisions.
const (
	Direct  Decision = "direct"  // dialled as asked
	Proxied Decision = "proxied" // through an HTTP or SOCKS proxy
	ToHost  Decision = "host"    // the host alias, sent to the host's loopback
	Denied  Decision = "denied"  // policy said no
	Refused Decision = "refused" // the target, or the network, said no

	// Published flows began at the host: Target is the client of a published port,
	// Guest the address and port of the guest that it reached.
	Published Decision = "published"
)

// Path says how a flow's bytes travel.
type Path string

// The paths.
const (
	Netstack Path = "netstack" // through our TCP/IP stack
	Kernel   Path = "kernel"   // joined sockets on the guest's own kernel
)

// Counter counts one direction of a flow. Bytes are payload bytes.
type Counter struct{ Bytes, Packets atomic.Uint64 }

// Add counts one packet, or one read of a stream, of n bytes.
func (c *Counter) Add(n int) {
	c.Bytes.Add(uint64(n))
	c.Packets.Add(1)
}

// Flow is the entry of one live flow. The fields above the line are set before
// the entry is published and constant from then on; those below change while
// others read and are atomic.
type Flow struct {
	ID      uint64
	Tuple   Tuple
	Name    string         // the name the guest looked up, if known
	Decided Decision       //
	Reason  string         // why, in a few words, where the decision is not Direct
	Path    Path           // the one it was meant for; see Via
	Dialled netip.AddrPort // the address given to the host's kernel; differs from Target for ToHost and Proxied
	Started time.Time

	state   atomic.Uint32
	fell    atomic.Bool
	last    atomic.Int64 // unix nanoseconds of the last packet either way
	ToHost  Counter      // guest to target
	ToGuest Counter      // target to guest
}

// State returns where the flow stands.
func (f *Flow) State() State { return State(f.state.Load()) }

// SetState moves the flow on.
func (f *Flow) SetState(s State) { f.state.Store(uint32(s)) }

// Touch notes that a packet passed at t.
func (f *Flow) Touch(t time.Time) { f.last.Store(t.UnixNano()) }

// LastSeen returns the time of the last Touch, or Started.
func (f *Flow) LastSeen() time.Time {
	if n := f.last.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return f.Started
}

// FallBack notes that a flow meant for the kernel path goes through netstack after all.
func (f *Flow) FallBack() { f.fell.Store(true) }

// Via returns the path that the flow's bytes take, and why where it is not the one
// that it was meant for.
func (f *Flow) Via() (p Path, why string) {
	if f.fell.Load() {
		return Netstack, "the guest's own rules let no answer of the kernel path through"
	}
	return f.Path, ""
}
