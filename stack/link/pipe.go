package link

import (
	"net"
	"sync"
)

// pipeQueue is how many packets an in-memory link holds before a writer waits.
const pipeQueue = 256

type pipePacket struct {
	h Header
	b []byte
}

// read copies the packet out.
func (p pipePacket) read(head, rest []byte) (int, Header, error) {
	n := copy(head, p.b)
	return n + copy(rest, p.b[n:]), p.h, nil
}

// Pipe is one end of an in-memory Link, for tests: what is written to one end is
// read from the other.
type Pipe struct {
	mtu  int
	off  Offloads
	in   <-chan pipePacket
	out  chan<- pipePacket
	peer *Pipe

	once sync.Once
	done chan struct{}
}

// NewPipe returns the two ends of an in-memory link with the given MTU in bytes.
// Both may write packets of any length with offload headers.
func NewPipe(mtu int) (*Pipe, *Pipe) {
	ab, ba := make(chan pipePacket, pipeQueue), make(chan pipePacket, pipeQueue)
	off := Offloads{Accepted: []string{"csum", "tso4", "tso6", "uso"}, TSO: true, USO: true}
	a := &Pipe{mtu: mtu, off: off, in: ba, out: ab, done: make(chan struct{})}
	b := &Pipe{mtu: mtu, off: off, in: ab, out: ba, done: make(chan struct{})}
	a.peer, b.peer = b, a
	return a, b
}

// ReadPacket implements Link.
func (p *Pipe) ReadPacket(head, rest []byte) (int, Header, error) {
	select {
	case pkt := <-p.in:
		return pkt.read(head, rest)
	case <-p.done:
		return 0, Header{}, net.ErrClosed
	}
}

// TryReadPacket implements TryReader.
func (p *Pipe) TryReadPacket(head, rest []byte) (int, Header, error) {
	select {
	case pkt := <-p.in:
		return pkt.read(head, rest)
	case <-p.done:
		return 0, Header{}, net.ErrClosed
	default:
		return 0, Header{}, ErrAgain
	}
}

// WritePacket implements Link. A packet written after the other end was closed
// disappears, as on a wire.
func (p *Pipe) WritePacket(h Header, parts [][]byte) error {
	select {
	case <-p.done:
		return net.ErrClosed
	default:
	}
	var b []byte
	for _, part := range parts {
		b = append(b, part...)
	}
	select {
	case p.out <- pipePacket{h, b}:
		return nil
	case <-p.peer.done:
		return nil
	case <-p.done:
		return net.ErrClosed
	}
}

// MTU implements Link.
func (p *Pipe) MTU() int { return p.mtu }

// Offloads implements Link.
func (p *Pipe) Offloads() Offloads { return p.off }

// Close implements Link. The other end must be closed by itself.
func (p *Pipe) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}
