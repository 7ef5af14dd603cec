package forward

import "net/netip"

// Reaches returns which address and port of the guest the clients reach.
func (in *Inbound) Reaches(ends Ends) netip.AddrPort {
	to, _ := in.reached(ends)
	return to
}
