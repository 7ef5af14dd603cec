package forward

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
	"github.com/slipway-net/slipway/internal/loop"
)

// newSockets makes Sockets that may dial the host's loopback through the host alias.
func newSockets(t *testing.T) (*Sockets, *table.Table) {
	t.Helper()
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	l.Start()
	tab := table.New()
	f := New(Config{Table: tab, Policy: NewPolicy(PolicyConfig{
		Host4: hostAlias, HostAccess: HostAccess{All: true},
	})})
	s := f.NewSockets(l)
	t.Cleanup(func() {
		s.Close()
		l.Close()
		f.Close()
		if n := tab.Len(); n != 0 {
			t.Errorf("%d flows are left in the table", n)
		}
	})
	return s, tab
}

var hostAlias = netip.MustParseAddr("192.168.65.2")

// begin dials port of the host alias and waits for the verdict.
func begin(t *testing.T, s *Sockets, port uint16) flow.Verdict {
	t.Helper()
	got := make(chan flow.Verdict, 2)
	s.loop.Do(func() {
		s.Begin(flow.Tuple{
			Proto: flow.TCP, Guest: netip.MustParseAddrPort("192.168.65.3:1000"), Target: netip.AddrPortFrom(hostAlias, port),
		}, func(v flow.Verdict) { got <- v })
	})
	select {
	case v := <-got:
		return v
	case <-time.After(patience):
		t.Fatal("no verdict")
		return flow.Verdict{}
	}
}

func listenLoopback(t *testing.T) (*net.TCPListener, uint16) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener), ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

func TestBeginConnects(t *testing.T) {
	s, _ := newSockets(t)
	ln, port := listenLoopback(t)
	v := begin(t, s, port)
	if v.Answer != flow.Connect || v.Flow.Path != flow.Kernel {
		t.Fatalf("verdict %+v", v)
	}
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	guest, fd := loopbackPair(t, largeSegments)
	s.loop.Do(func() { s.Join(fd, v) })
	io.WriteString(guest, "hello")
	guest.CloseWrite()
	server.SetDeadline(time.Now().Add(patience))
	if b, err := io.ReadAll(server); string(b) != "hello" || err != nil {
		t.Errorf("the server read %q, %v", b, err)
	}
}

func TestBeginRefused(t *testing.T) {
	s, tab := newSockets(t)
	ln, port := listenLoopback(t)
	ln.Close()
	if v := begin(t, s, port); v.Answer != flow.Reset {
		t.Errorf("verdict %+v", v)
	}
	if n := tab.Len(); n != 0 {
		t.Errorf("%d flows in the table", n)
	}
}

func TestBeginDenied(t *testing.T) {
	s, _ := newSockets(t)
	var got flow.Verdict
	s.loop.Do(func() {
		s.Begin(flow.Tuple{Proto: flow.TCP, Guest: netip.MustParseAddrPort("192.168.65.3:1000"), Target: netip.MustParseAddrPort("127.0.0.1:80")},
			func(v flow.Verdict) { got = v })
	})
	if got.Answer == flow.Connect || s.f.stats.denied.Load() != 1 {
		t.Errorf("verdict %+v, %d denied", got, s.f.stats.denied.Load())
	}
}

// fullListener is a listener whose queue is full, so that a dial takes time.
func fullListener(t *testing.T) (port uint16) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, _ := unix.Getsockname(fd)
	port = uint16(sa.(*unix.SockaddrInet4).Port)
	at := netip.AddrPortFrom(loopback4, port).String()
	c, err := net.Dial("tcp", at) // takes the only place
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	waitFor(t, "the queue is full", func() bool {
		c, err := net.DialTimeout("tcp", at, 200*time.Millisecond)
		if err == nil { // not yet
			c.Close()
		}
		return err != nil
	})
	return port
}

func TestBeginCancelled(t *testing.T) {
	s, tab := newSockets(t)
	port := fullListener(t)
	got := make(chan flow.Verdict, 2)
	var d *Dial
	s.loop.Do(func() {
		d = s.Begin(flow.Tuple{
			Proto: flow.TCP, Guest: netip.MustParseAddrPort("192.168.65.3:1000"), Target: netip.AddrPortFrom(hostAlias, port),
		}, func(v flow.Verdict) { got <- v })
	})
	if d == nil {
		t.Fatalf("the dial is over: %+v", <-got)
	}
	if n := tab.Len(); n != 1 {
		t.Errorf("%d flows in the table while dialling", n)
	}
	s.loop.Do(func() { d.Cancel(); d.Cancel() })
	if v := <-got; v.Answer != flow.Silence {
		t.Errorf("verdict %+v", v)
	}
	if len(got) != 0 || s.f.stats.cancelled.Load() != 1 {
		t.Errorf("%d more verdicts, %d cancelled", len(got), s.f.stats.cancelled.Load())
	}
}

func TestBeginLeavesDescriptors(t *testing.T) {
	s, _ := newSockets(t)
	_, port := listenLoopback(t)
	old := maxFD
	maxFD = func() int { return 2 }
	defer func() { maxFD = old }()
	if v := begin(t, s, port); v.Answer != flow.Silence || s.f.stats.failed.Load() != 1 {
		t.Errorf("verdict %+v, %d failed", v, s.f.stats.failed.Load())
	}
}

func TestHeldHostAborts(t *testing.T) {
	s, _ := newSockets(t)
	ln, port := listenLoopback(t)
	v := begin(t, s, port)
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	s.f.Discard(v)
	server.SetDeadline(time.Now().Add(patience))
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server read %v instead of a reset", err)
	}
}
