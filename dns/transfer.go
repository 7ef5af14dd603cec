package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

// A zone transfer is the one question with more than one message for an answer
// (RFC 5936 section 2.2). It is only asked over TCP, and only of the first server
// that takes the connection: there is no telling a bad half from a good one.

// transferIdle ends a transfer when the upstream sends nothing for this long:
// where it ends is written in its records, which we do not read.
const transferIdle = 5 * time.Second

// isTransfer says whether q asks for a zone transfer.
func (q *query) isTransfer() bool {
	return opcode(q.msg) == dns.OpcodeQuery && (q.qtype == dns.TypeAXFR || q.qtype == dns.TypeIXFR)
}

// transfer passes every message that answers q to write until the upstream is
// done, write fails, or ctx ends.
func (s *Server) transfer(ctx context.Context, q *query, write func([]byte) error) {
	err := errNoUpstream
	for _, server := range s.upstreams() {
		var passed int
		if passed, err = s.transferFrom(ctx, server, q, write); passed > 0 {
			s.count.upstream.Add(1)
			return
		}
		if ctx.Err() != nil {
			return
		}
	}
	s.count.failed.Add(1)
	s.log.Debug("zone transfer failed", slog.Any("error", err))
	write(q.replyWith(rcodeServerFailure, edeNetworkError, noAnswer))
}

// transferFrom returns how many messages it passed on.
func (s *Server) transferFrom(ctx context.Context, server netip.AddrPort, q *query, write func([]byte) error) (passed int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	idle := time.AfterFunc(transferIdle, cancel)
	defer idle.Stop()
	c, done, err := s.dialServer(ctx, "tcp", server)
	if err != nil {
		return 0, err
	}
	defer done()
	msg, newID := q.withNewID()
	if err := writeMessage(c, msg); err != nil {
		return 0, err
	}
	for {
		reply, err := readMessage(c)
		if err != nil {
			return passed, err
		}
		// Only the first message has to repeat the question.
		again := passed > 0 && len(reply) >= headerLen && id(reply) == newID
		if !again && !q.answers(reply, newID) {
			s.count.mismatched.Add(1)
			return passed, errors.New("not the answer to the question")
		}
		binary.BigEndian.PutUint16(reply, id(q.msg))
		if err := write(reply); err != nil {
			return passed + 1, err
		}
		passed++
		idle.Reset(transferIdle)
	}
}
