package netstack

import "sync/atomic"

// traffic counts packets and bytes of one direction.
type traffic struct{ packets, bytes atomic.Uint64 }

// Add counts one packet of n bytes.
func (t *traffic) Add(n int) {
	t.packets.Add(1)
	t.bytes.Add(uint64(n))
}

// counters are the stack's own; gVisor keeps its own too.
type counters struct {
	fromGuest, toGuest traffic

	martian     atomic.Uint64
	malformed   atomic.Uint64
	badChecksum atomic.Uint64
	ignored     atomic.Uint64
	queueFull   atomic.Uint64
	writeErrors atomic.Uint64
	dialLimit   atomic.Uint64
	guestLimit  atomic.Uint64
	gaveUp      atomic.Uint64
	detours     atomic.Uint64
	givenBack   atomic.Uint64
}

// Stats is what happened on a Stack's link since it was made. Bytes are bytes of IP
// packets; a packet longer than the MTU counts once.
type Stats struct {
	FromGuestPackets uint64 `json:"from_guest_packets"`
	FromGuestBytes   uint64 `json:"from_guest_bytes"`
	ToGuestPackets   uint64 `json:"to_guest_packets"`
	ToGuestBytes     uint64 `json:"to_guest_bytes"`

	QueueWaits uint64 `json:"queue_waits"` // packets that waited because the queue towards the guest was full

	Dials  int    `json:"dials"`          // connections whose target is being dialled now
	GaveUp uint64 `json:"guests_gave_up"` // dials cancelled because the guest stopped asking

	// Detours counts connections of the kernel path that the guest's kernel did not
	// complete, and that took netstack if the guest still wanted them.
	Detours uint64 `json:"detours"`

	// GivenBack counts segments of connections that the guest's kernel has, which came
	// out nevertheless.
	GivenBack uint64 `json:"given_back"`

	Drops Drops `json:"drops"`
}

// Drops counts packets that went no further, by reason.
type Drops struct {
	Martian     uint64 `json:"martian"`      // a source or destination that may not appear on a wire
	Malformed   uint64 `json:"malformed"`    // no IP packet, or shorter than it says
	BadChecksum uint64 `json:"bad_checksum"` // of an IPv4 header, a segment, a datagram or an echo request
	Ignored     uint64 `json:"ignored"`      // multicast, broadcast and protocols that are not carried
	Invalid     uint64 `json:"invalid"`      // found wrong by gVisor: headers, fragments, segments
	WriteErrors uint64 `json:"write_errors"` // the device refused a packet
	DialLimit   uint64 `json:"dial_limit"`   // SYNs beyond the limit of dials in flight
	GuestLimit  uint64 `json:"guest_limit"`  // SYNs beyond one guest address's share of it
}

// Stats returns the counters. It may be called at any time.
func (s *Stack) Stats() Stats {
	c, g := &s.stats, s.ip.Stats()
	return Stats{
		FromGuestPackets: c.fromGuest.packets.Load(),
		FromGuestBytes:   c.fromGuest.bytes.Load(),
		ToGuestPackets:   c.toGuest.packets.Load(),
		ToGuestBytes:     c.toGuest.bytes.Load(),
		QueueWaits:       c.queueFull.Load(),
		Dials:            s.dials.len(),
		GaveUp:           c.gaveUp.Load(),
		Detours:          c.detours.Load(),
		GivenBack:        c.givenBack.Load(),
		Drops: Drops{
			Martian:     c.martian.Load(),
			Malformed:   c.malformed.Load(),
			BadChecksum: c.badChecksum.Load(),
			Ignored:     c.ignored.Load(),
			Invalid: g.IP.MalformedPacketsReceived.Value() + g.IP.MalformedFragmentsReceived.Value() +
				g.IP.InvalidDestinationAddressesReceived.Value() + g.IP.InvalidSourceAddressesReceived.Value() +
				g.TCP.InvalidSegmentsReceived.Value() + g.TCP.ChecksumErrors.Value() +
				g.UDP.MalformedPacketsReceived.Value() + g.UDP.ChecksumErrors.Value(),
			WriteErrors: c.writeErrors.Load(),
			DialLimit:   c.dialLimit.Load(),
			GuestLimit:  c.guestLimit.Load(),
		},
	}
}
