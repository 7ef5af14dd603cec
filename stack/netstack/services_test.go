package netstack

import (
	"net"
	"net/netip"
	"testing"

	"github.com/slipway-net/slipway/stack/link"
)

// A burst of queries waits for a slow service; none is lost.
func TestListenPacketBurst(t *testing.T) {
	b := start(t, 1500)
	pcs, err := b.ListenPacket(53)
	if err != nil {
		t.Fatal(err)
	}
	const burst = 1000
	for i, f := range families {
		defer pcs[i].Close()
		to := netip.AddrPortFrom(f.gateway, 53)
		for range burst {
			b.send(link.Header{}, udpPacket(f.guest, to, pattern(40)))
		}
		waitFor(t, "the burst to be read", func() bool { return b.Stats().FromGuestPackets == uint64((i+1)*burst) })
		buf := make([]byte, 100)
		for n := range burst {
			if got, from, err := pcs[i].ReadFrom(buf); err != nil || got != 40 || from.(*net.UDPAddr).AddrPort() != f.guest {
				t.Fatalf("%s: query %d: %d bytes from %v, %v", f.name, n, got, from, err)
			}
		}
	}
}

func TestListenTaken(t *testing.T) {
	b := start(t, 1500)
	lns, err := b.Listen(53)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, l := range lns {
			l.Close()
		}
	}()
	if _, err := b.Listen(53); err == nil {
		t.Error("a port was opened twice")
	}
}
