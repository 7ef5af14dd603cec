package flow

import "net/netip"

// Datagram is one UDP datagram, or a train of them that share a header, on its
// way between Guest and Target. Which of the two is the sender depends on who
// hands it over.
type Datagram struct {
	Guest, Target netip.AddrPort

	// Payload is what follows the UDP header, possibly empty. It is borrowed:
	// it may be reused as soon as the call that carries it returns.
	Payload []byte

	// Segment is zero for a single datagram. Otherwise Payload is to be cut
	// into datagrams of Segment bytes each, the last one possibly shorter
	// (UDP GSO: UDP_SEGMENT of udp(7), VIRTIO_NET_HDR_GSO_UDP_L4).
	Segment int

	// Hops is the TTL or hop limit that is left for the network behind us: we
	// count as a router and have taken ours. At least 1. Zero asks for the
	// default, 64.
	Hops uint8

	// TOS is the IPv4 TOS or IPv6 traffic class octet.
	TOS uint8

	// DontFragment is the IPv4 DF bit; always true for IPv6 datagrams that
	// arrived in one piece.
	DontFragment bool
}

// Echo is an ICMP echo request on its way to Target, or the reply on its way to
// Guest.
type Echo struct {
	Guest, Target netip.Addr
	ID, Seq       uint16
	Payload       []byte // what follows the 8-byte ICMP header; borrowed as in Datagram
	Hops          uint8  // as in Datagram
	TOS           uint8  // as in Datagram
	DontFragment  bool   // as in Datagram
}

// Error is an ICMP error about a packet that Guest sent to Target.
type Error struct {
	Tuple // for Ping, Guest.Port is the echo identifier and Target.Port the sequence number

	ICMP ICMP
	From netip.Addr // who reports it; the zero Addr stands for our gateway
	MTU  uint32     // for fragmentation needed and packet too big: the next hop's MTU in bytes

	// Quote is as much of the offending packet's transport payload as is
	// known, without the UDP or ICMP header; borrowed as in Datagram.
	Quote []byte
	// Size is the length in bytes of the offending packet's whole transport
	// payload; zero means len(Quote).
	Size int
}

// Guest is the stack as forward sees it: a way to send packets to the guest that
// belong to no TCP connection. The methods may be called by several goroutines.
// They wait while the device is full and return an error only when the link is
// closed or the packet cannot be expressed (payload too long).
type Guest interface {
	WriteDatagram(Datagram) error // from Target to Guest
	WriteEcho(Echo) error         // an echo reply from Target to Guest
	WriteError(Error) error       // rate limits are the caller's business
}
