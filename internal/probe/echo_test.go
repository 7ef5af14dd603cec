package probe

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
)

// once serves one TCP connection on loopback.
func once(t *testing.T, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := ln.Accept()
		if err == nil {
			serve(c.(*net.TCPConn))
			c.Close()
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

func TestEchoTCPChecksBytes(t *testing.T) {
	for _, c := range []struct {
		name  string
		serve func(*net.TCPConn)
		want  string // part of the error
	}{
		{"changed", func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			b[len(b)-1] ^= 1
			c.Write(b)
		}, "not the"},
		{"cut", func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			c.Write(b[1:])
		}, "not the"},
		{"too much", func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			c.Write(append(b, 'x'))
		}, "not the"},
		{"reset", func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 1))
			c.SetLinger(0)
		}, "connection reset"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := echoTCP(t.Context(), once(t, c.serve))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("echoTCP: %v, want %q", err, c.want)
			}
		})
	}
}

// The first datagram is lost, and what comes first is a stranger's.
func TestEchoUDPRepeats(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, datagramSize)
		for seen := 1; ; seen++ {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			if seen > 1 {
				pc.WriteTo([]byte("something else"), from)
				pc.WriteTo(buf[:n], from)
			}
		}
	})
	defer wg.Wait()
	defer pc.Close()
	detail, err := echoUDP(t.Context(), pc.LocalAddr().(*net.UDPAddr).AddrPort())
	if err != nil || detail != "at try 2" {
		t.Errorf("echoUDP: %q, %v", detail, err)
	}
}

func TestPing(t *testing.T) {
	for _, a := range []netip.Addr{loopback4, loopback6} {
		if !haveLoopback(a) {
			continue
		}
		kind, err := ping(t.Context(), a)
		if errors.Is(err, errNoPing) {
			missing(t, err)
		}
		if err != nil || kind == "" {
			t.Errorf("ping %v: %q, %v", a, kind, err)
		}
	}
}

// A raw socket gets every ICMP message and the request itself on loopback.
func TestPingRaw(t *testing.T) {
	for _, c := range []struct {
		network string
		target  netip.Addr
		reply   byte
	}{{"ip4:icmp", loopback4, reply4}, {"ip6:ipv6-icmp", loopback6, reply6}} {
		if !haveLoopback(c.target) {
			continue
		}
		conn, err := net.Dial(c.network, c.target.String())
		if errors.Is(err, os.ErrPermission) {
			missing(t, err)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		payload, buf, seen := randomBytes(pingSize), make([]byte, 1500), 0
		_, err = repeat(t.Context(), conn, echoRequest(c.target, payload), func() (bool, error) {
			n, err := readMessage(conn, buf)
			seen++
			return err == nil && isReply(buf[:n], c.reply, payload), err
		})
		if err != nil || seen < 1 {
			t.Errorf("%s: %v after %d messages", c.network, err, seen)
		}
	}
}

func TestPingEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ping(ctx, loopback4); err == nil {
		t.Error("ping with an ended context: no error")
	}
}

func TestIsReply(t *testing.T) {
	payload := []byte("payload!")
	good := append([]byte{reply4, 0, 0, 0, 0, 0, 0, 0}, payload...)
	for name, c := range map[string]struct {
		b    []byte
		want bool
	}{
		"good":          {good, true},
		"empty":         {nil, false},
		"short":         {good[:7], false},
		"header only":   {good[:8], false},
		"cut":           {good[:len(good)-1], false},
		"request":       {append([]byte{request4}, good[1:]...), false},
		"other payload": {append(good[:8:8], "payload?"...), false},
	} {
		if got := isReply(c.b, reply4, payload); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// The checksum of a message with its checksum in place is zero (RFC 1071).
func TestChecksum(t *testing.T) {
	for range 100 {
		if got := checksum(echoRequest(loopback4, randomBytes(pingSize))); got != 0 {
			t.Fatalf("checksum over a whole message = %#x", got)
		}
	}
}
