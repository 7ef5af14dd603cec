package forward

import "github.com/slipway-net/slipway/internal/flow"

// Expects reports whether Datagram is to have what a guest sends to the gateway.
func (f *Forwarder) Expects(flow.Tuple) bool { return false }

// Rejected takes an ICMP error of the guest's about a datagram that it was sent.
func (f *Forwarder) Rejected(flow.Error) {}
