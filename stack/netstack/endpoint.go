package netstack

import (
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/slipway-net/slipway/stack/link"
)

// Theory of operation.
//
// endpoint is gVisor's view of the link. gVisor calls WritePackets with a
// connection's lock held. A write to a TUN device delivers the packet to the guest
// in softirq and may wake the guest's process on this very CPU; its answer then
// meets, on another CPU, a gVisor processor that spins on the lock until we are
// scheduled again (measured by a prototype: 73 % of all CPU, p99 of a connection
// 4 ms instead of 0.8). So WritePackets only queues, and one goroutine writes.
//
// The queue is bounded in packets. When it is full WritePackets waits: the writer
// holds no lock of gVisor's and the device never blocks for long, so it always goes
// on, and a drop would cost a connection its congestion window.

// queueLen is the queue's capacity in packets. With bulk transfers of 4 MiB windows
// in 64 KiB packets it is 64 connections' worth; small packets are cheap to write.
const queueLen = 4096

// endpoint implements stack.LinkEndpoint and stack.GSOEndpoint.
type endpoint struct {
	link  link.Link
	stats *counters

	drained sync.WaitGroup // writeLoop

	dispatchMu sync.RWMutex // guards dispatcher
	dispatcher stack.NetworkDispatcher

	mu     sync.Mutex // guards the fields below
	ready  sync.Cond  // queue is not empty, or closed
	room   sync.Cond  // queue is not full, or closed
	queue  []*stack.PacketBuffer
	closed bool
}

var (
	_ stack.LinkEndpoint = (*endpoint)(nil)
	_ stack.GSOEndpoint  = (*endpoint)(nil)
)

func newEndpoint(l link.Link, c *counters) *endpoint {
	e := &endpoint{link: l, stats: c}
	e.drained.Add(1)
	e.ready.L, e.room.L = &e.mu, &e.mu
	return e
}

// WritePackets implements stack.LinkWriter.
func (e *endpoint) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for n, pkt := range pkts.AsSlice() {
		for len(e.queue) >= queueLen && !e.closed {
			e.stats.queueFull.Add(1)
			e.room.Wait()
		}
		if e.closed {
			return n, &tcpip.ErrClosedForSend{}
		}
		e.queue = append(e.queue, pkt.IncRef())
		if len(e.queue) == 1 {
			e.ready.Signal()
		}
	}
	return pkts.Len(), nil
}

// writeLoop writes what is queued until closeQueue, and then what is left.
func (e *endpoint) writeLoop() {
	defer e.drained.Done()
	var batch []*stack.PacketBuffer
	var parts [][]byte
	for {
		e.mu.Lock()
		for len(e.queue) == 0 && !e.closed {
			e.ready.Wait()
		}
		batch, e.queue = e.queue, batch[:0]
		e.mu.Unlock()
		e.room.Broadcast()
		if len(batch) == 0 {
			return
		}
		for i, pkt := range batch {
			parts = e.write(pkt, parts)
			pkt.DecRef()
			batch[i] = nil
		}
	}
}

// write sends one packet; it returns parts for the next one to use.
func (e *endpoint) write(pkt *stack.PacketBuffer, parts [][]byte) [][]byte {
	parts = parts[:0]
	views, off := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if off > 0 {
			skip := min(off, len(b))
			b, off = b[skip:], off-skip
		}
		if len(b) > 0 {
			parts = append(parts, b)
		}
	}
	if err := e.link.WritePacket(offloadOf(pkt), parts); err != nil {
		e.stats.writeErrors.Add(1)
	} else {
		e.stats.toGuest.Add(pkt.Size())
	}
	clear(parts)
	return parts
}

// offloadOf translates gVisor's GSO options: what is left to the guest's kernel.
func offloadOf(pkt *stack.PacketBuffer) link.Header {
	gso := &pkt.GSOOptions
	if gso.Type == stack.GSONone {
		return link.Header{}
	}
	l3, l4 := len(pkt.NetworkHeader().Slice()), len(pkt.TransportHeader().Slice())
	h := link.Header{
		HdrLen: uint16(l3 + l4),
	}
	if gso.NeedsCsum {
		h.Flags = link.NeedsCsum
		h.CsumStart = uint16(l3)
		h.CsumOffset = gso.CsumOffset
	}
	if pkt.Data().Size() > int(gso.MSS) {
		h.GSOSize = gso.MSS
		switch gso.Type {
		case stack.GSOTCPv4:
			h.GSOType = link.GSOTCPv4
		case stack.GSOTCPv6:
			h.GSOType = link.GSOTCPv6
		}
	}
	return h
}

// closeQueue lets writeLoop return once it has written what is queued.
func (e *endpoint) closeQueue() {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.ready.Broadcast()
	e.room.Broadcast()
}

// deliver gives gVisor a packet from the guest; it takes pkt's reference.
func (e *endpoint) deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	e.dispatchMu.RLock()
	d := e.dispatcher
	e.dispatchMu.RUnlock()
	if d != nil {
		d.DeliverNetworkPacket(proto, pkt)
	}
	pkt.DecRef()
}

// Attach implements stack.NetworkLinkEndpoint.
func (e *endpoint) Attach(d stack.NetworkDispatcher) {
	e.dispatchMu.Lock()
	e.dispatcher = d
	e.dispatchMu.Unlock()
}

// IsAttached implements stack.NetworkLinkEndpoint.
func (e *endpoint) IsAttached() bool {
	e.dispatchMu.RLock()
	defer e.dispatchMu.RUnlock()
	return e.dispatcher != nil
}

// MTU implements stack.NetworkLinkEndpoint.
func (e *endpoint) MTU() uint32 { return uint32(e.link.MTU()) }

// Capabilities implements stack.NetworkLinkEndpoint. Checksums of received packets
// are the reader's business, which knows which were verified. Those of sent packets
// are not claimed: gVisor would leave SYN-ACKs without one.
func (e *endpoint) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

// GSOMaxSize implements stack.GSOEndpoint: the most that fits a packet, less room
// for headers, which gVisor adds.
func (e *endpoint) GSOMaxSize() uint32 {
	return link.MaxPacket - header.IPv6MinimumSize - header.TCPHeaderMaximumSize
}

// SupportedGSO implements stack.GSOEndpoint.
func (e *endpoint) SupportedGSO() stack.SupportedGSO {
	if e.link.Offloads().TSO {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// The rest of stack.NetworkLinkEndpoint has nothing to do on a layer-3 link that
// its owner closes.

// SetMTU implements stack.NetworkLinkEndpoint; a link's MTU is constant.
func (e *endpoint) SetMTU(uint32) {}

// MaxHeaderLength implements stack.NetworkLinkEndpoint.
func (e *endpoint) MaxHeaderLength() uint16 { return 0 }

// LinkAddress implements stack.NetworkLinkEndpoint.
func (e *endpoint) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress implements stack.NetworkLinkEndpoint.
func (e *endpoint) SetLinkAddress(tcpip.LinkAddress) {}

// Wait implements stack.NetworkLinkEndpoint; Run waits for writeLoop.
func (e *endpoint) Wait() {}

// ARPHardwareType implements stack.NetworkLinkEndpoint.
func (e *endpoint) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader implements stack.NetworkLinkEndpoint.
func (e *endpoint) AddHeader(*stack.PacketBuffer) {}

// ParseHeader implements stack.NetworkLinkEndpoint.
func (e *endpoint) ParseHeader(*stack.PacketBuffer) bool { return true }

// Close implements stack.NetworkLinkEndpoint.
func (e *endpoint) Close() {}

// SetOnCloseAction implements stack.NetworkLinkEndpoint.
func (e *endpoint) SetOnCloseAction(func()) {}
