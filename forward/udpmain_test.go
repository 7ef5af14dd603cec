package forward

import (
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeGuest records what it is given.
type fakeGuest struct {
	mu        sync.Mutex // guards the fields below
	changed   *sync.Cond
	datagrams []flow.Datagram
	echoes    []flow.Echo
	errors    []flow.Error
}

func newFakeGuest() *fakeGuest {
	g := new(fakeGuest)
	g.changed = sync.NewCond(&g.mu)
	return g
}

func (g *fakeGuest) record(f func()) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
	g.changed.Broadcast()
	return nil
}

func (g *fakeGuest) WriteDatagram(d flow.Datagram) error {
	d.Payload = slices.Clone(d.Payload)
	return g.record(func() { g.datagrams = append(g.datagrams, d) })
}

func (g *fakeGuest) WriteEcho(e flow.Echo) error {
	e.Payload = slices.Clone(e.Payload)
	return g.record(func() { g.echoes = append(g.echoes, e) })
}

func (g *fakeGuest) WriteError(e flow.Error) error {
	e.Quote = slices.Clone(e.Quote)
	return g.record(func() { g.errors = append(g.errors, e) })
}

// patience is how long tests with real sockets wait for what must come.
const patience = 20 * time.Second

// take waits for one record of *list and takes it out.
func take[T any](t *testing.T, g *fakeGuest, list *[]T) T {
	t.Helper()
	deadline := time.Now().Add(patience)
	wake := time.AfterFunc(patience, g.changed.Broadcast)
	defer wake.Stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(*list) == 0 {
		if time.Now().After(deadline) {
			t.Fatalf("no %T within %v; have %d datagrams, %d echoes, errors %+v", *new(T), patience, len(g.datagrams), len(g.echoes), g.errors)
		}
		g.changed.Wait()
	}
	v := (*list)[0]
	*list = (*list)[1:]
	return v
}

// lengths returns how much of everything was recorded.
func (g *fakeGuest) lengths() (datagrams, echoes, errors int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.datagrams), len(g.echoes), len(g.errors)
}

// fakeUDP are sockets that record what is sent.
type fakeUDP struct {
	opened   int
	closed   atomic.Int32 // by the sweeper, too
	mappings []*udpMapping
	sent     []sentDatagram
	sendErr  error // what every send returns
	openErr  func() error
}

type sentDatagram struct {
	d  flow.Datagram
	to netip.AddrPort
	m  *udpMapping
}

type fakeUDPSocket struct {
	all *fakeUDP
	m   *udpMapping
}

func (f *fakeUDP) open(_ bool, m *udpMapping) (udpSocket, error) {
	if f.openErr != nil {
		if err := f.openErr(); err != nil {
			return nil, err
		}
	}
	f.opened++
	f.mappings = append(f.mappings, m)
	return &fakeUDPSocket{f, m}, nil
}

func (f *fakeUDP) close() {}

func (s *fakeUDPSocket) send(d flow.Datagram, to netip.AddrPort) error {
	d.Payload = slices.Clone(d.Payload)
	s.all.sent = append(s.all.sent, sentDatagram{d, to, s.m})
	return s.all.sendErr
}

func (s *fakeUDPSocket) close() { s.all.closed.Add(1) }

// fakeMaps returns maps on fake sockets.
func fakeMaps(t *testing.T, policy PolicyConfig, limit int) (*udpMaps, *fakeUDP, *fakeGuest) {
	t.Helper()
	f, g := new(fakeUDP), newFakeGuest()
	u := newUDPMaps(udpConfig{
		Guest: g, Table: table.New(), Policy: NewPolicy(policy), Log: slog.New(slog.DiscardHandler), Max: limit, sockets: f,
	})
	t.Cleanup(func() {
		u.close()
		if f.opened != int(f.closed.Load()) {
			t.Errorf("%d sockets opened, %d closed", f.opened, f.closed.Load())
		}
		if n := u.peers.n.Load(); n != 0 || u.n != 0 || len(u.guests) != 0 || u.unanswered.Len() != 0 {
			t.Errorf("after close: %d peers, %d mappings, %d guests, %d unanswered; want none", n, u.n, len(u.guests), u.unanswered.Len())
		}
	})
	return u, f, g
}

var (
	guest1 = netip.MustParseAddrPort("192.168.65.3:40000")
	guest2 = netip.MustParseAddrPort("192.168.65.4:40000")
	guest6 = netip.MustParseAddrPort("[fdc4:f303:9324::3]:40000")
	peerA  = netip.MustParseAddrPort("198.51.100.7:4000")
	peerB  = netip.MustParseAddrPort("203.0.113.8:5000")
	alias4 = netip.MustParseAddr("192.168.65.2")
	alias6 = netip.MustParseAddr("fdc4:f303:9324::2")
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
