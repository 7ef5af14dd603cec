package api

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// book is a PortBackend that opens nothing: a port is taken when it has the same
// protocol, address and number as another.
type book struct {
	mu     sync.Mutex // guards the fields below
	ports  []Port
	specs  map[uint64]flow.PortSpec
	last   uint64
	refuse error // of every AddPort
}

func (b *book) Ports() []Port {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.ports)
}

func (b *book) AddPort(_ context.Context, owner string, s flow.PortSpec) (Port, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.refuse != nil {
		return Port{}, b.refuse
	}
	for _, p := range b.ports {
		if has := b.specs[p.ID]; has == s && p.Owner == owner {
			return p, nil
		} else if has.Proto == s.Proto && has.Host == s.Host && s.Host.Port() != 0 {
			return Port{}, &Error{Message: fmt.Sprintf("publish %v: taken by %s", s, p.Owner), Status: http.StatusConflict}
		}
	}
	b.last++
	if b.specs == nil {
		b.specs = map[uint64]flow.PortSpec{}
	}
	b.specs[b.last] = s
	if s.Host.Port() == 0 {
		s.Host = netip.AddrPortFrom(s.Host.Addr(), uint16(32768+b.last))
	}
	p := Port{ID: b.last, Spec: SpecOf(s), Owner: owner, Since: time.Now(), Listens: []netip.AddrPort{s.Host}}
	b.ports = append(b.ports, p)
	return p, nil
}

func (b *book) RemovePort(id uint64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(b.ports)
	b.ports = slices.DeleteFunc(b.ports, func(p Port) bool { return p.ID == id })
	if len(b.ports) == n {
		return &Error{Message: fmt.Sprintf("withdraw port %d: there is none", id), Status: http.StatusNotFound}
	}
	delete(b.specs, id)
	return nil
}
