// Package flow holds the words every part of slipway shares: which flow a packet
// belongs to, what was decided about it, and what travels in it. It has no
// behaviour beyond that and imports nothing of ours, so both paths, the
// forwarder and the API can speak of the same thing.
//
// Sides are named by the wire: the guest is the initiating side, the target is
// the address the guest asked for, the host is where slipway's sockets live.
package flow

import (
	"fmt"
	"net/netip"
)

// Proto is the kind of a flow.
type Proto uint8

// The kinds of flows. The zero Proto is invalid.
const (
	TCP  Proto = iota + 1 // one TCP connection
	UDP                   // one UDP mapping: all datagrams of one guest address and port
	Ping                  // the ICMP echo requests of one guest address and identifier
)

// String returns "tcp", "udp" or "ping".
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case Ping:
		return "ping"
	}
	return fmt.Sprintf("proto(%d)", uint8(p))
}

// MarshalText implements encoding.TextMarshaler with String.
func (p Proto) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (p *Proto) UnmarshalText(b []byte) error {
	for q := TCP; q <= Ping; q++ {
		if q.String() == string(b) {
			*p = q
			return nil
		}
	}
	return fmt.Errorf("protocol %q: not one of tcp, udp, ping", b)
}

// Tuple names one flow as the guest sees it, before any translation. Addresses
// are never v4-in-v6. For Ping, Guest.Port is the echo identifier and
// Target.Port is zero.
type Tuple struct {
	Proto  Proto
	Guest  netip.AddrPort // the initiating side, inside the namespace or VM
	Target netip.AddrPort // what the guest asked for; what is dialled is the forwarder's business
}

// String returns "tcp 192.168.65.3:40000 > 198.51.100.7:443".
func (t Tuple) String() string {
	return fmt.Sprintf("%v %v > %v", t.Proto, t.Guest, t.Target)
}
