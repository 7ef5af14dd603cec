package forward

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
	"github.com/slipway-net/slipway/internal/loop"
)

// pairing is a pair between two ends that a test holds.
type pairing struct {
	t           *testing.T
	sockets     *Sockets
	loop        *loop.Loop
	flow        *flow.Flow
	guest, host *net.TCPConn // the far ends of both legs
}

// segments is the maximum segment size of a pairing's connections, which decides how bulk
// transfers travel: copied, as over loopback, or spliced.
type segments int

const (
	largeSegments segments = 0 // loopback's own
	smallSegments segments = 1460
)

// eachSegments runs test with large segments and with small ones.
func eachSegments(t *testing.T, test func(t *testing.T, size segments)) {
	t.Run("large_segments", func(t *testing.T) { test(t, largeSegments) })
	t.Run("small_segments", func(t *testing.T) { test(t, smallSegments) })
}

// loopbackPair returns two ends of a TCP connection, one of them as a descriptor.
func loopbackPair(t *testing.T, size segments) (*net.TCPConn, int) {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	if size != largeSegments {
		raw, err := ln.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_MAXSEG, int(size)) })
		if err != nil {
			t.Fatal(err)
		}
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	raw, err := s.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn), fd
}

// newPairing joins two loopback connections.
func newPairing(t *testing.T, size segments) *pairing {
	t.Helper()
	l, err := loop.New()
	if err != nil {
		t.Fatal(err)
	}
	l.Start()
	tab := table.New()
	f := New(Config{Guest: nil, Table: tab, Policy: NewPolicy(PolicyConfig{})})
	s := f.NewSockets(l)
	t.Cleanup(func() {
		s.Close()
		l.Close()
		f.Close()
		if n := tab.Len(); n != 0 {
			t.Errorf("%d flows are left in the table", n)
		}
		if n := s.pipes.made; n != 0 {
			t.Errorf("%d pipes are left", n)
		}
		if n := s.blocks.kept; n != 0 {
			t.Errorf("%d blocks are left", n)
		}
	})
	j := &pairing{t: t, sockets: s, loop: l}
	j.flow = &flow.Flow{Tuple: flow.Tuple{Proto: flow.TCP, Guest: netip.MustParseAddrPort("192.0.2.1:1")}, Path: flow.Kernel}
	if !f.open(j.flow) {
		t.Fatal("no room for a flow")
	}
	var guest, host int
	j.guest, guest = loopbackPair(t, size)
	j.host, host = loopbackPair(t, size)
	l.Do(func() { s.Join(guest, flow.Verdict{Host: &heldHost{fd: host}, Flow: j.flow}) })
	deadline := time.Now().Add(time.Minute)
	j.guest.SetDeadline(deadline)
	j.host.SetDeadline(deadline)
	return j
}

// waitClosed waits until the pair is over.
func (j *pairing) waitClosed() {
	j.t.Helper()
	waitFor(j.t, "the pair is over", func() bool {
		n := -1
		j.loop.Do(func() { n = len(j.sockets.pairs) })
		return n == 0
	})
}

func TestPairCarriesBothWays(t *testing.T) { eachSegments(t, pairCarriesBothWays) }

func pairCarriesBothWays(t *testing.T, segment segments) {
	for _, size := range []int{1, 1000, smallRead - 1, smallRead, smallRead + 1, 2 * smallRead, readMost, readMost + smallRead + 1, 5<<20 + 3} {
		j := newPairing(t, segment)
		up, down := make([]byte, size), make([]byte, size)
		rand.Read(up)
		rand.Read(down)
		var wg sync.WaitGroup
		send := func(c *net.TCPConn, b []byte) {
			if _, err := c.Write(b); err != nil {
				t.Errorf("%d bytes: write: %v", size, err)
			}
			c.CloseWrite()
		}
		check := func(c *net.TCPConn, want []byte) {
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes: read %d, equal %v, error %v", size, len(got), bytes.Equal(got, want), err)
			}
		}
		wg.Go(func() { send(j.guest, up) })
		wg.Go(func() { send(j.host, down) })
		wg.Go(func() { check(j.host, up) })
		wg.Go(func() { check(j.guest, down) })
		wg.Wait()
		j.waitClosed()
		if a, b := j.flow.ToHost.Bytes.Load(), j.flow.ToGuest.Bytes.Load(); a != uint64(size) || b != uint64(size) {
			t.Errorf("counted %d and %d bytes instead of %d", a, b, size)
		}
	}
}

func TestPairHalfClose(t *testing.T) {
	j := newPairing(t, largeSegments)
	j.guest.CloseWrite()
	if n, err := j.host.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("host side read %d, %v instead of end of file", n, err)
	}
	if _, err := j.host.Write([]byte("late")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if n, err := j.guest.Read(b); string(b[:n]) != "late" || err != nil {
		t.Fatalf("guest side read %q, %v", b[:n], err)
	}
	if s := j.flow.State(); s != flow.HalfOpen {
		t.Errorf("state is %v instead of half-open", s)
	}
	j.host.Close()
	if _, err := j.guest.Read(b); err != io.EOF {
		t.Fatalf("guest side read %v instead of end of file", err)
	}
	j.waitClosed()
}

func TestPairPassesReset(t *testing.T) {
	for _, side := range []string{"guest", "host"} {
		j := newPairing(t, largeSegments)
		from, to := j.guest, j.host
		if side == "host" {
			from, to = j.host, j.guest
		}
		from.SetLinger(0)
		from.Close()
		if _, err := to.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reset by %s: the other side read %v", side, err)
		}
		j.waitClosed()
	}
}

// pattern is what fill writes again and again.
var pattern = func() []byte {
	b := make([]byte, 1<<20)
	rand.Read(b)
	return b
}()

// fill writes pattern to c until it blocks: nothing is taken for a while in which the loop
// has had its turn.
func (j *pairing) fill(c *net.TCPConn) (n int) {
	j.t.Helper()
	for {
		j.loop.Do(func() {})
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		m, err := c.Write(pattern[n%len(pattern):])
		n += m
		if errors.Is(err, os.ErrDeadlineExceeded) && m == 0 {
			return n
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			j.t.Fatal(err)
		}
	}
}

func TestPairNoticesResetWhileBlocked(t *testing.T) {
	eachSegments(t, func(t *testing.T, size segments) {
		j := newPairing(t, size)
		j.fill(j.guest)
		j.fill(j.host)
		j.host.SetLinger(0)
		j.host.Close()
		j.waitClosed()
		for {
			if _, err := j.guest.Read(make([]byte, 1<<20)); err != nil {
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("guest side read %v instead of a reset", err)
				}
				return
			}
		}
	})
}

func TestPairHoldsBack(t *testing.T) {
	eachSegments(t, func(t *testing.T, size segments) {
		j := newPairing(t, size)
		sent := j.fill(j.guest)
		if n, pipes := j.kept(); n > readMost || pipes > 1 {
			t.Errorf("a blocked flow holds %d bytes and %d pipes", n, pipes)
		}
		j.guest.CloseWrite()
		j.expectPattern(sent)
	})
}

// TestPairBlocksAreBounded has others keep as many blocks as there may be.
func TestPairBlocksAreBounded(t *testing.T) {
	j := newPairing(t, largeSegments)
	j.loop.Do(func() { j.sockets.blocks.kept += maxBlocks })
	defer j.loop.Do(func() { j.sockets.blocks.kept -= maxBlocks })
	sent := j.fill(j.guest)
	if n, pipes := j.kept(); n > 0 || pipes != 1 {
		t.Errorf("a blocked flow holds %d bytes and %d pipes", n, pipes)
	}
	j.loop.Do(func() {
		if n := j.sockets.blocks.kept; n != maxBlocks {
			t.Errorf("%d blocks are kept", n)
		}
	})
	j.guest.CloseWrite()
	j.expectPattern(sent)
}

// kept returns how many bytes sockets did not take yet, and how many pipes there are.
func (j *pairing) kept() (bytes, pipes int) {
	j.loop.Do(func() {
		for p := range j.sockets.pairs {
			bytes += len(p.legs[0].left) + len(p.legs[1].left)
		}
		pipes = j.sockets.pipes.made
	})
	return bytes, pipes
}

// expectPattern reads what fill wrote, sent bytes, from the host's side.
func (j *pairing) expectPattern(sent int) {
	j.t.Helper()
	got, err := io.ReadAll(j.host)
	if err != nil || len(got) != sent {
		j.t.Errorf("%d of %d bytes arrived: %v", len(got), sent, err)
	}
	for i := 0; i < len(got); i += len(pattern) {
		if n := min(len(pattern), len(got)-i); !bytes.Equal(got[i:i+n], pattern[:n]) {
			j.t.Errorf("bytes from %d on are not those that were sent", i)
			return
		}
	}
}

func TestSocketsCloseResets(t *testing.T) {
	j := newPairing(t, largeSegments)
	j.sockets.Close()
	for _, c := range []*net.TCPConn{j.guest, j.host} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %v instead of a reset", err)
		}
	}
}

// TestPairResetBehindData has one side send, wait for the acknowledgement, and reset.
func TestPairResetBehindData(t *testing.T) {
	for range 20 {
		j := newPairing(t, largeSegments)
		b := make([]byte, 1<<20)
		rand.Read(b)
		go func() {
			j.host.Write(b)
			raw, _ := j.host.SyscallConn()
			raw.Control(func(fd uintptr) {
				for {
					if n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); n == 0 || err != nil {
						return
					}
				}
			})
			j.host.SetLinger(0)
			j.host.Close()
		}()
		got, err := io.ReadAll(j.guest)
		if !bytes.Equal(got, b) || !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("read %d of %d bytes, then %v", len(got), len(b), err)
		}
		j.waitClosed()
	}
}

// TestPairUploadRefused: the answer arrives also where a write meets the reset before a read.
func TestPairUploadRefused(t *testing.T) {
	eachSegments(t, func(t *testing.T, size segments) {
		for i := range 20 {
			j := newPairing(t, size)
			answer := bytes.Repeat([]byte("too large"), 1000)
			go refuseUpload(j.host, answer, i%2 == 1)
			if got := upload(j.guest); !bytes.Equal(got, answer) {
				t.Fatalf("%d of %d bytes of the answer arrived", len(got), len(answer))
			}
			j.waitClosed()
		}
	})
}

// TestPairResetWaitsForAcknowledgements: a peer that acknowledges nothing for longer than 50 ms,
// as one that is far away, gets what was sent before the reset.
func TestPairResetWaitsForAcknowledgements(t *testing.T) {
	j := newPairing(t, largeSegments)
	j.guest.SetReadBuffer(64 << 10) // which does not hold all of it
	b := make([]byte, 1<<20)
	rand.Read(b)
	if _, err := j.host.Write(b); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "all is acknowledged", func() bool { return j.flow.ToGuest.Bytes.Load() == uint64(len(b)) })
	j.host.SetLinger(0)
	j.host.Close()
	waitFor(t, "the wait is long enough", func() (long bool) {
		j.loop.Do(func() {
			for p := range j.sockets.pairs {
				long = p.last != nil && p.last.still > 50*time.Millisecond
			}
		})
		return long
	})
	if got, err := io.ReadAll(j.guest); !bytes.Equal(got, b) || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d of %d bytes, then %v", len(got), len(b), err)
	}
	j.waitClosed()
}
