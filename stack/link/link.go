// Package link carries whole IP packets between a guest and a stack, with the
// offload header that lets one of them be up to 64 KiB long although the wire's
// MTU is 1500. It knows nothing of what is in the packets.
//
// Open a Link, read it from one goroutine, write it from any number, Close it.
package link

import "errors"

// Values of Header.Flags and Header.GSOType, from linux/virtio_net.h.
const (
	NeedsCsum = 1 // the transport checksum holds only the pseudo header's sum
	DataValid = 2 // somebody verified the checksums already

	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOUDPL4 = 5    // a train of datagrams of GSOSize bytes of payload each
	GSOECN   = 0x80 // or-ed to a TCP type: the first segment carries CWR
)

// Header is struct virtio_net_hdr: what the sender left for the receiver, or its
// hardware, to do. The zero Header is a plain, complete packet.
type Header struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // bytes of headers in front of the payload, a hint
	GSOSize    uint16 // bytes of payload of each packet to be cut
	CsumStart  uint16 // where summing starts, from the start of the packet
	CsumOffset uint16 // where the sum goes, from CsumStart
}

// MaxPacket is the longest packet a Link carries, in bytes of IP packet.
const MaxPacket = 65535

// Offloads says which work a Link may leave to the other side, and which of it
// the kernel refused when asked.
type Offloads struct {
	Accepted []string // of "csum", "tso4", "tso6", "ecn", "uso"
	Refused  []string
	TSO      bool // packets longer than the MTU may be written, with GSOTCPv4 and GSOTCPv6
	USO      bool // likewise with GSOUDPL4
}

// Link carries IP packets (no Ethernet header) to and from the guest.
type Link interface {
	// ReadPacket reads the next packet: its first len(head) bytes go to head,
	// what follows to rest; n is the length of both parts together. It blocks
	// until there is one; after Close it returns net.ErrClosed. Only one
	// goroutine may read. Packets that do not fit are cut and must not
	// happen: give it room for MaxPacket.
	ReadPacket(head, rest []byte) (n int, h Header, err error)

	// WritePacket sends one packet, given in parts. It waits while the device
	// is full and never drops; it keeps nothing. It returns net.ErrClosed
	// after Close, and the kernel's error for a packet it refuses. Any
	// number of goroutines may write.
	WritePacket(h Header, parts [][]byte) error

	// MTU is the longest packet on the wire, in bytes of IP packet; constant.
	MTU() int

	// Offloads tells what a writer may leave undone; constant.
	Offloads() Offloads

	// Close ends the link and makes blocked calls return.
	Close() error
}

// ErrAgain is what TryReadPacket returns when there is no packet.
var ErrAgain = errors.New("no packet")

// TryReader is a Link that somebody else waits for.
type TryReader interface {
	Link

	// TryReadPacket is ReadPacket without waiting: it returns ErrAgain.
	TryReadPacket(head, rest []byte) (n int, h Header, err error)
}
