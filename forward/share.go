package forward

import (
	"sync"
	"sync/atomic"
)

// share bounds how many of something there are at a time, and gives no guest (a guest's
// address, or whatever K tells apart) more than two thirds of it, so that one container cannot
// use up what all need.
type share[K comparable] struct {
	most, perGuest int
	refused        atomic.Uint64 // for want of room of all guests
	refusedGuest   atomic.Uint64 // because one guest had its part

	mu     sync.Mutex // guards the fields below
	n      int
	guests map[K]int
}

func newShare[K comparable](most int) *share[K] {
	return &share[K]{most: most, perGuest: max(1, most*2/3), guests: make(map[K]int)}
}

// take takes one for guest, and reports whether there was one; give gives it back.
func (s *share[K]) take(guest K) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.n >= s.most:
		s.refused.Add(1)
		return false
	case s.guests[guest] >= s.perGuest:
		s.refusedGuest.Add(1)
		return false
	}
	s.n++
	s.guests[guest]++
	return true
}

func (s *share[K]) give(guest K) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n--
	if s.guests[guest]--; s.guests[guest] == 0 {
		delete(s.guests, guest)
	}
}

func (s *share[K]) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}
