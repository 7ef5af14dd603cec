package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// guest.sock is what an engine may ask of its daemon: to publish ports, and to withdraw
// its own ones. It carries one JSON document a line:
//
//	client: {"publish": SPEC}    server: {"port": PORT}
//	client: {"withdraw": ID}     server: {"withdrawn": ID}
//	                             server: {"error": ..., "hint": ..., "status": N} to either
//
// with SPEC and PORT as on the control socket. Answers come in the order of the
// requests. A line that is no request gets an error, and the connection goes on; after
// one that is too long, or when the peer is refused, it ends. What an engine can make us
// hold for lines that it does not end is bounded (lines.go).
//
// A connection is a lease: when it ends, for whatever reason, its ports are withdrawn.
// So nothing stays published for a process that has gone. The end of the client's
// writing side is the end of the connection; the server closes once the ports are free.
//
// Somebody who was killed and started again (dockerd, docker-proxy) may ask for its ports
// before we have seen that its old connection ended. A conflict is therefore told only
// after all leases that the kernel knows to be over have been ended (settle).
//
// Who may ask: processes in the engine's network namespace, and the daemon's user in the
// daemon's own. A container has the socket if somebody gave it one, but it sits in a
// network namespace of its own.

// Limits of guest.sock, where any process of an engine may ask.
const (
	maxLeases    = 4096             // open at one time; dockerd has one for each port
	patience     = 10 * time.Second // with a client that does not read its answer
	settleLimit  = 3 * time.Second  // for leases that are over to end; less than docker-proxy waits
	refusedEvery = 10 * time.Second // a log line for refused peers
)

// GuestBackend is what a GuestServer serves. Its methods are called by many goroutines.
type GuestBackend interface {
	PortBackend

	// NetNS is the path of the engine's network namespace, like /proc/PID/ns/net.
	NetNS() string
}

// GuestServer serves one engine's guest.sock.
type GuestServer struct {
	backend GuestBackend
	log     *slog.Logger
	refused rate.Sometimes

	patience time.Duration // patience, except in tests
	long     longLines

	mu     sync.Mutex // guards the fields below
	leases map[*lease]struct{}
	last   uint64 // of the connections' numbers
}

// lease is one connection and what it has.
type lease struct {
	conn  *net.UnixConn
	owner string
	ports map[uint64]bool // by ID; its own goroutine's
	ended chan struct{}   // closed when the ports are withdrawn
}

// NewGuestServer makes a GuestServer. log may be nil.
func NewGuestServer(b GuestBackend, log *slog.Logger) *GuestServer {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &GuestServer{
		backend: b, log: log.With(slog.String("component", "guest.sock")),
		refused:  rate.Sometimes{First: 1, Interval: refusedEvery},
		patience: patience,
		leases:   map[*lease]struct{}{},
	}
}

// Serve answers on ln until ctx ends or ln fails, closes ln, ends all connections with
// their ports and returns after that. It returns nil if and only if ctx ended.
func (s *GuestServer) Serve(ctx context.Context, ln *net.UnixListener) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	serving, cancel := context.WithCancel(ctx)
	defer cancel()
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		c, err := acceptUnix(ln, ctx.Done(), s.log)
		if err == nil {
			conns.Go(func() { s.serve(serving, c) })
		} else if ctx.Err() != nil {
			return nil
		} else {
			return fmt.Errorf("serve guests on %v: %w", ln.Addr(), err)
		}
	}
}

func (s *GuestServer) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	pid, err := checkGuest(c, s.backend.NetNS())
	if err != nil {
		s.refused.Do(func() { s.log.Warn("connection refused", slog.Any("err", err)) })
		s.answer(c, guestFailure(&Error{Message: err.Error(), Status: http.StatusForbidden}))
		return
	}
	l, err := s.begin(c, pid)
	if err != nil {
		s.answer(c, guestFailure(err))
		return
	}
	defer s.end(l)
	s.requests(ctx, l)
}

// begin makes a lease, which end ends.
func (s *GuestServer) begin(c *net.UnixConn, pid int32) (*lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.leases) >= maxLeases {
		return nil, &Error{Message: fmt.Sprintf("connect guest.sock: all %d connections are in use", maxLeases), Status: http.StatusServiceUnavailable}
	}
	s.last++
	l := &lease{conn: c, owner: fmt.Sprintf("guest:%d/%d", pid, s.last), ports: map[uint64]bool{}, ended: make(chan struct{})}
	s.leases[l] = struct{}{}
	return l, nil
}

func (s *GuestServer) end(l *lease) {
	for id := range l.ports {
		s.backend.RemovePort(id) // the engine's owner may have done so before
	}
	s.mu.Lock()
	delete(s.leases, l)
	s.mu.Unlock()
	close(l.ended)
}

// requests answers until the connection ends.
func (s *GuestServer) requests(ctx context.Context, l *lease) {
	in := newLines(l.conn, &s.long)
	defer in.close()
	for {
		line, err := in.next()
		if refused := (*Error)(nil); errors.As(err, &refused) {
			s.answer(l.conn, guestFailure(refused))
		}
		if err != nil || !s.answer(l.conn, s.request(ctx, l, line)) {
			return
		}
	}
}

// guestReply is what the server says; one of the fields is set.
type guestReply struct {
	Port      *Port  `json:"port,omitempty"`
	Withdrawn uint64 `json:"withdrawn,omitempty"`
	*Error
	Status int `json:"status,omitempty"` // of Error
}

func guestFailure(err error) guestReply {
	e := asError(err)
	return guestReply{Error: e, Status: e.Status}
}

// answer reports whether the peer may have got it. Who does not read is cut off: the
// answers would pile up here.
func (s *GuestServer) answer(c *net.UnixConn, r guestReply) bool {
	c.SetWriteDeadline(time.Now().Add(s.patience))
	return json.NewEncoder(c).Encode(r) == nil
}

// guestRequest is what the client says.
type guestRequest struct {
	Publish  json.RawMessage `json:"publish,omitempty"`
	Withdraw uint64          `json:"withdraw,omitempty"` // 0 is no port's ID
}

// readGuestRequest returns the port to publish, or the ID of one to withdraw. The error
// is an *Error.
func readGuestRequest(line []byte) (s flow.PortSpec, withdraw uint64, err error) {
	var r guestRequest
	if err := decode(line, &r); err != nil {
		return s, 0, err
	}
	if (r.Publish == nil) == (r.Withdraw == 0) {
		return s, 0, invalid(`read request: must be {"publish": SPEC} or {"withdraw": ID}`)
	}
	if r.Publish != nil {
		s, err = readSpec(r.Publish)
	}
	return s, r.Withdraw, err
}

func (s *GuestServer) request(ctx context.Context, l *lease, line []byte) guestReply {
	spec, id, err := readGuestRequest(line)
	switch {
	case err != nil:
		return guestFailure(err)
	case id != 0:
		return s.withdraw(l, id)
	}
	p, err := s.publish(ctx, l, spec)
	if err != nil {
		return guestFailure(err)
	}
	l.ports[p.ID] = true
	return guestReply{Port: &p}
}

func (s *GuestServer) publish(ctx context.Context, l *lease, spec flow.PortSpec) (Port, error) {
	p, err := s.backend.AddPort(ctx, l.owner, spec)
	if err != nil && asError(err).Status == http.StatusConflict && s.settle(ctx, l) {
		return s.backend.AddPort(ctx, l.owner, spec)
	}
	return p, err
}

func (s *GuestServer) withdraw(l *lease, id uint64) guestReply {
	if !l.ports[id] {
		return guestFailure(&Error{Message: fmt.Sprintf("withdraw port %d: it is none of this connection", id), Status: http.StatusNotFound})
	}
	delete(l.ports, id)
	if err := s.backend.RemovePort(id); err != nil {
		return guestFailure(err)
	}
	return guestReply{Withdrawn: id}
}

// settle waits until the leases whose clients have gone have ended, and reports whether
// there were some. Two that wait for each other do so until settleLimit, or ctx ends.
func (s *GuestServer) settle(ctx context.Context, l *lease) bool {
	gone := s.gone(l)
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	for _, g := range gone {
		select {
		case <-g.ended:
		case <-limit.C:
			return true
		case <-ctx.Done():
			return false
		}
	}
	return len(gone) > 0
}

// gone returns the leases but l whose clients have closed.
func (s *GuestServer) gone(l *lease) (gone []*lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for other := range s.leases {
		if other != l && hungUp(other.conn) {
			gone = append(gone, other)
		}
	}
	return gone
}
