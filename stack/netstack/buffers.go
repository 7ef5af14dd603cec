package netstack

import (
	"fmt"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
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
	bufMost  = 1 << 20  // bufTiers' largest
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

// buffers keeps the sizes that gVisor gives new connections in step with their number.
type buffers struct {
	mu    sync.Mutex // guards the fields below
	conns int
	size  int // what gVisor was told
}

// enter counts a new connection, before its handshake; leave counts its end.
func (b *buffers) enter(ip *stack.Stack) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.tell(ip)
	b.conns++
	return err
}

func (b *buffers) leave() {
	b.mu.Lock()
	b.conns--
	b.mu.Unlock()
}

// tell sets gVisor's defaults if they are to change. The caller holds mu.
func (b *buffers) tell(ip *stack.Stack) error {
	size := bufSize(b.conns)
	if size == b.size {
		return nil
	}
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: size, Max: bufMost}
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: size, Max: bufMost}
	for _, o := range []tcpip.SettableTransportProtocolOption{&rcv, &snd} {
		if terr := ip.SetTransportProtocolOption(tcp.ProtocolNumber, o); terr != nil {
			return fmt.Errorf("set tcp buffers of %d bytes: %s", size, terr)
		}
	}
	b.size = size
	return nil
}
