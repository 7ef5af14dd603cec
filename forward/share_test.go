package forward

import (
	"net/netip"
	"testing"
)

func TestShare(t *testing.T) {
	s := newShare[netip.Addr](6)
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	taken := func(guest netip.Addr, tries int) (n int) {
		for range tries {
			if s.take(guest) {
				n++
			}
		}
		return n
	}
	if n := taken(a, 10); n != 4 || s.refusedGuest.Load() != 6 {
		t.Errorf("one guest took %d, %d refused", n, s.refusedGuest.Load())
	}
	if n := taken(b, 10); n != 2 || s.refused.Load() != 8 {
		t.Errorf("the other took %d, %d refused", n, s.refused.Load())
	}
	for range 4 {
		s.give(a)
	}
	if n := taken(b, 10); n != 2 {
		t.Errorf("the other took %d more", n)
	}
	for range 4 {
		s.give(b)
	}
	if s.n != 0 || len(s.guests) != 0 {
		t.Errorf("left: %d, %v", s.n, s.guests)
	}
}
