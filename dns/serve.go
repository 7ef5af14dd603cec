package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// servePackets answers datagrams until ctx ends (then nil) or pc fails. The
// caller closes pc to end a blocked read.
func (s *Server) servePackets(ctx context.Context, pc net.PacketConn) error {
	var queries sync.WaitGroup
	defer queries.Wait()
	buf := make([]byte, maxMessage+1) // one more, to see what is too long
	for {
		n, from, err := pc.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read dns query on %v: %w", pc.LocalAddr(), err)
		}
		s.datagram(ctx, pc, from, buf[:n], &queries)
	}
}

// datagram answers one message that is borrowed: at once if it can, else in a
// goroutine of queries.
func (s *Server) datagram(ctx context.Context, pc net.PacketConn, from net.Addr, msg []byte, queries *sync.WaitGroup) {
	guest := guestOf(from)
	q, now, ok := s.accept(guest, msg, overUDP)
	if !ok {
		return
	}
	// A lost answer is as good as a lost datagram: the guest asks again.
	if now != nil {
		pc.WriteTo(q.fit(now), from)
		return
	}
	q.msg = append([]byte(nil), q.msg...)
	queries.Go(func() {
		defer s.queries.put(guest)
		if reply := s.resolve(ctx, &q, overUDP); reply != nil {
			pc.WriteTo(reply, from)
		}
	})
}

// transport is how a message travels.
type transport bool

const (
	overUDP transport = false
	overTCP transport = true
)

// accept decides what to do with a message from guest. ok is false if it is
// worth no answer. now is the answer if there is one already; else the caller
// owns a slot of s.queries and resolves q.
func (s *Server) accept(guest netip.Addr, msg []byte, via transport) (q query, now []byte, ok bool) {
	if !isQuery(msg) {
		s.count.malformed.Add(1)
		return q, nil, false
	}
	s.count.queries.Add(1)
	q, err := parseQuery(msg)
	if err != nil {
		s.count.malformed.Add(1)
		return q, q.reply(rcodeFormatError), true
	}
	size := maxMessage
	if via == overUDP {
		size = q.udpSize
	}
	if reply, builtIn := s.names.answer(&q, size); builtIn {
		s.count.builtIn.Add(1)
		return q, reply, true
	}
	if !s.queries.take(guest) {
		s.count.refused.Add(1)
		return q, q.replyWith(rcodeRefused, edeOther, "slipway: too many queries at one time"), true
	}
	return q, nil, true
}

// fit returns reply if the guest takes it in a datagram, else the shortest answer
// that says to come back over TCP.
func (q *query) fit(reply []byte) []byte {
	if len(reply) <= q.udpSize {
		return reply
	}
	short := q.truncatedReply(rcode(reply))
	if len(short) > q.udpSize { // a question section longer than that
		short = short[:headerLen]
		clear(short[4:])
	}
	return short
}

// serveStreams accepts connections until ctx ends (then nil) or ln fails, and
// waits for them. The caller closes ln to end a blocked Accept.
func (s *Server) serveStreams(ctx context.Context, ln net.Listener) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept dns connection on %v: %w", ln.Addr(), err)
		}
		guest := guestOf(c.RemoteAddr())
		if !s.streams.take(guest) {
			s.count.streamsCut.Add(1)
			c.Close()
			continue
		}
		conns.Go(func() {
			defer s.streams.put(guest)
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			st := &stream{server: s, conn: c, guest: guest, room: make(chan struct{}, maxPipelined)}
			st.serve(ctx)
		})
	}
}

// stream is one TCP connection of the guest: messages with a 16-bit length in
// front (RFC 1035 section 4.2.2).
type stream struct {
	server *Server
	conn   net.Conn
	guest  netip.Addr
	room   chan struct{} // holds one token for each unanswered query

	mu sync.Mutex // one answer is written at a time; guards writes to conn
}

// serve reads queries until the connection ends, is idle, or ctx ends; then it
// waits for the answers still due.
func (st *stream) serve(ctx context.Context) {
	var queries sync.WaitGroup
	defer queries.Wait()
	for {
		msg, err := st.read()
		if err != nil {
			return
		}
		select {
		case st.room <- struct{}{}:
		case <-ctx.Done():
			return
		}
		queries.Go(func() {
			defer func() { <-st.room }()
			st.answer(ctx, msg)
		})
	}
}

// read returns the next message. A connection with a query in progress is not
// idle, so the guest's patience with slow upstreams is not ours to end.
func (st *stream) read() ([]byte, error) {
	st.conn.SetReadDeadline(time.Now().Add(streamIdle))
	return readMessage(st.conn)
}

func (st *stream) answer(ctx context.Context, msg []byte) {
	s := st.server
	q, now, ok := s.accept(st.guest, msg, overTCP)
	if !ok {
		st.conn.Close() // not DNS: RFC 7766 section 8
		return
	}
	if now != nil {
		st.write(now)
		return
	}
	defer s.queries.put(st.guest)
	if q.isTransfer() {
		s.transfer(ctx, &q, st.write)
		return
	}
	if reply := s.resolve(ctx, &q, overTCP); reply != nil {
		st.write(reply)
	}
}

// write sends one message. A guest that takes no answers loses its connection.
func (st *stream) write(msg []byte) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.conn.SetWriteDeadline(time.Now().Add(streamIdle))
	err := writeMessage(st.conn, msg)
	if err != nil {
		st.conn.Close()
	}
	return err
}

// readMessage reads one message with its length from a TCP connection.
func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(r, msg); err != nil {
		return nil, err
	}
	return msg, nil
}

// writeMessage writes msg with its length in one call, so that it leaves in one
// segment if it fits.
func writeMessage(w io.Writer, msg []byte) error {
	b := make([]byte, 2, 2+len(msg))
	binary.BigEndian.PutUint16(b, uint16(len(msg)))
	_, err := w.Write(append(b, msg...))
	return err
}
