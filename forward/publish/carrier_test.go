package publish

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/slipway-net/slipway/internal/flow"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(helperRole); role != "" {
		helper(role)
	}
	goleak.VerifyTestMain(m)
}

// helperRole makes a child of the test binary do something else, see helper.
const helperRole = "PUBLISH_TEST_ROLE"

// patience is how long tests with real sockets wait for what must come.
const patience = 20 * time.Second

var (
	own4 = netip.MustParseAddr("192.168.65.3")
	own6 = netip.MustParseAddr("fdc4:f303:9324::3")
)

// teller is a Carrier that tells every client the ID of the port it came to.
type teller struct {
	fail func(*Port) error // asked before a socket is taken
	hold chan struct{}     // nil, or what every Serve waits for

	mu   sync.Mutex
	open int // Closers that are not closed
}

type telling struct {
	t    *teller
	stop func()
	wg   sync.WaitGroup
}

func (c *telling) Close() error {
	c.stop()
	c.wg.Wait()
	c.t.add(-1)
	return nil
}

func (t *teller) add(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open += n
}

func (t *teller) isOpen() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.open
}

func (t *teller) begin(p *Port, stop func()) (*telling, error) {
	if t.hold != nil {
		<-t.hold
	}
	if t.fail != nil {
		if err := t.fail(p); err != nil {
			return nil, err
		}
	}
	t.add(1)
	return &telling{t: t, stop: stop}, nil
}

func (t *teller) ServeTCP(ln *net.TCPListener, p *Port) (io.Closer, error) {
	c, err := t.begin(p, func() { ln.SetDeadline(time.Unix(1, 0)) })
	if err != nil {
		return nil, err
	}
	c.wg.Go(func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			p.Stats.Clients.Add(1)
			fmt.Fprintf(client, "%d", p.ID)
			client.Close()
		}
	})
	return c, nil
}

func (t *teller) ServeUDP(conn *net.UDPConn, p *Port) (io.Closer, error) {
	c, err := t.begin(p, func() { conn.SetDeadline(time.Unix(1, 0)) })
	if err != nil {
		return nil, err
	}
	c.wg.Go(func() {
		for b := make([]byte, 16); ; {
			_, client, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			conn.WriteToUDPAddrPort(fmt.Append(nil, p.ID), client)
		}
	})
	return c, nil
}

// newBook makes a Book that is closed in the end, when nothing may be left of it.
func newBook(t *testing.T, cfg Config) (*Book, *teller) {
	t.Helper()
	c, _ := cfg.Carrier.(*teller)
	if c == nil {
		c = new(teller)
	}
	cfg.Carrier, cfg.Guest4, cfg.Guest6 = c, own4, own6
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	b := New(cfg)
	t.Cleanup(func() {
		b.Close()
		if n := c.isOpen(); n != 0 {
			t.Errorf("%d sockets are being carried after Close", n)
		}
		if b.ports != 0 || b.socks != 0 || len(b.owners)+len(b.taken)+len(b.byID) != 0 {
			t.Errorf("after Close: %d ports, %d sockets, owners %v, taken %v, IDs %v; want nothing", b.ports, b.socks, b.owners, b.taken, b.byID)
		}
	})
	return b, c
}

// add publishes, which must succeed.
func add(t *testing.T, b *Book, owner string, s flow.PortSpec) *Port {
	t.Helper()
	p, err := b.Add(owner, s)
	if err != nil {
		t.Fatalf("Add(%q, %v): %v", owner, s, err)
	}
	return p
}

// spec reads the notation of the command line.
func spec(t testing.TB, s string) flow.PortSpec {
	t.Helper()
	specs, err := flow.ParsePorts(s)
	if err != nil || len(specs) != 1 {
		t.Fatalf("ParsePorts(%q) = %v, %v", s, specs, err)
	}
	return specs[0]
}

// at returns s with another host port.
func at(s flow.PortSpec, port uint16) flow.PortSpec {
	s.Host = netip.AddrPortFrom(s.Host.Addr(), port)
	return s
}

// freePort returns a port that nobody has in either family and protocol, and that no
// kernel gives away meanwhile: those for clients begin at 32768.
func freePort(t *testing.T) uint16 {
	t.Helper()
	b := New(Config{Carrier: new(teller)})
	defer b.Close()
	for range 100 {
		host := netip.AddrPortFrom(netip.Addr{}, uint16(20_000+rand.IntN(12_000)))
		_, err1 := b.Add("probe", flow.PortSpec{Proto: flow.TCP, Host: host})
		_, err2 := b.Add("probe", flow.PortSpec{Proto: flow.UDP, Host: host})
		if err1 == nil && err2 == nil {
			return host.Port()
		}
	}
	t.Fatal("no free port")
	return 0
}

// tells returns what the teller behind an address says, "" if nobody does.
func tells(t *testing.T, proto flow.Proto, to netip.AddrPort) string {
	t.Helper()
	if to.Addr().IsUnspecified() {
		loop := loop6
		if to.Addr().Is4() {
			loop = loop4
		}
		to = netip.AddrPortFrom(loop, to.Port())
	}
	c, err := net.DialTimeout(proto.String(), to.String(), patience)
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if proto == flow.UDP {
		fmt.Fprint(c, "?")
	}
	b := make([]byte, 16)
	n, err := c.Read(b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// addrs returns the addresses of where p listens.
func addrs(p *Port) []string {
	var all []string
	for _, l := range p.Listens {
		all = append(all, l.Addr().String())
	}
	return all
}

// hint is what the user is told beside an error.
func hint(err error) string {
	var h interface{ Hint() string }
	if !errors.As(err, &h) {
		return ""
	}
	return h.Hint()
}

// ids lists b.
func ids(b *Book) []uint64 {
	var all []uint64
	for _, p := range b.List() {
		all = append(all, p.ID)
	}
	return slices.Clip(all)
}
