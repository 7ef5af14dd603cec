package probe

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestServeTargets(t *testing.T) {
	s, err := Serve(t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got := s.Targets()
	if got.HostTCP == 0 || got.HostUDP == 0 {
		t.Errorf("host ports %d and %d", got.HostTCP, got.HostUDP)
	}
	for _, k := range []string{"tcp4", "tcp6", "udp4", "udp6", "ping4", "ping6"} {
		has := false
		for _, arg := range got.Args() {
			has = has || strings.HasPrefix(arg, k+"=") && !strings.Contains(arg, "=none:")
		}
		if has == (got.Missing[k] != "") {
			t.Errorf("%s: there %v, missing because %q", k, has, got.Missing[k])
		}
	}
	for _, a := range []netip.Addr{got.TCP4.Addr(), got.TCP6.Addr(), got.Ping4, got.Ping6} {
		if a.IsValid() && (a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified()) {
			t.Errorf("a direct target is on %v", a)
		}
	}
	for _, a := range []netip.Addr{loopback4, loopback6} {
		if !haveLoopback(a) {
			continue
		}
		if _, err := echoTCP(t.Context(), netip.AddrPortFrom(a, got.HostTCP)); err != nil {
			t.Errorf("tcp on %v: %v", a, err)
		}
		if _, err := echoUDP(t.Context(), netip.AddrPortFrom(a, got.HostUDP)); err != nil {
			t.Errorf("udp on %v: %v", a, err)
		}
	}
}

func haveLoopback(a netip.Addr) bool {
	for _, own := range ownAddrs() {
		if own == a {
			return true
		}
	}
	return false
}

// A host with loopback only has no direct targets and says why.
func TestServeWithoutAddresses(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := &Services{log: slog.New(slog.DiscardHandler), own: []netip.Addr{loopback4}, cancel: cancel}
	defer s.Close()
	s.directServices(ctx, nil)
	s.directServices(ctx, []netip.Addr{netip.MustParseAddr("192.0.2.199")}) // not ours
	got := s.Targets()
	for _, k := range []string{"tcp4", "udp4", "ping4"} {
		if !strings.Contains(got.Missing[k], "192.0.2.199") {
			t.Errorf("%s: %q", k, got.Missing[k])
		}
	}
	for _, k := range []string{"tcp6", "udp6", "ping6"} {
		if !strings.Contains(got.Missing[k], "no IPv6 address") {
			t.Errorf("%s: %q", k, got.Missing[k])
		}
	}
	if got.TCP4.IsValid() || got.UDP4.IsValid() || got.Ping4.IsValid() {
		t.Errorf("targets %v", got.Args())
	}
}

// A host without any address but loopback serves host access.
func TestServeIPv4Only(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := &Services{log: slog.New(slog.DiscardHandler), own: []netip.Addr{loopback4}, cancel: cancel}
	defer s.Close()
	if err := s.hostServices(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := echoTCP(t.Context(), netip.AddrPortFrom(loopback4, s.Targets().HostTCP)); err != nil {
		t.Error(err)
	}
}

// Strangers get no echo.
func TestServeAnswersOnlyTheHost(t *testing.T) {
	s := &Services{own: []netip.Addr{loopback4, netip.MustParseAddr("192.0.2.1")}}
	for from, want := range map[string]bool{
		"127.0.0.1:1": true, "[::1]:1": true, "192.0.2.1:1": true, "[::ffff:192.0.2.1]:1": true,
		"192.0.2.2:1": false, "[2001:db8::1]:1": false, "[fe80::1%1]:1": false,
	} {
		if got := s.answers(netip.MustParseAddrPort(from)); got != want {
			t.Errorf("answers(%s) = %v, want %v", from, got, want)
		}
	}
}

// Connections over the limit are closed, the others stay, and Close ends them all.
func TestServeLimit(t *testing.T) {
	s, err := Serve(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	to := netip.AddrPortFrom(loopback4, s.Targets().HostTCP).String()
	var conns []net.Conn
	for range maxEchoes {
		c, err := net.Dial("tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
		if err := pingPong(c); err != nil { // it has been accepted
			t.Fatal(err)
		}
	}
	over, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	if err := pingPong(over); err == nil {
		t.Errorf("connection %d was served", maxEchoes+1)
	}
	if err := pingPong(conns[0]); err != nil {
		t.Errorf("connection 1 after the limit: %v", err)
	}
	s.Close()
	if err := pingPong(conns[0]); err == nil {
		t.Error("a connection is served after Close")
	}
}

// pingPong wants four bytes back.
func pingPong(c net.Conn) error {
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	if !bytes.Equal(buf, []byte("ping")) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

func TestServeEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s, err := Serve(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	s.Close()
	if _, err := echoTCP(t.Context(), netip.AddrPortFrom(loopback4, s.Targets().HostTCP)); err == nil {
		t.Error("served after the end of the context")
	}
}

func TestCandidates(t *testing.T) {
	var own []netip.Addr
	for _, a := range []string{"127.0.0.1", "::1", "fe80::1", "169.254.1.1", "192.0.2.7", "2001:db8::7", "192.0.2.7", "fd00::7"} {
		own = append(own, netip.MustParseAddr(a))
	}
	seen := make(map[netip.Addr]int)
	for _, a := range candidates(t.Context(), own) {
		if !a.IsGlobalUnicast() {
			t.Errorf("candidate %v", a)
		}
		seen[a]++
	}
	for _, a := range []string{"192.0.2.7", "2001:db8::7", "fd00::7"} {
		if seen[netip.MustParseAddr(a)] != 1 {
			t.Errorf("%s is %d times a candidate", a, seen[netip.MustParseAddr(a)])
		}
	}
}
