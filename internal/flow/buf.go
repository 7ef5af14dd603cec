package flow

import "sync"

// BufSize is the capacity of a relay buffer in bytes. 128 KiB is two full GSO
// packets: larger ones did not make bulk transfers faster and fall out of the
// second level cache.
const BufSize = 128 << 10

// Buf is a relay buffer. Bytes is the part that holds data.
type Buf struct {
	Bytes []byte
	room  [BufSize]byte
}

// Room returns the whole buffer to read into.
func (b *Buf) Room() []byte { return b.room[:] }

// BufPool hands out relay buffers. The zero BufPool is ready to use.
type BufPool struct{ pool sync.Pool }

// Get returns an empty buffer.
func (p *BufPool) Get() *Buf {
	if b, ok := p.pool.Get().(*Buf); ok {
		return b
	}
	return new(Buf)
}

// Put takes b back; the caller must not use it any more.
func (p *BufPool) Put(b *Buf) {
	b.Bytes = nil
	p.pool.Put(b)
}
