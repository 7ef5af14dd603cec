package forward

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// ownAddrsFresh is for how long the list of the host's addresses is trusted. It costs
// two netlink requests, a flood of new targets must not cost them each; and a VPN that
// comes up is known soon enough.
const ownAddrsFresh = 2 * time.Second

// ownAddrs knows the host's own addresses.
type ownAddrs struct {
	list func() ([]netip.Addr, error)

	mu    sync.Mutex // guards the fields below
	addrs map[netip.Addr]struct{}
	read  time.Time
}

// contains reports whether a is the host's own. While the list cannot be read the
// last good one is used.
func (o *ownAddrs) contains(a netip.Addr) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); o.addrs == nil || now.Sub(o.read) >= ownAddrsFresh {
		o.read = now
		if list, err := o.list(); err == nil {
			o.addrs = make(map[netip.Addr]struct{}, len(list))
			for _, a := range list {
				o.addrs[a] = struct{}{}
			}
		}
	}
	_, ok := o.addrs[a]
	return ok
}

// interfaceAddrs lists the addresses of the host's interfaces.
func interfaceAddrs() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.Addr, 0, len(list))
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				addrs = append(addrs, ip.Unmap())
			}
		}
	}
	return addrs, nil
}

// A denied host access is logged once per target and refusalQuiet; of more than
// refusalTargets different ones in that time only the first are. A guest that scans
// the host's ports must not fill the log.
const (
	refusalQuiet   = 10 * time.Minute
	refusalTargets = 64
)

// refusalLog logs denied host access.
type refusalLog struct {
	log *slog.Logger

	mu     sync.Mutex // guards the fields below
	since  time.Time
	logged map[refusalKey]struct{}
}

type refusalKey struct {
	proto  flow.Proto
	target netip.AddrPort
}

// note logs e unless that was done lately.
func (r *refusalLog) note(proto flow.Proto, e *DeniedError) {
	if r.first(refusalKey{proto, e.Target}) {
		r.log.Warn("host access denied",
			slog.String("proto", proto.String()), slog.Any("target", e.Target), slog.String("reason", e.Reason), slog.String("hint", e.Hint))
	}
}

func (r *refusalLog) first(k refusalKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); r.logged == nil || now.Sub(r.since) >= refusalQuiet {
		r.since, r.logged = now, make(map[refusalKey]struct{})
	}
	if _, ok := r.logged[k]; ok || len(r.logged) >= refusalTargets {
		return false
	}
	r.logged[k] = struct{}{}
	return true
}
