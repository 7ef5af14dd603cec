// Package dns is the name server that the guest sees on the gateway address.
//
// It knows the built-in names (host.slipway.internal and friends) and hands
// every other message, whatever its type or opcode, byte for byte to the host's
// own DNS servers, so a guest can ask anything the host could. Make a Server
// with New and run it with Serve; ReadResolvConf tells who the host's servers are.
package dns

// Theory of operation.
//
// A message comes as a datagram or on a TCP connection from the guest. It is
// looked at just far enough to answer three questions (wire.go): is it a query
// at all, does it ask for a built-in name, how long may the answer be.
//
//	not a query, shorter than a header ... dropped, counted
//	question section cannot be read ...... FORMERR
//	built-in name ........................ answered here (names.go)
//	no free slot ......................... REFUSED (slots.go)
//	anything else ........................ asked upstream (upstream.go)
//
// Upstream the message keeps every bit but its ID, which is fresh and random for
// every try, as is the source port: each try has a socket of its own, so an
// off-path attacker has to guess 32 bits and learns nothing from the guest's ID.
// A shared socket would save file descriptors and give half of that away. A reply counts
// only if it comes from the server asked (the socket is connected), has
// the ID and opcode and repeats the question; everything else on that socket is
// counted and ignored.
//
// Servers are asked in order. The next one is asked when a server refused,
// failed (SERVFAIL, NOTIMP, REFUSED: what the host's own resolver skips, too) or
// was silent for a while, but a slow server is still listened to: the first good
// answer wins. When nobody answered in queryTimeout the guest gets SERVFAIL, and
// never NXDOMAIN: a name server that is away does not make a name vanish.
//
// The answer to a datagram has to fit the size that the guest gave (EDNS0, RFC
// 6891; 512 without). A truncated upstream answer is asked for again over TCP and
// passed on whole if it fits, else the truncated one is: the guest then comes
// back over TCP by itself. A question that came over TCP goes upstream over TCP,
// and over UDP only to a server that takes no TCP.
//
// What is not handled here: caching, split DNS, search domains (the guest's own
// resolver does these), DNS over TLS. Several questions may be in flight on
// one TCP connection and are answered in any order (RFC 7766 section 6.2.1.1).

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits and timeouts. A query that is being asked upstream holds one goroutine
// and one socket for each server asked (maxTries at most).
const (
	// queryTimeout is how long the guest may wait for an answer. glibc and musl
	// give up on us after 5 s; the SERVFAIL has to arrive before that.
	queryTimeout = 4500 * time.Millisecond
	// truncatedTimeout bounds the second question over TCP while a truncated
	// answer, which is better than none, waits.
	truncatedTimeout = 2 * time.Second

	maxQueries        = 1024               // being asked upstream at one time
	maxQueriesOfGuest = maxQueries * 2 / 3 // by one guest address
	maxStreams        = 256                // TCP connections from the guest
	maxStreamsOfGuest = maxStreams * 2 / 3 // from one guest address
	maxPipelined      = 32                 // unanswered queries on one TCP connection

	// streamIdle closes a TCP connection without a query (RFC 7766 section
	// 6.2.3 asks for a few seconds) and one that does not take its answers.
	streamIdle = 10 * time.Second

	warnEvery = 10 * time.Second // about upstreams that do not answer
)

// Config says what a Server answers and whom it asks.
type Config struct {
	// Names are the built-in names with their addresses: fully qualified, with
	// or without the final dot, in any case. An address is mapped back to its
	// name (PTR); of several names, one below slipway.internal is preferred,
	// then the first in alphabetical order.
	Names map[string][]netip.Addr

	// Subnets are the guest's own networks. The host's servers know nothing
	// about them: a PTR question about an address without a built-in name is
	// answered NXDOMAIN here.
	Subnets []netip.Prefix

	// Upstreams returns the servers to ask, in order of preference; it is called
	// for every query and must not block. Servers on the host's loopback are
	// fine. None means that every query but for built-in names fails.
	Upstreams func() []netip.AddrPort

	// Dial connects to an upstream; network is "udp" or "tcp". A udp Conn must
	// have a source port of its own and take datagrams of addr only. Nil means
	// the host's ordinary sockets.
	Dial func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)

	Log *slog.Logger // nil: no log
}

// Server answers the guest's DNS messages. Make one with New.
type Server struct {
	upstreams func() []netip.AddrPort
	dial      func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)
	log       *slog.Logger
	warn      rate.Sometimes
	names     *nameTable
	queries   *slots
	streams   *slots
	count     counters
}

// New makes a Server. It does nothing until Serve.
func New(c Config) *Server {
	s := &Server{
		upstreams: c.Upstreams,
		dial:      c.Dial,
		log:       c.Log,
		warn:      rate.Sometimes{Interval: warnEvery},
		names:     newNameTable(c.Names, c.Subnets),
		queries:   newSlots(maxQueries, maxQueriesOfGuest),
		streams:   newSlots(maxStreams, maxStreamsOfGuest),
	}
	if s.upstreams == nil {
		s.upstreams = func() []netip.AddrPort { return nil }
	}
	if s.dial == nil {
		s.dial = dialHost
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.log = s.log.With(slog.String("component", "dns"))
	return s
}

// Serve answers on every listener until ctx ends or one of them fails. It takes
// ownership of the listeners, closes them and returns after its last goroutine;
// nil if and only if ctx ended. Serve may be called once.
func (s *Server) Serve(ctx context.Context, packets []net.PacketConn, streams []net.Listener) error {
	run, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var wg sync.WaitGroup
	for _, pc := range packets {
		wg.Go(func() { stop(s.servePackets(run, pc)) })
	}
	for _, ln := range streams {
		wg.Go(func() { stop(s.serveStreams(run, ln)) })
	}
	<-run.Done()
	for _, pc := range packets {
		pc.Close()
	}
	for _, ln := range streams {
		ln.Close()
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(run)
}

// dialHost is the default Dial. connect(2) on an unbound UDP socket takes a random
// port and makes the kernel drop datagrams of anybody else.
func dialHost(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network, addr.String())
}
