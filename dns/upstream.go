package dns

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// minTries and maxTries bound how often a query is sent. One server gets
	// minTries chances in queryTimeout, as a datagram may be lost; of a long list
	// the first maxTries are asked (the C library stops at three).
	minTries = 4
	maxTries = 6

	// udpBuffer is what we take from an upstream in a datagram, in bytes. RFC
	// 6891 section 6.2.5 calls 4096 a good compromise; a longer answer is
	// treated as truncated and fetched over TCP.
	udpBuffer = 4096
)

var (
	errNoUpstream = errors.New("no dns servers are known on the host")
	errSilent     = errors.New("no answer in time")
)

// noAnswer is what a guest is told. Which servers the host has is not its business.
const noAnswer = "slipway: no dns server of the host answered"

var udpBuffers = sync.Pool{New: func() any { return new([udpBuffer + 1]byte) }}

// resolve asks upstream and returns the answer for the guest: within q.udpSize
// for overUDP. It returns nil if ctx ends.
func (s *Server) resolve(ctx context.Context, q *query, via transport) []byte {
	reply, err := s.ask(ctx, q, via)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		s.count.failed.Add(1)
		s.warn.Do(func() { s.log.Warn("dns query not answered upstream", slog.Any("error", err)) })
		reply = q.replyWith(rcodeServerFailure, edeNetworkError, noAnswer)
	} else {
		s.count.upstream.Add(1)
	}
	if via == overUDP {
		reply = q.fit(reply)
		if truncated(reply) {
			s.count.truncated.Add(1)
		}
	}
	return reply
}

// try is the outcome of asking one server. A reply that is no verdict, such as
// SERVFAIL, comes with an error: it is used when no server has better.
type try struct {
	server netip.AddrPort
	reply  []byte
	err    error
}

// race asks the servers for one query.
type race struct {
	server  *Server
	q       *query
	via     transport
	servers []netip.AddrPort
	out     map[netip.AddrPort]bool // servers that failed and are not asked again

	results chan try
	tries   sync.WaitGroup
	started int // tries so far
	running int // tries not yet in results
}

// ask returns the first good answer, with the guest's ID.
func (s *Server) ask(ctx context.Context, q *query, via transport) ([]byte, error) {
	servers := s.upstreams()
	if len(servers) == 0 {
		return nil, errNoUpstream
	}
	servers = servers[:min(len(servers), maxTries)]
	tries := len(servers)
	if via == overUDP {
		tries = max(minTries, tries) // TCP repeats by itself what was lost
	}
	r := &race{
		server: s, q: q, via: via, servers: servers,
		out:     make(map[netip.AddrPort]bool),
		results: make(chan try, tries),
	}
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer r.tries.Wait()
	defer cancel()
	return r.run(ctx)
}

func (r *race) run(ctx context.Context) ([]byte, error) {
	patience := queryTimeout / time.Duration(max(minTries, len(r.servers)))
	silent := time.NewTimer(patience)
	defer silent.Stop()
	var best try // the answer to use if no server has a good one
	err := errSilent
	r.start(ctx)
	for {
		select {
		case <-silent.C:
			r.start(ctx)
			silent.Reset(patience)
		case t := <-r.results:
			r.running--
			if t.err == nil {
				return t.reply, nil
			}
			err = t.err
			if t.reply != nil && best.reply == nil {
				best = t
			}
			r.out[t.server] = true
			if r.start(ctx) {
				silent.Reset(patience)
			} else if r.running == 0 {
				return best.orError(err)
			}
		case <-ctx.Done():
			return best.orError(err)
		}
	}
}

func (t try) orError(err error) ([]byte, error) {
	if t.reply != nil {
		return t.reply, nil
	}
	return nil, err
}

// start asks the next server in turn and returns false if there is none left to
// ask. A server that is merely silent is asked again in the next round.
func (r *race) start(ctx context.Context) bool {
	for range r.servers {
		if r.started == cap(r.results) {
			return false
		}
		server := r.servers[r.started%len(r.servers)]
		r.started++
		if r.out[server] {
			continue
		}
		r.running++
		r.tries.Go(func() {
			reply, err := r.server.askServer(ctx, server, r.q, r.via)
			if err != nil {
				err = fmt.Errorf("ask dns server %v: %w", server, err)
			}
			r.results <- try{server, reply, err}
		})
		return true
	}
	return false
}

// askServer asks one server until it answers, fails, or ctx ends.
func (s *Server) askServer(ctx context.Context, server netip.AddrPort, q *query, via transport) ([]byte, error) {
	ask, other := s.askUDP, s.askTCP
	if via == overTCP {
		ask, other = other, ask
	}
	reply, err := ask(ctx, server, q)
	switch {
	case err == nil && via == overUDP && truncated(reply):
		short, cancel := context.WithTimeout(ctx, truncatedTimeout)
		defer cancel()
		if whole, err := other(short, server, q); err == nil && len(whole) <= q.udpSize {
			reply = whole
		}
	case err != nil && via == overTCP && ctx.Err() == nil:
		if reply, err = other(ctx, server, q); err == nil && truncated(reply) {
			return nil, errors.New("takes no tcp and its answer is too long for udp")
		}
	}
	if err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint16(reply, id(q.msg))
	if opcode(q.msg) == 0 {
		switch rcode(reply) {
		case rcodeServerFailure, rcodeNotImplemented, rcodeRefused:
			return reply, fmt.Errorf("response code %d", rcode(reply))
		}
	}
	return reply, nil
}

// dialServer connects to server; a call blocked on the Conn returns when ctx
// ends. The caller calls done in place of Close.
func (s *Server) dialServer(ctx context.Context, network string, server netip.AddrPort) (c net.Conn, done func(), err error) {
	c, err = s.dial(ctx, network, server)
	if err != nil {
		return nil, nil, err
	}
	s.count.tries.Add(1)
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	return c, func() { stop(); c.Close() }, nil
}

// withNewID returns a copy of the guest's message with a random ID.
func (q *query) withNewID() (msg []byte, newID uint16) {
	msg = append([]byte(nil), q.msg...)
	rand.Read(msg[:2])
	return msg, id(msg)
}

// askUDP sends the message in one datagram and returns the first datagram that
// answers it. One longer than udpBuffer counts as truncated.
func (s *Server) askUDP(ctx context.Context, server netip.AddrPort, q *query) ([]byte, error) {
	c, done, err := s.dialServer(ctx, "udp", server)
	if err != nil {
		return nil, err
	}
	defer done()
	msg, newID := q.withNewID()
	if _, err := c.Write(msg); err != nil {
		return nil, err
	}
	buf := udpBuffers.Get().(*[udpBuffer + 1]byte)
	defer udpBuffers.Put(buf)
	for {
		n, err := c.Read(buf[:])
		if err != nil {
			return nil, err // connection refused, as ICMP says so; or ctx ended
		}
		if !q.answers(buf[:n], newID) {
			s.count.mismatched.Add(1)
			continue
		}
		if n > udpBuffer {
			return q.truncatedReply(rcode(buf[:n])), nil
		}
		return append([]byte(nil), buf[:n]...), nil
	}
}

// askTCP asks over a connection of its own.
func (s *Server) askTCP(ctx context.Context, server netip.AddrPort, q *query) ([]byte, error) {
	c, done, err := s.dialServer(ctx, "tcp", server)
	if err != nil {
		return nil, err
	}
	defer done()
	msg, newID := q.withNewID()
	if err := writeMessage(c, msg); err != nil {
		return nil, err
	}
	reply, err := readMessage(c)
	if err == nil && !q.answers(reply, newID) {
		s.count.mismatched.Add(1)
		err = errors.New("not the answer to the question")
	}
	return reply, err
}
