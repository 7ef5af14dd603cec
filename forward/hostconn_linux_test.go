package forward

import (
	"errors"
	"io"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// A write has taken the error of a reset before the read, which must not see an orderly end.
func TestHostConnResetSeenByWrite(t *testing.T) {
	peer, fd := loopbackPair(t, largeSegments)
	c, err := newHostConn(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	peer.SetLinger(0)
	peer.Close()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if _, err := c.Write([]byte("x")); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the reset does not arrive")
		}
	}
	if _, err := c.ReadBuf(new(flow.BufPool)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %v instead of a reset", err)
	}
}

// An orderly end is none, whoever was first.
func TestHostConnEnd(t *testing.T) {
	for _, first := range []bool{false, true} {
		peer, fd := loopbackPair(t, largeSegments)
		c, err := newHostConn(fd)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if first {
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, peer) // has the FIN
		}
		peer.CloseWrite()
		if first { // both have ended: the socket is over
			for end := time.Now().Add(patience); !isClosed(uintptr(fd)); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the socket is not over")
				}
			}
		}
		if _, err := c.ReadBuf(new(flow.BufPool)); err != io.EOF {
			t.Errorf("closed first: %v: read %v instead of the end", first, err)
		}
	}
}

// An orderly end is none either while the other direction ends: the peer's FIN is read as ours
// leaves.
func TestHostConnEndBothAtOnce(t *testing.T) {
	for range 2000 {
		peer, fd := loopbackPair(t, largeSegments)
		c, err := newHostConn(fd)
		if err != nil {
			t.Fatal(err)
		}
		peer.CloseWrite()
		go c.CloseWrite()
		_, err = c.ReadBuf(new(flow.BufPool))
		io.Copy(io.Discard, peer) // until ours was sent
		c.Close()
		peer.Close()
		if err != io.EOF {
			t.Fatalf("read %v instead of the end", err)
		}
	}
}
