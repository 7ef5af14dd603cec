package kernel

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// noWire fails the test if it is used.
type noWire struct{ t *testing.T }

func (w noWire) Handshake(netip.AddrPort, netip.AddrPort, func(flow.Handshake, error)) (func(bool), error) {
	w.t.Error("a handshake has begun")
	return func(bool) {}, nil
}

func portAt(a string, port int) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(a), uint16(port))
}

// What was of no use is avoided for a while, and what is remembered of it is bounded.
func TestAvoid(t *testing.T) {
	p := New(Config{Wire: noWire{t}, Listener4: 0, Listener6: -1})
	at := func(i int) netip.AddrPort { return portAt("192.168.65.3", i) }
	if !p.Enters(at(1)) || p.Enters(portAt("fdc4:f303:9324::3", 1)) {
		t.Error("only IPv4 has a listener, and nothing is avoided")
	}
	p.avoid(at(1))
	if p.Enters(at(1)) || !p.Enters(at(2)) {
		t.Error("only one port is avoided")
	}
	p.entrance.avoided[at(1)] = time.Now().Add(-time.Second)
	if !p.Enters(at(1)) || len(p.entrance.avoided) != 0 {
		t.Error("it is avoided for good")
	}
	for i := range 10 * avoidMost {
		p.avoid(at(i))
		if n := len(p.entrance.avoided); n > avoidMost || p.Enters(at(i)) {
			t.Fatalf("%d are remembered, port %d is among them: %v", n, i, !p.Enters(at(i)))
		}
	}
}

// A failure with the first client is told and counted; where the kernel cannot do it at all,
// nobody tries again.
func TestNoEntry(t *testing.T) {
	p := New(Config{Wire: noWire{t}, Listener4: 0, Listener6: -1})
	from, to := portAt("203.0.113.10", 40000), portAt("192.168.65.3", 80)
	enter := func(fd int) {
		t.Helper()
		if _, err := p.Enter(fd, from, to, func(error) { t.Error("told") }); !errors.Is(err, ErrNoEntry) {
			t.Errorf("%v, want %v", err, ErrNoEntry)
		}
	}
	enter(-1)
	if n := p.Stats().Unentered; n != 1 || !p.Enters(to) {
		t.Errorf("%d counted", n)
	}
	udp, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(udp)
	enter(udp) // knows no such option
	if n := p.Stats().Unentered; n != 2 || p.Enters(to) {
		t.Errorf("%d counted, and it is tried again", n)
	}
}
