package netstack

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// Theory of operation.
//
// What a connection holds while one side is slow is bounded by its two buffers. Large
// ones make bulk transfers fast: 19 Gbit/s from the guest with 1 MiB, 15 with 512 KiB,
// 14 with 256 KiB, measured on two cores. But a guest that opens ten thousand
// connections and stops reading must not take twenty gigabytes. So the size of a new
// connection's buffers depends on how many there are: the first few hundred get all
// they can use, the thousands after them less. Those that are open keep what they have.

// bufTiers are the buffer sizes in bytes by the number of connections at the time a new
// one is made. Full to the brim the first tier holds 512 MiB, the second 1.9 GiB more,
// and each connection of the last 128 KiB.
var bufTiers = []struct{ conns, size int }{
	{256, 1 << 20},
	{4096, 256 << 10},
}

const (
	bufLeast = 64 << 10 // beyond the last tier
	bufMost  = 1 << 20  // bufTiers' largest, and gVisor's default
)

// bufSize is the buffer size of a connection when there are n others.
func bufSize(n int) int {
	for _, t := range bufTiers {
		if n < t.conns {
			return t.size
		}
	}
	return bufLeast
}

// buffers counts the connections, to say how large the next one's buffers are.
type buffers struct{ conns atomic.Int64 }

// enter counts a new connection, before its handshake, and returns its buffers' size;
// leave counts its end.
func (b *buffers) enter() int { return bufSize(int(b.conns.Add(1) - 1)) }

func (b *buffers) leave() { b.conns.Add(-1) }

// limitBuffers gives a new connection smaller buffers than the default. gVisor takes
// a forwarder's receive window and, as it tunes it, the send buffer from settings that
// all connections share, so each has to be told. The guest was offered at most 64 KiB
// in the handshake: the window does not shrink below what it knows.
func limitBuffers(ep tcpip.Endpoint, size int) {
	if size < bufMost {
		ep.SocketOptions().SetReceiveBufferSize(int64(size), true)
		ep.SocketOptions().SetSendBufferSize(int64(size), true)
	}
}
