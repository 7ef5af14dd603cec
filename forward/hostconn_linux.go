package forward

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// hostConn is a connected host socket as a flow.Conn. Its reads take a buffer only
// when there is something to read; closures are made once, so that neither reads nor
// writes allocate.
type hostConn struct {
	file   *os.File
	raw    syscall.RawConn
	closed atomic.Bool
	shut   atomic.Bool // our FIN was asked for

	// of the one reader
	readPool *flow.BufPool
	readBuf  *flow.Buf
	readErr  error
	tryRead  func(fd uintptr) bool

	// of the one writer
	writeLeft []byte
	writeErr  error
	tryWrite  func(fd uintptr) bool
}

var _ flow.Conn = (*hostConn)(nil)

// newHostConn takes over fd, a non-blocking socket; on error it stays the caller's.
func newHostConn(fd int) (*hostConn, error) {
	file := os.NewFile(uintptr(fd), "tcp")
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &hostConn{file: file, raw: raw}
	c.tryRead, c.tryWrite = c.readOnce, c.writeAll
	return c, nil
}

// ReadBuf implements flow.Conn.
func (c *hostConn) ReadBuf(pool *flow.BufPool) (*flow.Buf, error) {
	c.readPool, c.readBuf, c.readErr = pool, nil, nil
	if err := c.raw.Read(c.tryRead); err != nil {
		return nil, fmt.Errorf("read from target: %w", err)
	}
	return c.readBuf, c.readErr
}

// readOnce is one try to read.
func (c *hostConn) readOnce(fd uintptr) bool {
	buf := c.readPool.Get()
	for {
		n, err := unix.Read(int(fd), buf.Room())
		switch {
		case err == unix.EINTR:
			continue
		case err == nil && n > 0:
			buf.Bytes = buf.Room()[:n]
			c.readBuf = buf
			return true
		}
		c.readPool.Put(buf)
		switch err {
		case unix.EAGAIN:
			return false
		case nil:
			c.readErr = io.EOF
			// In this order: shut is stored before the socket can be over because of it.
			if isClosed(fd) && !c.shut.Load() {
				c.readErr = fmt.Errorf("read from target: %w", unix.ECONNRESET)
			}
		default:
			c.readErr = fmt.Errorf("read from target: %w", err)
		}
		return true
	}
}

// isClosed reports whether the connection is over in both directions. If it is at the end of
// file, and we sent no FIN, it was reset, and a write(2) at the same time has taken the error
// (net/ipv4/tcp.c, tcp_recvmsg_locked; net/core/stream.c, sk_stream_error).
func isClosed(fd uintptr) bool {
	const tcpClose = 7 // TCP_CLOSE, include/net/tcp_states.h
	info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO)
	return err == nil && info.State == tcpClose
}

// Read implements flow.Conn.
func (c *hostConn) Read(b []byte) (int, error) { return c.file.Read(b) }

// Write implements flow.Conn.
func (c *hostConn) Write(b []byte) (int, error) {
	c.writeLeft, c.writeErr = b, nil
	err := c.raw.Write(c.tryWrite)
	n := len(b) - len(c.writeLeft)
	c.writeLeft = nil
	if err := errors.Join(err, c.writeErr); err != nil {
		return n, fmt.Errorf("write to target: %w", err)
	}
	return n, nil
}

// writeAll writes what is left as far as the socket takes it.
func (c *hostConn) writeAll(fd uintptr) bool {
	for len(c.writeLeft) > 0 {
		n, err := unix.Write(int(fd), c.writeLeft)
		switch err {
		case nil:
			c.writeLeft = c.writeLeft[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			c.writeErr = err
			return true
		}
	}
	return true
}

// CloseWrite implements flow.Conn.
func (c *hostConn) CloseWrite() error {
	var serr error
	c.shut.Store(true)
	if err := c.raw.Control(func(fd uintptr) { serr = unix.Shutdown(int(fd), unix.SHUT_WR) }); err != nil {
		return err
	}
	return serr
}

// Drained implements flow.Conn (SIOCOUTQ, tcp(7)).
func (c *hostConn) Drained() bool {
	left, err := 0, error(nil)
	cerr := c.raw.Control(func(fd uintptr) { left, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return left == 0 || err != nil || cerr != nil
}

// Abort implements flow.Conn: SO_LINGER with a time of 0 turns close(2) into a RST
// (socket(7)), which also leaves no TIME_WAIT behind.
func (c *hostConn) Abort() {
	if c.closed.Swap(true) {
		return
	}
	c.raw.Control(func(fd uintptr) {
		unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	})
	c.file.Close()
}

// Close implements flow.Conn.
func (c *hostConn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	return c.file.Close()
}
