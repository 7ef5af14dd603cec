package netstack

import (
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

func TestBuffersShrink(t *testing.T) {
	s := start(t, 1500)
	told := func() int {
		var rcv tcpip.TCPReceiveBufferSizeRangeOption
		if terr := s.ip.TransportProtocolOption(tcp.ProtocolNumber, &rcv); terr != nil {
			t.Fatal(terr)
		}
		return rcv.Default
	}
	var b buffers
	for _, tt := range []struct{ conns, want int }{
		{1, 1 << 20}, {256, 1 << 20}, {257, 256 << 10}, {4096, 256 << 10}, {4097, 64 << 10}, {9000, 64 << 10},
	} {
		for b.conns < tt.conns {
			if err := b.enter(s.ip); err != nil {
				t.Fatal(err)
			}
		}
		if got := told(); got != tt.want {
			t.Errorf("connection %d gets %d bytes, want %d", tt.conns, got, tt.want)
		}
	}
	for b.conns > 10 {
		b.leave()
	}
	b.enter(s.ip)
	if got := told(); got != 1<<20 {
		t.Errorf("after most have ended a connection gets %d bytes", got)
	}
}
