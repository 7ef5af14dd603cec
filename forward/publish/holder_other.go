//go:build !linux

package publish

import (
	"net/netip"

	"github.com/slipway-net/slipway/internal/flow"
)

// holders tells who has a port; here nobody can.
type holders struct{}

func (*holders) find(flow.Proto, netip.AddrPort) Holder { return nil }
