package flow

import "net/netip"

// Answer is what a guest's attempt to reach a target gets.
type Answer uint8

// The answers. The zero Answer is Silence: a mistake must not open a flow.
const (
	Silence     Answer = iota // nothing at all, as when a network drops the packet
	Connect                   // the target answered: complete the guest's handshake
	Reset                     // the target refused: TCP RST, or ICMP port unreachable for UDP
	Unreachable               // a router or the host's kernel said no: the same ICMP to the guest
)

// String returns "silence", "connect", "reset" or "unreachable".
func (a Answer) String() string {
	return [...]string{"silence", "connect", "reset", "unreachable"}[a&3]
}

// ICMP is the type and code of an ICMP (RFC 792) or ICMPv6 (RFC 4443) message;
// the family is that of the target it is about.
type ICMP struct{ Type, Code uint8 }

// Verdict is forward's answer to a Tuple.
type Verdict struct {
	Answer Answer
	ICMP   ICMP       // for Unreachable
	From   netip.Addr // for Unreachable: the router that said so; the zero Addr stands for our gateway
	MTU    uint32     // for Unreachable with "too big": the next hop's MTU in bytes; else 0
	Host   Conn       // for Connect: the connected host socket; owned by whoever gets the Verdict
	Flow   *Flow      // the flow's entry; nil where no entry was made (denied before it could cost anything)
}
