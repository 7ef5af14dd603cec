package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/forward"
	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/nsagent"
	"github.com/slipway-net/slipway/stack/kernel"
)

// doors are the ways into the guest. They implement forward.Doors.
type doors struct {
	engine *engine
	ends   forward.Ends
}

var _ forward.Doors = (*doors)(nil)

// doorKinds are forward's kinds of sockets in the agent's words.
var doorKinds = [...]nsagent.SocketKind{
	forward.SocketTCP4:         nsagent.SocketTCP4,
	forward.SocketTCP6:         nsagent.SocketTCP6,
	forward.SocketTransparent4: nsagent.SocketTransparent4,
	forward.SocketTransparent6: nsagent.SocketTransparent6,
	forward.SocketUDP4:         nsagent.SocketUDP4,
	forward.SocketUDP6:         nsagent.SocketUDP6,
}

func (e *engine) newDoors() *doors {
	n := &e.net
	d := &doors{
		engine: e,
		ends: forward.Ends{
			Gateway4: n.Gateway4, Gateway6: n.Gateway6, Host4: n.Host4, Host6: n.Host6,
			Guest4: n.Guest4, Guest6: n.Guest6,
		},
	}
	if e.agent.Report().IPv6 != "" { // the guest has none
		d.ends.Gateway6, d.ends.Host6, d.ends.Guest6 = netip.Addr{}, netip.Addr{}, netip.Addr{}
	}
	// The first question waits for a lock of the kernel's; clients' questions do not.
	d.Where(n.Gateway4)
	// This waits until the kernel has loaded a module, or has not found it.
	go e.agent.LearnListens(unix.IPPROTO_TCP, unix.IPPROTO_UDP)
	return d
}

// Dial implements forward.Doors.
func (d *doors) Dial(ctx context.Context, from, to netip.AddrPort) (flow.Conn, error) {
	return d.engine.stack.Dial(ctx, from, to)
}

// Enters implements forward.Doors.
func (d *doors) Enters(to netip.AddrPort) bool {
	kind := forward.SocketTransparent4
	if to.Addr().Is6() {
		kind = forward.SocketTransparent6
	}
	return d.Has(kind) && d.engine.kernel.path.Enters(to)
}

// Enter implements forward.Doors.
func (d *doors) Enter(fd int, from, to netip.AddrPort, then func(error)) (cancel func(), err error) {
	cancel, err = d.engine.kernel.path.Enter(fd, from, to, func(err error) { then(entryError(err)) })
	return cancel, entryError(err)
}

// entryError puts an error of the kernel path's into forward's words.
func entryError(err error) error {
	if errors.Is(err, kernel.ErrNoEntry) {
		return forward.ErrNoEntry
	}
	return err
}

// Ends implements forward.Doors.
func (d *doors) Ends() forward.Ends { return d.ends }

// Has implements forward.Doors.
func (d *doors) Has(k forward.SocketKind) bool {
	path := d.engine.kernel
	switch k {
	case forward.SocketTransparent4:
		return path != nil && path.v4 == nil
	case forward.SocketTransparent6:
		return path != nil && path.v6 == nil
	}
	return true
}

// Socket implements forward.Doors.
func (d *doors) Socket(k forward.SocketKind, wait bool) (int, error) {
	fd, err := d.engine.agent.Socket(doorKinds[k], wait)
	if errors.Is(err, nsagent.ErrNoneReady) {
		return -1, forward.ErrNoneReady
	}
	return fd, err
}

// doorPlaces are the agent's places in forward's words.
var doorPlaces = [...]forward.Place{
	nsagent.PlaceUnknown:  forward.Unknown,
	nsagent.PlaceLocal:    forward.Local,
	nsagent.PlaceInside:   forward.Inside,
	nsagent.PlaceOutside:  forward.Outside,
	nsagent.PlaceUnrouted: forward.Unrouted,
}

// Where implements forward.Doors.
func (d *doors) Where(a netip.Addr) forward.Place {
	p, err := d.engine.agent.Where(a)
	if err != nil {
		d.engine.log.Debug("guest's routes are not known", slog.Any("err", err))
		return forward.Unknown
	}
	return doorPlaces[p]
}

// Listens implements forward.Doors.
func (d *doors) Listens(p flow.Proto, at netip.AddrPort) bool {
	number := byte(unix.IPPROTO_TCP)
	if p == flow.UDP {
		number = unix.IPPROTO_UDP
	}
	return d.engine.agent.Listens(number, at)
}
