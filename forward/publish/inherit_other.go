//go:build !linux

package publish

import (
	"log/slog"
	"net/netip"
	"os"

	"github.com/slipway-net/slipway/internal/flow"
)

// inherited is a socket that a service manager passed on, which happens on Linux only.
type inherited struct{ file *os.File }

func inherit(files []*os.File, log *slog.Logger) []inherited {
	for _, f := range files {
		log.Warn("a socket that was passed on is not used", "socket", f.Name())
		f.Close()
	}
	return nil
}

func (b *Book) inheritedAt(flow.Proto, netip.AddrPort) (s socket, ok bool) { return s, false }

func (b *Book) inheritedDual(flow.Proto, []netip.AddrPort) (s socket, ok bool) { return s, false }

func (b *Book) inheritedBeside(flow.Proto, netip.AddrPort) (p PassedOn, ok bool) { return p, false }
