package flow

import "io"

// Conn is one side of a TCP flow: a host socket, or the guest's connection in a
// stack. Read and Write block; one goroutine may read while another writes.
type Conn interface {
	// Read returns io.EOF after the peer's FIN and another error after a RST.
	// Any other method but Close may be called after io.EOF.
	io.Reader
	io.Writer

	// ReadBuf is Read for a relay with many idle flows: it waits until the
	// Conn is readable and only then takes a buffer from pool. The caller
	// owns the returned buffer and hands it back with pool.Put; buf is nil
	// if and only if err is not nil.
	ReadBuf(pool *BufPool) (buf *Buf, err error)

	// CloseWrite sends FIN: the peer reads io.EOF, and we may go on reading.
	CloseWrite() error

	// Drained reports whether the peer has acknowledged what was written, but for
	// a segment or two. Nothing may be written after the first call.
	Drained() bool

	// Abort ends the connection with a RST (RFC 9293 section 3.10.5) and
	// makes blocked calls return. It may be called at any time, repeatedly,
	// and before or after Close.
	Abort()

	// Close ends the connection in order; unread data turns it into a reset.
	// It makes blocked calls return. It may wait, for a limited time or until
	// Abort, for a peer that is slow to take what was written.
	Close() error
}
