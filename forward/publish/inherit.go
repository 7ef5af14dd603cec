package publish

import (
	"log/slog"
	"net/netip"
	"os"

	"github.com/slipway-net/slipway/internal/flow"
)

// inherited is a socket that a service manager passed on.
type inherited struct {
	file  *os.File
	proto flow.Proto
	at    netip.AddrPort
}

func inherit(files []*os.File, _ *slog.Logger) []inherited {
	for _, f := range files {
		f.Close()
	}
	return nil
}

func (b *Book) inheritedAt(flow.Proto, netip.AddrPort) (s socket, ok bool) { return s, false }

func (b *Book) inheritedDual(flow.Proto, []netip.AddrPort) (s socket, ok bool) { return s, false }
