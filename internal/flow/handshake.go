package flow

import "net/netip"

// Handshake is what a TCP handshake has agreed on (RFC 9293 section 3.5), as a socket
// needs it that goes on in the client's place.
type Handshake struct {
	Client, Guest netip.AddrPort

	Next      uint32 // the client's next sequence number
	GuestNext uint32 // the guest's

	Window      uint32 // what the client has announced, in bytes
	GuestWindow uint32 // what the guest has

	Scale      uint8  // of the client's windows (RFC 7323 section 2); 0 if one of them has none
	GuestScale uint8  // of the guest's
	GuestMSS   uint16 // of segments to the guest, in bytes
	SACK       bool
	Timestamps bool

	Clock uint32 // the client's timestamp when the guest's answer came, in milliseconds, even
}
