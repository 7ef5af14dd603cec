package forward

// TCPStats are counters since the start, but for Flows, which is now.
type TCPStats struct {
	Flows int `json:"flows"` // being dialled or open
	Limit int `json:"limit"` // most flows

	Connected    uint64 `json:"connected"`
	Refused      uint64 `json:"refused"`       // by the target
	Unreachable  uint64 `json:"unreachable"`   // said a router or the host's kernel
	TimedOut     uint64 `json:"timed_out"`     // nobody answered
	Denied       uint64 `json:"denied"`        // by policy
	Cancelled    uint64 `json:"cancelled"`     // the guest gave up first
	Failed       uint64 `json:"failed"`        // for want of a descriptor, port or memory on the host
	FlowLimit    uint64 `json:"flow_limit"`    // beyond the limit of flows that guests begin
	GuestLimit   uint64 `json:"guest_limit"`   // beyond one guest address's share of it
	InboundLimit uint64 `json:"inbound_limit"` // clients of published ports beyond the limit of their flows, or of those that wait for the guest
}

// Stats is what happened to the guest's flows.
type Stats struct {
	TCP  TCPStats
	UDP  UDPStats
	Ping PingStats
}

// Stats returns the counters. It may be called at any time.
func (f *Forwarder) Stats() Stats {
	c := &f.stats
	udp := f.udp.stats()
	udp.Clients, udp.ClientsEvicted = f.ports.len(), f.ports.evicted.Load()
	return Stats{
		TCP: TCPStats{
			Flows: f.tcp.len() + f.in.flows.len(), Limit: f.tcp.most + f.in.flows.most,
			Connected: c.connected.Load(), Refused: c.refused.Load(), Unreachable: c.unreachable.Load(),
			TimedOut: c.timedOut.Load(), Denied: c.denied.Load(), Cancelled: c.cancelled.Load(), Failed: c.failed.Load(),
			FlowLimit: f.tcp.refused.Load(), GuestLimit: f.tcp.refusedGuest.Load(), InboundLimit: f.in.limited(),
		},
		UDP:  udp,
		Ping: f.pings.stats(),
	}
}

// PingMode says how pings leave the host.
func (f *Forwarder) PingMode() PingMode { return f.pings.mode() }
