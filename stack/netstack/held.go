package netstack

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

// Theory of operation.
//
// With a kernel path the SYNs of guests do not reach gVisor. They are held here as all
// others are (dials.go), the target is dialled without a goroutine, and what the guest
// gets is written by hand: a RST, an ICMP error, nothing, or, when the target is
// connected, the kernel path's answer: a connection that we never see a packet of.
//
// When the guest's kernel does not complete the handshake (stack/kernel tells why that
// can be), the connected socket is kept until the guest repeats its SYN, and then gVisor
// answers as it would have without a kernel path. The half-open connection that may
// be in the guest's kernel is reset first, as it would catch the guest's packets. Such
// a guest's next connections go to gVisor at once, for detourTime.
//
// A segment of a connection that the guest's kernel has is given back to it, SYN or not.
// A repeated SYN may have waited in the device's queue while the first was answered; and
// other segments come out when the rules that keep them inside are missing for a moment,
// or conntrack has forgotten the connection. Only a SYN-ACK, which answers a Handshake, is
// ours: the guest repeats it, and gets the last ACK again (handshake.go).
//
// A SYN of more than headLen bytes (one that carries data) and one for a connection
// that gVisor has are gVisor's.

// detourTime is how long a guest's connections avoid the kernel path after it failed.
const detourTime = time.Minute

// maxDetours bounds the guests that are remembered; beyond it they are forgotten all at
// once, which costs each a repeated SYN.
const maxDetours = 1024

// Kernel is the kernel path.
type Kernel interface {
	// Begin decides about t and dials its target; then is called once with the
	// verdict, before Begin returns, which then returns nil, or later. cancel may be
	// called at any time and makes then be called soon, if it was not.
	Begin(t flow.Tuple, then func(flow.Verdict)) (cancel func())

	// Answer has the guest's kernel answer syn, which was read with h, and takes
	// over v; or it calls then with false, and v stays the caller's.
	Answer(t flow.Tuple, syn []byte, h link.Header, v flow.Verdict, then func(ok bool))

	// Live reports whether t is a connection that the guest's kernel has.
	Live(t flow.Tuple) bool

	// Do has f called on the goroutine that reads the link, waits for it, and reports whether
	// it was called, which it is not at the end. Any other goroutine may call it.
	Do(f func()) bool
}

// kernelPath is what a Stack knows about it. But for mu's, its fields belong to the
// goroutine that reads the link.
type kernelPath struct {
	Kernel
	v4, v6  bool // in use
	probes  map[flow.Tuple]func(ok bool)
	detours map[netip.Addr]time.Time // guests, until when

	used4, used6 atomic.Bool // v4 and v6, for others

	mu    sync.Mutex // guards the field below
	todos []func()
}

// UseKernel says which families' connections take the kernel path from now on.
func (s *Stack) UseKernel(v4, v6 bool) {
	s.kernelDo(func(k *kernelPath) { k.v4, k.v6 = v4, v6 })
	s.kernel.used4.Store(v4)
	s.kernel.used6.Store(v6)
}

// ProbeKernel has the next SYN of t answered by the kernel path, and calls done with
// how it went, if that SYN comes.
func (s *Stack) ProbeKernel(t flow.Tuple, done func(ok bool)) {
	s.kernelDo(func(k *kernelPath) {
		if k.probes == nil {
			k.probes = make(map[flow.Tuple]func(bool))
		}
		k.probes[t] = done
	})
}

// kernelDo has f called before the next packet is looked at.
func (s *Stack) kernelDo(f func(k *kernelPath)) {
	k := &s.kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	k.todos = append(k.todos, func() { f(k) })
	s.kernelTodo.Store(true)
}

// catchUp runs what kernelDo was given.
func (k *kernelPath) catchUp() {
	k.mu.Lock()
	todos := k.todos
	k.todos = nil
	k.mu.Unlock()
	for _, f := range todos {
		f()
	}
}

// serves reports whether connections to a take the kernel path.
func (k *kernelPath) serves(a netip.Addr) bool {
	if a.Is4() {
		return k.v4
	}
	return k.v6
}

// inUse is serves for any goroutine.
func (k *kernelPath) inUse(a netip.Addr) bool {
	if a.Is4() {
		return k.used4.Load()
	}
	return k.used6.Load()
}

// avoids reports whether guest's connections take the detour for now.
func (k *kernelPath) avoids(guest netip.Addr) bool {
	if len(k.detours) == 0 {
		return false
	}
	until, ok := k.detours[guest]
	if ok && time.Now().After(until) {
		delete(k.detours, guest)
		return false
	}
	return ok
}

func (k *kernelPath) avoid(guest netip.Addr) {
	if k.detours == nil || len(k.detours) >= maxDetours {
		k.detours = make(map[netip.Addr]time.Time)
	}
	k.detours[guest] = time.Now().Add(detourTime)
}

// hold takes the segment if it is a SYN for the kernel path, and reports whether it
// did. Its checksum is right.
func (r *reader) hold(ip *ipInfo, segment []byte, toGateway bool) bool {
	s := r.s
	if s.kernel.Kernel == nil || len(segment) < header.TCPMinimumSize {
		return false
	}
	h := header.TCP(segment)
	t := flow.Tuple{
		Proto:  flow.TCP,
		Guest:  netip.AddrPortFrom(ip.src, h.SourcePort()),
		Target: netip.AddrPortFrom(ip.dst, h.DestinationPort()),
	}
	if s.out.byHand.Load() > 0 && s.byHand(t, h) {
		return true
	}
	if s.kernel.Live(t) {
		if h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn|header.TCPFlagAck {
			s.completeAgain(t, h)
		} else {
			r.giveBack()
		}
		return true
	}
	if r.n > headLen || h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck|header.TCPFlagRst|header.TCPFlagFin) != header.TCPFlagSyn {
		return false
	}
	if s.kernelTodo.Swap(false) {
		s.kernel.catchUp()
	}
	if done := s.kernel.probes[t]; done != nil {
		delete(s.kernel.probes, t)
		s.kernel.Answer(t, r.head[:r.n], r.hdr, flow.Verdict{}, done)
		return true
	}
	if toGateway || !s.kernel.serves(ip.dst) || s.kernel.avoids(ip.src) || s.hasConnection(t) {
		return false
	}
	if ip.hops <= 1 {
		s.unreachable(t, quote8(h), h[8:], flow.Verdict{ICMP: timeExceededFor(ip.src)})
		return true
	}
	return r.dial(t, h)
}

// giveBack writes the packet that was read into the guest's kernel.
func (r *reader) giveBack() {
	parts := [][]byte{r.head[:min(r.n, headLen)], nil}
	if r.n > headLen {
		parts[1] = r.chunk.AsSlice()[headLen:r.n]
	}
	r.s.stats.givenBack.Add(1)
	if err := r.s.cfg.Link.WritePacket(r.hdr, parts); err != nil {
		r.s.stats.writeErrors.Add(1)
	}
}

// hasConnection reports whether t is a connection of gVisor's.
func (s *Stack) hasConnection(t flow.Tuple) bool {
	if s.served.Load() == 0 {
		return false
	}
	return s.ip.FindTransportEndpoint(protocolOf(t.Guest.Addr()), tcp.ProtocolNumber, stack.TransportEndpointID{
		LocalPort: t.Target.Port(), LocalAddress: toTCPIP(t.Target.Addr()),
		RemotePort: t.Guest.Port(), RemoteAddress: toTCPIP(t.Guest.Addr()),
	}, nicID) != nil
}

// dial admits the SYN and begins to dial. It returns false when gVisor is to see it.
func (r *reader) dial(t flow.Tuple, h header.TCP) bool {
	s := r.s
	d, a := s.dials.begin(t, h, time.Now(), func(*dial) { s.flows.Add(1) })
	if a == repeated && s.dials.keeps(d) {
		return false
	}
	if !s.admitted(a) {
		return true
	}
	d.held.n, d.held.hdr = copy(d.held.packet[:], r.head[:r.n]), r.hdr
	s.dials.canBeCancelled(d, s.kernel.Begin(t, func(v flow.Verdict) { s.decided(d, v) }))
	return true
}

// decided gives the guest its answer.
func (s *Stack) decided(d *dial, v flow.Verdict) {
	switch v.Answer {
	case flow.Connect:
		if !s.dials.dialled(d) {
			s.forward.Discard(v)
			break
		}
		held := &d.held
		s.kernel.Answer(d.tuple, held.packet[:held.n], held.hdr, v, func(ok bool) { s.answered(d, v, ok) })
		return
	case flow.Reset:
		s.resetGuest(d)
	case flow.Unreachable:
		s.unreachable(d.tuple, d.syn, d.rest, v)
	}
	s.dials.end(d.tuple)
	s.flows.Done()
}

// answered ends the hold of a SYN that the kernel path answered, or prepares the
// detour.
func (s *Stack) answered(d *dial, v flow.Verdict, ok bool) {
	if ok {
		s.dials.know(d.tuple.Guest.Addr())
		s.dials.end(d.tuple)
		s.flows.Done()
		return
	}
	s.stats.detours.Add(1)
	s.forgetHalfOpen(d)
	if !s.dials.keep(d, v, func() {
		s.forward.Discard(v)
		s.dials.end(d.tuple)
		s.flows.Done()
	}) {
		s.forward.Discard(v)
		s.dials.end(d.tuple)
		s.flows.Done()
	}
}

// resetGuest answers the held SYN with a RST (RFC 9293 section 3.10.7.1).
func (s *Stack) resetGuest(d *dial) {
	s.writeSegment(d.tuple.Target, d.tuple.Guest, header.TCPFields{
		AckNum: d.seq() + 1, Flags: header.TCPFlagRst | header.TCPFlagAck,
	}, nil)
}

// forgetHalfOpen has the guest's kernel forget the connection that the held SYN may
// have begun there: a RST of the guest's in its place. Where there is none, and the guest
// forwards, the RST comes out again.
func (s *Stack) forgetHalfOpen(d *dial) {
	s.dials.ignoreReset(d)
	s.writeSegment(d.tuple.Guest, d.tuple.Target, header.TCPFields{SeqNum: d.seq() + 1, Flags: header.TCPFlagRst}, nil)
}

// writeSegment writes a TCP segment without data into the guest's kernel. The options are
// padded.
func (s *Stack) writeSegment(src, dst netip.AddrPort, f header.TCPFields, options []byte) {
	p := newPacket(src.Addr(), dst.Addr(), header.TCPProtocolNumber, 0, 0)
	defer p.free()
	n := header.TCPMinimumSize + len(options)
	f.SrcPort, f.DstPort, f.DataOffset = src.Port(), dst.Port(), uint8(n)
	h := header.TCP(p.transport(n))
	h.Encode(&f)
	copy(h[header.TCPMinimumSize:], options)
	h.SetChecksum(0)
	h.SetChecksum(^checksum.Checksum(h, pseudo(src.Addr(), dst.Addr(), header.TCPProtocolNumber, len(h))))
	s.writePacket(p, link.Header{}, nil)
}

// heldSYN is the packet of a SYN that waits for the kernel path.
type heldSYN struct {
	packet [headLen]byte
	n      int
	hdr    link.Header

	kept     *flow.Verdict // for gVisor, once the kernel path failed
	ownReset bool          // the next RST may be ours
}

// canBeCancelled notes how to cancel the dial of d, nil meaning that it is over.
func (ds *dials) canBeCancelled(d *dial, cancel func()) {
	if cancel == nil {
		return
	}
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if d.gone || ds.closed {
		cancel()
		return
	}
	d.cancel = cancel
}

// dialled notes that d's dial is over, and reports whether the guest still waits.
func (ds *dials) dialled(d *dial) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d.cancel = func() {}
	return !d.gone && !ds.closed
}

// keep keeps v until the guest repeats its SYN, or calls discard if it gives up. It
// reports false if it has done so already, and v is the caller's.
func (ds *dials) keep(d *dial, v flow.Verdict, discard func()) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if d.gone || ds.closed {
		return false
	}
	d.held.kept = &v
	d.cancel = func() {
		if d.held.kept != nil { // once
			d.held.kept = nil
			go discard() // needs mu, which our caller holds
		}
	}
	return true
}

// keeps reports whether d's verdict is kept for gVisor.
func (ds *dials) keeps(d *dial) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	return d.held.kept != nil
}

// ignoreReset has the next RST for d, which may be our own, mean nothing.
func (ds *dials) ignoreReset(d *dial) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d.held.ownReset = true
}

// detour gives the kept verdict to gVisor, which has the repeated SYN, and reports
// whether there was one.
func (ds *dials) detour(d *dial, parent context.Context) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if d.gone || d.held.kept == nil || d.ctx != nil {
		return false
	}
	d.ctx, d.cancel = context.WithCancel(parent)
	return true
}

// holds reports whether the SYN of t is held for the kernel path.
func (ds *dials) holds(t flow.Tuple) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d := ds.byFlow[t]
	return d != nil && d.held.n > 0
}
