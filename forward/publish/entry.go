package publish

// The life of an entry. reserve puts it into the Book, busy, so that nobody else gets its
// addresses; open (in listen.go) works on it without the lock; settle makes it
// rest, or takes it out. drop makes a resting one busy again, closes it and takes it out.
// Whoever meets a busy entry waits for it and looks again: so there is one answer to
// two who ask for one port at a time, and whoever withdraws what is just being opened
// withdraws it.

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"

	"github.com/slipway-net/slipway/internal/flow"
)

// portKey says which entries may be in each other's way.
type portKey struct {
	proto flow.Proto
	port  uint16
}

// entry is a Port from its reservation until its sockets are closed.
type entry struct {
	asked  flow.PortSpec    // normalized
	source flow.Source      // effective
	claims []netip.AddrPort // where it is to listen, with the port as asked

	// busy is there while somebody opens or closes the entry, without the lock; it is
	// closed in the end. Nobody else touches the fields below then. Guarded by Book.mu, as is gone.
	busy chan struct{}
	gone bool // closed, or never opened; nothing in the Book knows it any more

	// askers are those who want it, the first one first. Guarded by Book.mu, and constant
	// while the entry is busy. There is always one.
	askers []asker

	port    *Port
	sockets []socket
	closers []io.Closer
}

// asker is an owner, and how it asked.
type asker struct {
	owner string
	asked flow.PortSpec // normalized
}

// owner is the first who wants it.
func (e *entry) owner() string { return e.askers[0].owner }

// has reports whether owner wants it.
func (e *entry) has(owner string) bool {
	return slices.ContainsFunc(e.askers, func(a asker) bool { return a.owner == owner })
}

// reserve returns the entry that owner has for asked, or a new one that is busy.
func (b *Book) reserve(owner string, asked flow.PortSpec) (e *entry, found bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		if b.closed {
			return nil, false, fmt.Errorf("publish %s: %w", name(asked), net.ErrClosed)
		}
		if e := b.ownLocked(owner, asked); e != nil {
			if !b.waitLocked(e) {
				b.joinLocked(e, owner, asked)
				return e, true, nil
			}
			continue
		}
		claims, err := b.rules.claims(asked)
		if err != nil {
			return nil, false, err
		}
		if e := b.conflictLocked(owner, asked.Proto, claims); e != nil {
			if !b.waitLocked(e) && !b.yieldLocked(e, owner) {
				return nil, false, e.conflict(asked, claims, b.differsLocked(e, owner, asked))
			}
			continue
		}
		e, err := b.enterLocked(owner, asked, claims)
		return e, false, err
	}
}

// waitLocked waits while e is busy, without the lock, and reports whether it had to.
func (b *Book) waitLocked(e *entry) bool {
	busy := e.busy
	if busy == nil {
		return false
	}
	b.mu.Unlock()
	<-busy
	b.mu.Lock()
	return true
}

// ownLocked returns the entry that asked means, of the owner or of somebody who shares
// with it.
func (b *Book) ownLocked(owner string, asked flow.PortSpec) *entry {
	if e := b.owners[owner][asked]; e != nil {
		return e
	}
	for _, e := range b.taken[portKey{asked.Proto, asked.Host.Port()}] {
		if (e.has(owner) || b.together(e, owner)) && e.busy == nil && e.means(asked) {
			return e
		}
	}
	return nil
}

// together reports whether owner shares what e is.
func (b *Book) together(e *entry, owner string) bool {
	return slices.Contains(b.cfg.Together, owner) && slices.Contains(b.cfg.Together, e.owner())
}

// differsLocked is how e was asked for, if owner has it and that is all that keeps it from being
// what asked means.
func (b *Book) differsLocked(e *entry, owner string, asked flow.PortSpec) string {
	if e.busy != nil || !e.has(owner) && !b.together(e, owner) {
		return ""
	}
	alike := asked
	alike.Source, alike.ProxyProtocol = e.asked.Source, e.asked.ProxyProtocol
	switch {
	case !e.means(alike):
		return ""
	case e.asked.ProxyProtocol && !asked.ProxyProtocol:
		return "with a PROXY protocol header"
	case asked.ProxyProtocol && !e.asked.ProxyProtocol:
		return "without a PROXY protocol header"
	}
	return fmt.Sprintf("with the source_ip %s", e.source)
}

// joinLocked has owner be one of those who want e, which is not busy.
func (b *Book) joinLocked(e *entry, owner string, asked flow.PortSpec) {
	if !e.has(owner) {
		b.askLocked(e, owner, asked)
	}
}

func (b *Book) askLocked(e *entry, owner string, asked flow.PortSpec) {
	e.askers = append(e.askers, asker{owner, asked})
	if b.owners[owner] == nil {
		b.owners[owner] = make(map[flow.PortSpec]*entry)
	}
	b.owners[owner][asked] = e
}

// leaveLocked undoes askLocked.
func (b *Book) leaveLocked(a asker) {
	delete(b.owners[a.owner], a.asked)
	if len(b.owners[a.owner]) == 0 {
		delete(b.owners, a.owner)
	}
}

// conflictLocked returns an entry that listens where claims are, one that does not
// yield to owner if there is one.
func (b *Book) conflictLocked(owner string, proto flow.Proto, claims []netip.AddrPort) (yields *entry) {
	port := claims[0].Port()
	if port == 0 {
		return nil
	}
	for _, e := range b.taken[portKey{proto, port}] {
		for _, c := range e.claims {
			if !slices.ContainsFunc(claims, func(d netip.AddrPort) bool { return Overlap(c.Addr(), d.Addr()) }) {
				continue
			}
			if !b.yields(e, owner) {
				return e
			}
			yields = e
		}
	}
	return yields
}

// yields reports whether e gives way to owner.
func (b *Book) yields(e *entry, owner string) bool {
	return b.cfg.Yields != "" && e.owner() == b.cfg.Yields && owner != b.cfg.Yields
}

// yieldLocked withdraws e if it gives way to owner. The lock is not held meanwhile.
func (b *Book) yieldLocked(e *entry, owner string) bool {
	return b.yields(e, owner) && b.dropLocked(e)
}

// enterLocked makes a busy entry.
func (b *Book) enterLocked(owner string, asked flow.PortSpec, claims []netip.AddrPort) (*entry, error) {
	if b.ports >= b.maxPorts {
		return nil, &limitError{asked, fmt.Sprintf("%d are published already", b.ports), ""}
	}
	if b.socks+len(claims) > b.maxSocks {
		return nil, &limitError{asked, fmt.Sprintf("%d sockets are a quarter of the limit of descriptors", b.socks), hintFiles}
	}
	e := &entry{asked: asked, source: cmp.Or(asked.Source, b.rules.source), claims: claims, busy: make(chan struct{})}
	b.askLocked(e, owner, asked)
	b.ports++
	b.socks += len(claims)
	if port := asked.Host.Port(); port != 0 {
		b.takeLocked(e, port)
	}
	return e, nil
}

func (b *Book) takeLocked(e *entry, port uint16) {
	k := portKey{e.asked.Proto, port}
	b.taken[k] = append(b.taken[k], e)
}

// settle ends the opening of e.
func (b *Book) settle(e *entry, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !ok {
		b.forgetLocked(e)
	} else {
		b.byID[e.port.ID] = e
		if e.asked.Host.Port() == 0 {
			b.takeLocked(e, e.port.Spec.Host.Port())
		}
	}
	b.restLocked(e)
}

func (b *Book) restLocked(e *entry) {
	close(e.busy)
	e.busy = nil
}

// forgetLocked takes e out of everything.
func (b *Book) forgetLocked(e *entry) {
	e.gone = true
	b.ports--
	b.socks -= len(e.claims)
	for _, a := range e.askers {
		b.leaveLocked(a)
	}
	port := e.asked.Host.Port()
	if e.port != nil {
		port = e.port.Spec.Host.Port()
	}
	k := portKey{e.asked.Proto, port}
	b.taken[k] = slices.DeleteFunc(b.taken[k], func(o *entry) bool { return o == e })
	if len(b.taken[k]) == 0 {
		delete(b.taken, k)
	}
}

// release has owner give up e once it is not busy, and reports whether there was
// something to give up. It is withdrawn when nobody else wants it.
func (b *Book) release(e *entry, owner string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.waitLocked(e) {
	}
	i := slices.IndexFunc(e.askers, func(a asker) bool { return a.owner == owner })
	if e.gone || i < 0 {
		return false
	}
	if len(e.askers) == 1 {
		return b.dropLocked(e)
	}
	b.leaveLocked(e.askers[i])
	e.askers = slices.Delete(e.askers, i, i+1)
	e.port.owner.Store(e.owner())
	return true
}

// drop withdraws e once it is not busy, and reports whether it was there to withdraw.
// The host port is free when it returns.
func (b *Book) drop(e *entry) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.dropLocked(e)
}

// dropLocked is drop, and does not hold the lock while it waits.
func (b *Book) dropLocked(e *entry) bool {
	for b.waitLocked(e) {
	}
	if e.gone {
		return false
	}
	e.busy = make(chan struct{})
	delete(b.byID, e.port.ID)
	b.mu.Unlock()
	e.close()
	b.cfg.Log.Debug("withdrawn", "port", e.port.Spec, "owner", e.owner())
	b.mu.Lock()
	b.forgetLocked(e)
	b.restLocked(e)
	return true
}
