package test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// Helpers of the TCP tests: streams whose bytes prove themselves.

// pattern returns n bytes that repeat nowhere near.
func pattern(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16), 1}).Read(b)
	return b
}

// patterns holds the data of the transfer tests; making 64 MiB takes longer than
// sending them.
var patterns sync.Map // int -> []byte

func cachedPattern(n int) []byte {
	if b, ok := patterns.Load(n); ok {
		return b.([]byte)
	}
	b := pattern(n)
	patterns.Store(n, b)
	return b
}

// transferServer serves the protocol of transfer: two 8-byte lengths, then that
// much data each way at once, then the checksum of what it got.
func transferServer(t testing.TB, ns *topo.NS, f family) string {
	return transferServerAt(t, ns, at(f.world, 0))
}

func transferServerAt(t testing.TB, ns *topo.NS, address string) string {
	return serve(t, ns, address, func(c *net.TCPConn) {
		defer c.Close()
		c.SetDeadline(time.Now().Add(60 * time.Second))
		var head [16]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		up, down := int64(binary.BigEndian.Uint64(head[:])), int(binary.BigEndian.Uint64(head[8:]))
		sum := make(chan []byte, 1)
		go func() {
			h := sha256.New()
			io.CopyN(h, c, up)
			sum <- h.Sum(nil)
		}()
		c.Write(cachedPattern(down))
		c.Write(<-sum)
	}).String()
}

// transfer sends and receives and compares both directions' bytes.
func transfer(ns *topo.NS, address string, send, recv int) error {
	conn, err := ns.Dial("tcp", address, 10*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(60 * time.Second))
	head := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(send)), uint64(recv))
	data := cachedPattern(send)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(append(head, data[:min(send, 1)]...))
		if err == nil && send > 1 {
			_, err = conn.Write(data[1:])
		}
		sent <- err
	}()
	h := sha256.New()
	n, err := io.CopyN(h, conn, int64(recv))
	if err != nil {
		return fmt.Errorf("received %d of %d bytes: %w", n, recv, errors.Join(err, <-sent))
	}
	if want := sha256.Sum256(cachedPattern(recv)); string(h.Sum(nil)) != string(want[:]) {
		return errors.New("the bytes that came down are not those that were sent")
	}
	sum := make([]byte, sha256.Size)
	if _, err := io.ReadFull(conn, sum); err != nil {
		return fmt.Errorf("no checksum from the target: %w", errors.Join(err, <-sent))
	}
	if want := sha256.Sum256(data); string(sum) != string(want[:]) {
		return errors.New("the bytes that went up are not those that were sent")
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("after the last byte came %d bytes and %v, not the end", n, err)
	}
	return <-sent
}

// dial connects with a deadline on everything that follows.
func dial(t testing.TB, ns *topo.NS, a *net.TCPAddr) *net.TCPConn {
	t.Helper()
	c, err := ns.Dial("tcp", a.String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.TCPConn)
}

func expectAll(t testing.TB, c net.Conn, want string) {
	t.Helper()
	all, err := io.ReadAll(c)
	if err != nil || string(all) != want {
		t.Errorf("read %q, %v, expected %q and the end", all, err, want)
	}
}

func expectReset(t testing.TB, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("saw %v, not a reset", err)
	}
}

// receive waits for a goroutine's message.
func receive[T any](t testing.TB, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(30 * time.Second):
		t.Fatal("no message from the other side within 30 s")
	}
	panic("unreachable")
}

// States of /proc/net/tcp, include/net/tcp_states.h.
const (
	tcpEstablished = "01"
	tcpSynSent     = "02"
)

// countSockets counts the TCP sockets of a namespace in one state.
func countSockets(t testing.TB, ns *topo.NS, state string) int {
	t.Helper()
	n := 0
	err := ns.Do(func() error {
		for _, file := range []string{"tcp", "tcp6"} {
			text, err := os.ReadFile("/proc/thread-self/net/" + file)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				if f := strings.Fields(line); len(f) > 3 && f[3] == state {
					n++
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}
