package dockerproxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/flow"
)

var quiet = slog.New(slog.DiscardHandler)

// serving runs serve until the test ends.
func serving(t *testing.T, serve func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { serve(ctx) })
	t.Cleanup(func() { cancel(); done.Wait() })
}

// startTCP is a proxy in this process; it returns its address.
func startTCP(t *testing.T, container netip.AddrPort) *net.TCPAddr {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	serving(t, (&tcpServer{ln: ln, container: container, log: quiet}).serve)
	return ln.Addr().(*net.TCPAddr)
}

func dialTCP(t *testing.T, to *net.TCPAddr) *net.TCPConn {
	t.Helper()
	c, err := net.DialTCP("tcp", nil, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// TestHalfClose: the end of the client's bytes reaches the container, whose answer comes
// after it.
func TestHalfClose(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := dialTCP(t, startTCP(t, ap(ln.Addr().String())))
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	server.SetDeadline(time.Now().Add(10 * time.Second))
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	var written sync.WaitGroup
	defer written.Wait()
	written.Go(func() { c.Write(sent); c.CloseWrite() })
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("the container got %d bytes, %v, want %d", len(got), err, len(sent))
	}
	io.WriteString(server, "answer")
	server.Close()
	if b, err := io.ReadAll(c); string(b) != "answer" || err != nil {
		t.Errorf("the client got %q, %v", b, err)
	}
}

// TestReset passes on both ways, and a container that is not there is one.
func TestReset(t *testing.T) {
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	at := startTCP(t, ap(ln.Addr().String()))
	for _, byClient := range []bool{true, false} {
		c := dialTCP(t, at)
		server, err := ln.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		resets, sees := c, server
		if !byClient {
			resets, sees = server, c
		}
		resets.SetLinger(0)
		resets.Close()
		sees.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := sees.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("by client %t: the other side sees %v", byClient, err)
		}
		server.Close()
	}
	c, err := net.DialTCP("tcp", nil, startTCP(t, free(t, flow.TCP, loopback4)))
	if err == nil { // the reset may be quicker than connect
		c.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("without a container the client sees %v", err)
	}
}

// startUDP is a proxy in this process on all addresses of a family.
func startUDP(t *testing.T, at netip.Addr, container netip.AddrPort, idle time.Duration) (*udpServer, uint16) {
	t.Helper()
	sock, err := net.ListenUDP("udp"+family(netip.AddrPortFrom(at, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
	if err != nil {
		t.Fatal(err)
	}
	s, err := newUDPServer(sock, container, quiet)
	if err != nil {
		t.Fatal(err)
	}
	s.idle = idle
	serving(t, s.serve)
	return s, sock.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func (s *udpServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.mappings)
}

// TestUDPSource: an answer comes from the address that was asked, not from the one that
// the kernel would choose, for one client that asks two.
func TestUDPSource(t *testing.T) {
	s, port := startUDP(t, netip.IPv4Unspecified(), echo(t, flow.UDP, loopback4), udpIdle)
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 100)
	for _, asked := range []string{"127.0.0.2", "127.3.3.3", "127.0.0.2"} {
		to := netip.AddrPortFrom(netip.MustParseAddr(asked), port)
		if _, err := c.WriteToUDPAddrPort([]byte(asked), to); err != nil {
			t.Fatal(err)
		}
		n, from, err := c.ReadFromUDPAddrPort(b)
		if from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); err != nil || from != to || string(b[:n]) != asked {
			t.Errorf("asked %v, answer %q from %v, %v", to, b[:n], from, err)
		}
	}
	if n := s.count(); n != 2 {
		t.Errorf("%d mappings, want one for each address asked", n)
	}
}

// TestUDPSizes: from nothing to the largest datagram, on both families.
func TestUDPSizes(t *testing.T) {
	for _, at := range []netip.Addr{loopback4, loopback6} {
		_, port := startUDP(t, at, echo(t, flow.UDP, at), udpIdle)
		c := dialUDP(t, netip.AddrPortFrom(at, port))
		for _, size := range []int{0, 1, 1472, 65507} {
			sent, b := bytes.Repeat([]byte("u"), size), make([]byte, 65536)
			if _, err := c.Write(sent); err != nil {
				t.Fatalf("send %d bytes: %v", size, err)
			}
			if n, err := c.Read(b); err != nil || n != size {
				t.Errorf("%v: of %d bytes %d came back, %v", at, size, n, err)
			}
		}
	}
}

func dialUDP(t *testing.T, to netip.AddrPort) net.Conn {
	t.Helper()
	c, err := net.Dial("udp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// TestUDPIdle: a mapping ends by itself, and one in use does not.
func TestUDPIdle(t *testing.T) {
	const idle = 2 * time.Second // a busy machine does nothing for shorter times
	s, port := startUDP(t, loopback4, echo(t, flow.UDP, loopback4), idle)
	to := netip.AddrPortFrom(loopback4, port)
	once, used := dialUDP(t, to), dialUDP(t, to)
	key := func(c net.Conn) udpKey { return udpKey{ap(c.LocalAddr().String()), loopback4} }
	has := func(k udpKey) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.mappings[k] != nil
	}
	once.Write([]byte("once"))
	eventually(t, "there is a mapping", func() bool { return has(key(once)) })
	eventually(t, "there are two", func() bool {
		used.Write([]byte("in use"))
		return has(key(used))
	})
	s.mu.Lock()
	first := s.mappings[key(used)]
	s.mu.Unlock()
	eventually(t, "the one not in use has ended", func() bool {
		used.Write([]byte("in use"))
		return !has(key(once))
	})
	s.mu.Lock()
	if s.mappings[key(used)] != first {
		t.Error("the mapping in use has ended")
	}
	s.mu.Unlock()
	eventually(t, "no mapping is left", func() bool { return s.count() == 0 })
}

// TestUDPRefused: a container that says that its port is closed gets the next datagram
// all the same.
func TestUDPRefused(t *testing.T) {
	container := free(t, flow.UDP, loopback4)
	s, port := startUDP(t, loopback4, container, udpIdle)
	c := dialUDP(t, netip.AddrPortFrom(loopback4, port))
	c.Write([]byte("too early"))
	eventually(t, "there is a mapping", func() bool { return s.count() == 1 })
	server, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(container))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	server.SetDeadline(time.Now().Add(10 * time.Second))
	c.Write([]byte("now"))
	b := make([]byte, 100)
	n, err := server.Read(b)
	if string(b[:n]) == "too early" { // not as early as that: there is a mapping before it is sent on
		n, err = server.Read(b)
	}
	if err != nil || string(b[:n]) != "now" {
		t.Errorf("the container got %q, %v", b[:n], err)
	}
}

// TestUDPLimit: the mapping that was idle longest makes room.
func TestUDPLimit(t *testing.T) {
	s := &udpServer{container: ap("127.0.0.1:9"), idle: udpIdle, log: quiet, mappings: map[udpKey]*udpMapping{}}
	var answers sync.WaitGroup
	defer answers.Wait()
	defer s.closeAll()
	client := func(i int) udpKey {
		return udpKey{netip.AddrPortFrom(loopback4, uint16(i+1)), loopback4}
	}
	const most = 300 // in place of udpClients: each has a descriptor
	for i := range most {
		m, err := s.mapping(client(i), &answers)
		if err != nil {
			t.Fatal(err)
		}
		m.seen.Add(int64((i+most-7)%most) * int64(time.Second)) // client 7 is the oldest
	}
	s.mu.Lock()
	s.dropOldestLocked()
	_, left := s.mappings[client(7)]
	n := len(s.mappings)
	s.mu.Unlock()
	if left || n != most-1 {
		t.Errorf("%d mappings are left, the oldest among them: %t", n, left)
	}
}

// FuzzAskedAddr: control messages come from the kernel, whatever socket dockerd passes.
func FuzzAskedAddr(f *testing.F) {
	f.Add(sourceMessage(netip.MustParseAddr("192.0.2.1")))
	f.Add(sourceMessage(netip.MustParseAddr("2001:db8::1")))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		a := askedAddr(b)
		if a.IsValid() && len(sourceMessage(a)) == 0 {
			t.Errorf("no message for %v", a)
		}
	})
}

// TestNobodyAnswers: who waits for a daemon in vain says so.
func TestNobodyAnswers(t *testing.T) {
	sock := t.TempDir() + "/guest.sock"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	tries := 0
	dial := func() (conn, error) {
		if tries++; tries > 2 {
			cancel()
		}
		return dialGuest(sock)
	}
	l := &lease{dial: dial, log: quiet, spec: flow.PortSpec{Proto: flow.TCP, Host: ap("0.0.0.0:8080")}}
	err := l.acquire(ctx)
	if refused := (*api.Error)(nil); err == nil || errors.As(err, &refused) || !errors.Is(err, unix.ENOENT) {
		t.Errorf("acquire: %v, want an error that names the missing socket", err)
	}
}
