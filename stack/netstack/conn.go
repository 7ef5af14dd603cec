package netstack

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// guestConn is a connection of gVisor's as a flow.Conn. gVisor's endpoint never
// blocks; it says ErrWouldBlock and notifies when that may have changed. Each
// direction has an entry in the endpoint's notification queue from the start and a
// channel that holds one token: set before the first try, a token cannot be missed,
// and a stale one costs one more try. Nothing is allocated per call.

// Keep-alive towards the guest finds guests that vanished without a FIN, such as a
// container whose namespace was deleted: after keepIdle without a segment a probe
// every keepInterval, and the end after keepCount unanswered ones.
const (
	keepIdle     = 2 * time.Minute
	keepInterval = 15 * time.Second
	keepCount    = 8
)

// closePatience is how long a guest may leave our last bytes unacknowledged, or its
// window shut, after both sides have closed. Linux gives such a connection about as
// long (net.ipv4.tcp_orphan_retries).
const closePatience = 100 * time.Second

// atomicWrite is the longest write in bytes that is copied under gVisor's lock: for
// short ones taking the lock twice costs more than the copy.
const atomicWrite = 4096

type guestConn struct {
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	closed atomic.Bool

	readable, writable  chan struct{}
	readEntry, writeEnt waiter.Entry
	resetEntry          waiter.Entry
	into                tcpip.SliceWriter // of the one reader
	from                bytes.Reader      // of the one writer
}

var _ flow.Conn = (*guestConn)(nil)

// token is a waiter.EventListener that sets a channel's token.
type token chan struct{}

// NotifyEvent implements waiter.EventListener.
func (t token) NotifyEvent(waiter.EventMask) { t.set() }

func (t token) set() {
	select {
	case t <- struct{}{}:
	default:
	}
}

func newGuestConn(ep tcpip.Endpoint, wq *waiter.Queue) *guestConn {
	c := &guestConn{ep: ep, wq: wq, readable: make(chan struct{}, 1), writable: make(chan struct{}, 1)}
	c.readEntry.Init(token(c.readable), waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr)
	c.writeEnt.Init(token(c.writable), waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	wq.EventRegister(&c.readEntry)
	wq.EventRegister(&c.writeEnt)

	ep.SocketOptions().SetDelayOption(false) // the sender decided about its segments: no Nagle
	ep.SocketOptions().SetKeepAlive(true)
	idle, interval := tcpip.KeepaliveIdleOption(keepIdle), tcpip.KeepaliveIntervalOption(keepInterval)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepCount)
	return c
}

// resetGrace is how long the relay may go on with what the guest sent before its RST.
const resetGrace = time.Second

// onReset calls do some time after the guest has reset the connection or is found dead,
// unless it is closed before. A relay whose other side takes nothing does not read, and
// so would not see it.
func (c *guestConn) onReset(do func()) {
	c.resetEntry.Init(resetListener{c, do}, waiter.EventErr)
	c.wq.EventRegister(&c.resetEntry)
}

type resetListener struct {
	c  *guestConn
	do func()
}

// NotifyEvent implements waiter.EventListener. gVisor notifies of an error at an
// orderly end, too.
func (l resetListener) NotifyEvent(waiter.EventMask) {
	if tcp.EndpointState(l.c.ep.State()) == tcp.StateError && !l.c.closed.Load() {
		time.AfterFunc(resetGrace, l.do)
	}
}

// Read implements flow.Conn.
func (c *guestConn) Read(b []byte) (int, error) {
	for {
		c.into = b
		res, terr := c.ep.Read(&c.into, tcpip.ReadOptions{})
		c.into = nil // an idle connection must not keep the caller's buffer alive
		switch terr.(type) {
		case nil:
			return res.Count, nil
		case *tcpip.ErrWouldBlock:
			if c.closed.Load() {
				return 0, errConnClosed
			}
			<-c.readable
		case *tcpip.ErrClosedForReceive:
			// gVisor tells of a reset once, and it may have told the writer.
			if tcp.EndpointState(c.ep.State()) == tcp.StateError {
				return 0, connError("read from guest", &tcpip.ErrConnectionReset{})
			}
			return 0, io.EOF
		default:
			return 0, connError("read from guest", terr)
		}
	}
}

// ReadBuf implements flow.Conn.
func (c *guestConn) ReadBuf(pool *flow.BufPool) (*flow.Buf, error) {
	for c.ep.Readiness(waiter.ReadableEvents) == 0 {
		if c.closed.Load() {
			return nil, errConnClosed
		}
		<-c.readable
	}
	buf := pool.Get()
	n, err := c.Read(buf.Room())
	if err != nil {
		pool.Put(buf)
		return nil, err
	}
	buf.Bytes = buf.Room()[:n]
	return buf, nil
}

// Write implements flow.Conn.
func (c *guestConn) Write(b []byte) (int, error) {
	c.from.Reset(b)
	defer c.from.Reset(nil) // as in Read
	for c.from.Len() > 0 {
		_, terr := c.ep.Write(&c.from, tcpip.WriteOptions{Atomic: c.from.Len() <= atomicWrite})
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			if c.closed.Load() {
				return len(b) - c.from.Len(), errConnClosed
			}
			<-c.writable
		default:
			return len(b) - c.from.Len(), connError("write to guest", terr)
		}
	}
	return len(b), nil
}

// CloseWrite implements flow.Conn.
func (c *guestConn) CloseWrite() error {
	if terr := c.ep.Shutdown(tcpip.ShutdownWrite); terr != nil {
		return connError("shut down to guest", terr)
	}
	return nil
}

// Drained implements flow.Conn. gVisor does not tell how much is unacknowledged, but
// whether there is room, and the room can be made small; and whether the FIN behind it is.
func (c *guestConn) Drained() bool {
	switch tcp.EndpointState(c.ep.State()) {
	case tcp.StateFinWait1, tcp.StateClosing, tcp.StateLastAck:
		return false
	}
	c.ep.SocketOptions().SetSendBufferSize(tcp.MinBufferSize, false)
	return c.ep.Readiness(waiter.WritableEvents) != 0
}

// Abort implements flow.Conn.
func (c *guestConn) Abort() {
	if !c.end(c.ep.Abort) && !c.delivered() {
		c.ep.Abort() // Close waits
	}
}

// Close implements flow.Conn. It returns when the guest has everything that was
// written, or was silent for closePatience: until then our buffer is full of it, and a
// guest that never reads must not have more of those than it may have connections.
func (c *guestConn) Close() error {
	if !c.end(c.ep.Close) || c.delivered() {
		return nil
	}
	patience := tcpip.TCPUserTimeoutOption(closePatience)
	c.ep.SetSockOpt(&patience)
	ended, hup := waiter.NewChannelEntry(waiter.EventHUp | waiter.EventErr)
	c.wq.EventRegister(&ended)
	defer c.wq.EventUnregister(&ended)
	for !c.delivered() {
		<-hup
	}
	return nil
}

// delivered reports whether nothing is left to be sent or acknowledged.
func (c *guestConn) delivered() bool {
	switch tcp.EndpointState(c.ep.State()) {
	case tcp.StateEstablished, tcp.StateCloseWait, tcp.StateFinWait1, tcp.StateClosing, tcp.StateLastAck:
		return false
	}
	return true
}

// end ends the connection and wakes who waits; it does nothing and returns false the
// second time.
func (c *guestConn) end(how func()) bool {
	if c.closed.Swap(true) {
		return false
	}
	how()
	c.wq.EventUnregister(&c.readEntry)
	c.wq.EventUnregister(&c.writeEnt)
	token(c.readable).set()
	token(c.writable).set()
	return true
}

// ConnError is an error of a guest's connection.
type ConnError struct {
	Op  string
	Err tcpip.Error
}

// Error implements error.
func (e *ConnError) Error() string { return fmt.Sprintf("%s: %s", e.Op, e.Err) }

var errConnClosed = fmt.Errorf("guest connection: %w", io.ErrClosedPipe)

func connError(op string, terr tcpip.Error) error { return &ConnError{Op: op, Err: terr} }
