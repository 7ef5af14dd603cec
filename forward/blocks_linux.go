package forward

// Blocks are what a bulk transfer to a socket with large segments is copied through. The
// loop has one, which every flow reads into; a socket that does not take all of it keeps
// it, with what is left, and the loop goes on with another. As with pipes there are few,
// whatever guests do: while maxBlocks are kept, bulk transfers are spliced.
const maxBlocks = 64 // 24 MiB

// block is the memory of one read.
type block [readMost]byte

// blocks hands out blocks. It is used on the loop's thread.
type blocks struct {
	idle []*block
	kept int // by sockets
}

// spare reports whether one more may be kept.
func (bs *blocks) spare() bool { return bs.kept < maxBlocks }

// take returns a block in place of one that a socket keeps from now on.
func (bs *blocks) take() *block {
	bs.kept++
	if n := len(bs.idle); n > 0 {
		b := bs.idle[n-1]
		bs.idle = bs.idle[:n-1]
		return b
	}
	return new(block)
}

// keepIdleBlocks is how many blocks that nobody keeps are there for the next.
const keepIdleBlocks = 2

// put takes back what a socket kept.
func (bs *blocks) put(b *block) {
	bs.kept--
	if len(bs.idle) < keepIdleBlocks {
		bs.idle = append(bs.idle, b)
	}
}
