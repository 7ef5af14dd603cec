package dns

import (
	"net"
	"net/netip"
	"sync"
)

// slots bounds work in progress, in all and for one guest address, so that one
// guest cannot take everything.
type slots struct {
	total, each int // limits

	mu   sync.Mutex // guards the fields below
	used int
	by   map[netip.Addr]int
}

func newSlots(total, each int) *slots {
	return &slots{total: total, each: each, by: make(map[netip.Addr]int)}
}

// take returns false when a limit is reached; else the caller calls put.
func (s *slots) take(guest netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used >= s.total || s.by[guest] >= s.each {
		return false
	}
	s.used++
	s.by[guest]++
	return true
}

func (s *slots) put(guest netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used--
	if s.by[guest]--; s.by[guest] == 0 {
		delete(s.by, guest)
	}
}

func (s *slots) inUse() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used
}

// guestOf returns the IP address of a peer of ours; the zero Addr stands for
// peers without one, as in tests over pipes.
func guestOf(a net.Addr) netip.Addr {
	if a, ok := a.(interface{ AddrPort() netip.AddrPort }); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}
