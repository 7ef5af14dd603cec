package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// The stall matrix: sizes, ways to end and ways to be slow, both families, both
// directions at once. Every byte is compared, everything has a deadline: a flow that
// hangs is a failure that says where.

const (
	// stallCaseTime bounds one case, together with stallRate. A retransmission time-out
	// is 200 ms, and a lossy transfer has a few in a row.
	stallCaseTime = 30 * time.Second
	stallRate     = 8 << 20 // bytes per second
	// stallTogether is how many cases of one engine run at once: enough to disturb
	// each other, few enough for two CPUs.
	stallTogether = 24
	// stallSteps and stallPause make a slow side take about 0.6 s whatever the size.
	stallSteps = 32
	stallPause = 20 * time.Millisecond
	// lossyPort is the port whose packets the router drops one in a hundred of.
	lossyPort = 7001
)

// lossAtRouter drops packets of lossyPort's connections, either way.
var lossAtRouter = fmt.Sprintf(`table inet loss {
	chain forward {
		type filter hook forward priority filter;
		tcp dport %[1]d numgen random mod 100 < 1 counter drop
		tcp sport %[1]d numgen random mod 100 < 1 counter drop
	}
}`, lossyPort)

// stallSide is one end of a case's connection.
type stallSide struct {
	c          *net.TCPConn
	size       int64
	start      int // where in the pattern what it sends begins
	expect     int // the same of what it receives
	slowRead   bool
	slowWrite  bool
	met        *meeting
	sent, seen int64
}

// caseTime is how long a case of that size may take.
func caseTime(size int64) time.Duration {
	return stallCaseTime + time.Duration(size/stallRate)*time.Second
}

// meeting is where both sides of a case wait for each other, out of band.
type meeting struct{ guest, target chan struct{} }

func (m *meeting) wait(guest bool, within time.Duration) error {
	mine, other := m.guest, m.target
	if !guest {
		mine, other = other, mine
	}
	close(mine)
	select {
	case <-other:
		return nil
	case <-time.After(within):
		return errors.New("the other side did not come so far")
	}
}

// stream is the data of all cases: its length is no power of two, so that whatever is
// repeated, swapped or left out shows.
var stream = sync.OnceValue(func() []byte { return pattern(1<<20 + 7) })

// send sends the next n bytes.
func (s *stallSide) send(n int64) error {
	data, step := stream(), n
	if s.slowWrite {
		step = max(1, n/stallSteps)
	}
	for end := s.sent + n; s.sent < end; {
		at := (int64(s.start) + s.sent) % int64(len(data))
		m, err := s.c.Write(data[at:min(at+step, at+end-s.sent, int64(len(data)))])
		s.sent += int64(m)
		if err != nil {
			return fmt.Errorf("sent %d bytes of %d: %w", s.sent, end, err)
		}
		if s.slowWrite {
			time.Sleep(stallPause)
		}
	}
	return nil
}

// receive receives the next n bytes and compares them.
func (s *stallSide) receive(n int64) error {
	data, step := stream(), int64(64<<10)
	if s.slowRead {
		step = min(step, max(1, n/stallSteps))
		time.Sleep(5 * stallPause) // the other side's window closes
	}
	buf := make([]byte, step)
	due := time.Now()
	for end := s.seen + n; s.seen < end; {
		m, err := s.c.Read(buf[:min(step, end-s.seen)])
		for got := buf[:m]; len(got) > 0; {
			at := (int64(s.expect) + s.seen) % int64(len(data))
			k := min(len(got), len(data)-int(at))
			if !bytes.Equal(got[:k], data[at:int(at)+k]) {
				return fmt.Errorf("what came after byte %d is not what was sent", s.seen)
			}
			s.seen += int64(k)
			got = got[k:]
		}
		if err != nil {
			return fmt.Errorf("received %d bytes of %d: %w", s.seen, end, err)
		}
		if s.slowRead { // n bytes in stallSteps steps of time, however they come
			due = due.Add(time.Duration(int64(m) * int64(stallSteps) * int64(stallPause) / max(n, 1)))
			time.Sleep(time.Until(due))
		}
	}
	return nil
}

// expectEnd wants the other side's FIN, and nothing before it.
func (s *stallSide) expectEnd() error {
	if n, err := s.c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("after byte %d came %d bytes and %v, not the end", s.seen, n, err)
	}
	return nil
}

// both runs two things at once, a direction each.
func both(a, b func() error) error {
	ch := make(chan error, 1)
	go func() { ch <- a() }()
	return errors.Join(b(), <-ch)
}

// exchange sends and receives the size, both at once, and both FINs.
func (s *stallSide) exchange() error {
	return both(func() error {
		return errors.Join(s.send(s.size), s.c.CloseWrite())
	}, func() error {
		return errors.Join(s.receive(s.size), s.expectEnd())
	})
}

// closeFirst sends FIN behind its bytes, while the other side goes on.
func (s *stallSide) closeFirst() error {
	return both(func() error {
		return errors.Join(s.send(s.size), s.c.CloseWrite())
	}, func() error {
		return errors.Join(s.receive(2*s.size), s.expectEnd())
	})
}

// closeLast sends as much again after the other side's FIN.
func (s *stallSide) closeLast() error {
	return errors.Join(both(
		func() error { return s.send(s.size) },
		func() error { return errors.Join(s.receive(s.size), s.expectEnd()) },
	), s.send(s.size), s.c.CloseWrite())
}

// reset resets after both have all of it, while both send on.
func (s *stallSide) reset(guest bool) error {
	err := both(func() error { return s.send(s.size) }, func() error { return s.receive(s.size) })
	if err = errors.Join(err, s.met.wait(guest, caseTime(s.size))); err != nil {
		return err
	}
	s.c.SetWriteDeadline(time.Now().Add(3 * stallPause))
	if err := s.send(s.size); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	s.c.SetLinger(0)
	return s.c.Close()
}

// beReset sends and receives until a reset shows, which must come as one.
func (s *stallSide) beReset(guest bool) error {
	err := both(func() error { return s.send(s.size) }, func() error { return s.receive(s.size) })
	if err = errors.Join(err, s.met.wait(guest, caseTime(s.size))); err != nil {
		return err
	}
	const endless = 1 << 50
	var sendErr, recvErr error
	both(func() error { sendErr = s.send(endless); return nil }, func() error { recvErr = s.receive(endless); return nil })
	// The kernel tells one of the two calls, once; to the other the connection is
	// just not there any more.
	if !errors.Is(sendErr, syscall.ECONNRESET) && !errors.Is(recvErr, syscall.ECONNRESET) {
		return fmt.Errorf("write saw %v, read saw %v: not a reset", sendErr, recvErr)
	}
	return nil
}

// stallShape is a way to use a connection.
type stallShape struct {
	name          string
	port          int // of the target; 0 for any
	guest, target func(s *stallSide) error
}

func plainSide(s *stallSide) error { return s.exchange() }

func slowReadingSide(s *stallSide) error {
	s.slowRead = true
	return s.exchange()
}

func slowWritingSide(s *stallSide) error {
	s.slowWrite = true
	return s.exchange()
}

var stallShapes = []stallShape{
	{"plain", 0, plainSide, plainSide},
	{"slow readers", 0, slowReadingSide, slowReadingSide},
	{"slow writers", 0, slowWritingSide, slowWritingSide},
	{"slow guest, fast target", 0, slowReadingSide, plainSide},
	{"fast guest, slow target", 0, plainSide, slowReadingSide},
	{"half close by guest", 0, (*stallSide).closeFirst, (*stallSide).closeLast},
	{"half close by target", 0, (*stallSide).closeLast, (*stallSide).closeFirst},
	{"reset by guest", 0,
		func(s *stallSide) error { return s.reset(true) },
		func(s *stallSide) error { return s.beReset(false) }},
	{"reset by target", 0,
		func(s *stallSide) error { return s.beReset(true) },
		func(s *stallSide) error { return s.reset(false) }},
	{"loss", lossyPort, plainSide, plainSide},
}

// stallTarget is the target's side of all cases of one port.
type stallTarget struct {
	address string
	mu      sync.Mutex
	waiting map[uint64]func(*net.TCPConn) // by the number the guest sends first
}

func newStallTarget(t testing.TB, ns *topo.NS, f family, port int) *stallTarget {
	s := &stallTarget{waiting: make(map[uint64]func(*net.TCPConn))}
	s.address = serve(t, ns, at(f.world, port), func(c *net.TCPConn) {
		defer c.Close()
		var number [8]byte
		c.SetDeadline(time.Now().Add(stallCaseTime))
		if _, err := io.ReadFull(c, number[:]); err != nil {
			return
		}
		n := binary.BigEndian.Uint64(number[:])
		s.mu.Lock()
		fn := s.waiting[n]
		delete(s.waiting, n)
		s.mu.Unlock()
		if fn != nil {
			fn(c)
		}
	}).String()
	return s
}

// run is one case: what each side made of it.
func (s *stallTarget) run(ns *topo.NS, shape stallShape, number uint64, size int64) error {
	const up, down = 0, 333_667 // the two directions differ
	met := &meeting{make(chan struct{}), make(chan struct{})}
	target := make(chan error, 1)
	s.mu.Lock()
	s.waiting[number] = func(c *net.TCPConn) {
		c.SetDeadline(time.Now().Add(caseTime(size)))
		target <- shape.target(&stallSide{c: c, size: size, start: down, expect: up, met: met})
	}
	s.mu.Unlock()
	conn, err := ns.Dial("tcp", s.address, 10*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	c := conn.(*net.TCPConn)
	c.SetDeadline(time.Now().Add(caseTime(size)))
	if _, err := c.Write(binary.BigEndian.AppendUint64(nil, number)); err != nil {
		return err
	}
	if err := shape.guest(&stallSide{c: c, size: size, start: up, expect: down, met: met}); err != nil {
		err = fmt.Errorf("guest: %w", err)
		select {
		case terr := <-target:
			return errors.Join(err, terr)
		case <-time.After(time.Second):
			return err
		}
	}
	select {
	case err := <-target:
		if err != nil {
			return fmt.Errorf("target: %w", err)
		}
		return nil
	case <-time.After(caseTime(size) + 5*time.Second):
		return errors.New("the target never finished")
	}
}

// TestStalls is the matrix up to 16 MiB.
func TestStalls(t *testing.T) { stallMatrix(t, 1, 1<<10, 64<<10, 1<<20, 16<<20) }

// TestLongStalls is its upper end. Cases with a gigabyte each way share two CPUs.
func TestLongStalls(t *testing.T) {
	long(t)
	stallMatrix(t, 256<<20, 1<<30)
}

func stallMatrix(t *testing.T, sizes ...int64) {
	eachGuest(t, func(t *testing.T, g *guest) {
		together, patience := stallTogether, 6*stallCaseTime
		if slices.Max(sizes) > 64<<20 {
			together, patience = 2, 20*time.Minute
		}
		if err := g.net.Router.NFT(lossAtRouter); err != nil {
			missing(t, "nft numgen: %v", err)
		}
		free := make(chan struct{}, together)
		var wg sync.WaitGroup
		var number uint64
		start := time.Now()
		for _, f := range families {
			targets := make(map[int]*stallTarget)
			for _, shape := range stallShapes {
				s := targets[shape.port]
				if s == nil {
					s = newStallTarget(t, g.net.World, f, shape.port)
					targets[shape.port] = s
				}
				for _, size := range sizes {
					n := number
					number++
					wg.Go(func() {
						free <- struct{}{}
						defer func() { <-free }()
						if err := s.run(g.ns, shape, n, size); err != nil {
							t.Errorf("%s, %d bytes, %s: %v", f.name, size, shape.name, err)
						}
					})
				}
			}
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		select {
		case <-done:
			t.Logf("%d cases in %v", number, time.Since(start).Round(time.Millisecond))
		case <-time.After(patience):
			t.Fatalf("cases still run after %v", patience)
		}
		expectLoss(t, g.net.Router)
		expectPath(t, g, number)
	})
}

// expectLoss wants packets to have been dropped by lossAtRouter, each way.
func expectLoss(t testing.TB, router *topo.NS) {
	t.Helper()
	out, err := router.Run("", "nft", "list", "table", "inet", "loss")
	if err != nil || strings.Count(out, "counter packets") != 2 || strings.Contains(out, "counter packets 0 ") {
		t.Errorf("nothing was lost: %v\n%s", err, out)
	}
}

// expectPath wants the path under test to have carried the connections, all of them or
// none.
func expectPath(t testing.TB, g *guest, connections uint64) {
	t.Helper()
	if g.engine == nil {
		return
	}
	n := counters(t, g.engine)["kernel.answered"]
	if g.kind.kernel() && n < int64(connections) || !g.kind.kernel() && n != 0 {
		t.Errorf("%d of %d connections took the kernel path", n, connections)
	}
}

// TestResetWhileBlocked: neither side reads, both directions are full. A reset passes
// all the same, at once.
func TestResetWhileBlocked(t *testing.T) {
	eachGuestAtOnce(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			for _, by := range []string{"guest", "target"} {
				t.Run("by "+by, func(t *testing.T) {
					for try := 1; ; try++ { // the machine may stall once
						took, err := resetWhileBlocked(t, g, f, by)
						if err != nil {
							t.Errorf("after %v the blocked side saw %v, not a reset", took, err)
						}
						if err != nil || took <= time.Second {
							break
						}
						if try == 3 {
							t.Errorf("the blocked side saw the reset after %v, not at once", took)
							break
						}
					}
				})
			}
		})
	})
}

// resetWhileBlocked has one side reset, and returns how long it took the other to see that,
// and what it saw else.
func resetWhileBlocked(t testing.TB, g *guest, f family, by string) (time.Duration, error) {
	c, peer := connected(t, g, f)
	both(func() error { fill(c); return nil }, func() error { fill(peer); return nil })
	resetter, other := c, peer
	if by == "target" {
		resetter, other = peer, c
	}
	seen := make(chan error, 1)
	go func() {
		other.SetWriteDeadline(time.Now().Add(12 * time.Second))
		_, err := other.Write(make([]byte, 64<<20))
		seen <- err
	}()
	time.Sleep(100 * time.Millisecond) // it blocks
	start := time.Now()
	resetter.SetLinger(0)
	resetter.Close()
	err := receive(t, seen)
	if errors.Is(err, syscall.ECONNRESET) {
		err = nil
	} else if err == nil {
		err = errors.New("that all was written")
	}
	return time.Since(start), err
}

// connected returns both ends of a new connection.
func connected(t testing.TB, g *guest, f family) (guest, target *net.TCPConn) {
	t.Helper()
	ch := make(chan *net.TCPConn, 1)
	a := serve(t, g.net.World, at(f.world, 0), func(c *net.TCPConn) { ch <- c })
	guest = dial(t, g.ns, a)
	target = receive(t, ch)
	target.SetDeadline(time.Now().Add(30 * time.Second))
	return guest, target
}

// fill writes until nothing has been taken for a quarter of a second.
func fill(c *net.TCPConn) {
	for b := make([]byte, 1<<20); ; {
		c.SetWriteDeadline(time.Now().Add(250 * time.Millisecond))
		if n, err := c.Write(b); err != nil && n == 0 {
			return
		}
	}
}

// TestResetBehindData: what the other side's kernel has acknowledged is read before the
// reset is seen, as long as somebody reads. Through slipway it is slipway that has
// acknowledged, and it delivers that before it passes the reset on.
func TestResetBehindData(t *testing.T) {
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			for _, by := range []string{"guest", "target"} {
				for _, size := range []int{1, 1 << 10, 64 << 10, 1 << 20} {
					t.Run(fmt.Sprintf("%d bytes by %s", size, by), func(t *testing.T) {
						c, peer := connected(t, g, f)
						from, to := c, peer
						if by == "target" {
							from, to = peer, c
						}
						data := cachedPattern(size)
						got := make(chan []byte, 1)
						var end error
						go func() {
							var b []byte
							b, end = io.ReadAll(to)
							got <- b
						}()
						if _, err := from.Write(data); err != nil {
							t.Fatal(err)
						}
						if !eventually(10*time.Second, func() bool { return unacknowledged(t, from) == 0 }) {
							t.Fatal("the data are not acknowledged within 10 s")
						}
						from.SetLinger(0)
						from.Close()
						b := receive(t, got)
						if len(b) != size || !bytes.HasPrefix(data, b) || !errors.Is(end, syscall.ECONNRESET) {
							t.Errorf("read %d of %d acknowledged bytes, then %v", len(b), size, end)
						}
					})
				}
			}
		})
	})
}

// TestUploadRefused: a target that closes in the middle of an upload, with data unread, resets
// right behind its answer. The guest's next write may meet that first; the answer is there to
// be read all the same.
func TestUploadRefused(t *testing.T) {
	answer := cachedPattern(9000)
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			for i := range 10 {
				c, peer := connected(t, g, f)
				go func() {
					io.ReadFull(peer, make([]byte, 100<<10))
					peer.Write(answer)
					if i%2 == 1 { // it ends in order, as far as it can
						peer.CloseWrite()
					}
					peer.Close()
				}()
				for b := make([]byte, 32<<10); ; {
					if _, err := c.Write(b); err != nil {
						break
					}
				}
				if got, err := io.ReadAll(c); !bytes.Equal(got, answer) {
					t.Fatalf("%d of %d bytes of the answer arrived, then %v", len(got), len(answer), err)
				}
			}
		})
	})
}

// unacknowledged is how many bytes the other side's kernel has not confirmed, tcp(7)
// SIOCOUTQ.
func unacknowledged(t testing.TB, c *net.TCPConn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		err = errors.Join(err, cerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestTargetGoesFirst: the target ends while the guest is in the middle of 16 MiB. Its
// FIN alone stops nothing; a close, which TCP tells by a reset at the next data, does.
func TestTargetGoesFirst(t *testing.T) {
	const size = 16 << 20
	data := cachedPattern(size)
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			t.Run("half", func(t *testing.T) {
				c, peer := connected(t, g, f)
				err := both(func() error {
					_, err := c.Write(data)
					return errors.Join(err, c.CloseWrite())
				}, func() error {
					if _, err := io.ReadFull(peer, make([]byte, 1<<20)); err != nil {
						return err
					}
					if err := peer.CloseWrite(); err != nil {
						return err
					}
					time.Sleep(200 * time.Millisecond)
					rest, err := io.ReadAll(peer)
					if !bytes.Equal(rest, data[1<<20:]) {
						err = errors.Join(err, fmt.Errorf("%d bytes came after the FIN, or other ones", len(rest)))
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
				expectAll(t, c, "")
			})
			t.Run("whole", func(t *testing.T) {
				c, peer := connected(t, g, f)
				ended := make(chan error, 1)
				go func() {
					_, err := c.Write(data)
					for err == nil {
						_, err = c.Write(data)
					}
					ended <- err
				}()
				io.ReadFull(peer, make([]byte, 1<<20))
				peer.Close()
				if err := receive(t, ended); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
					t.Errorf("write ended with %v", err)
				}
			})
		})
	})
}

// TestCloseTogether closes 200 connections from both sides in the same moment.
func TestCloseTogether(t *testing.T) {
	const count = 200
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			ch := make(chan *net.TCPConn, count)
			a := serve(t, g.net.World, at(f.world, 0), func(c *net.TCPConn) { ch <- c })
			var ends []*net.TCPConn
			for range count {
				ends = append(ends, dial(t, g.ns, a), receive(t, ch))
			}
			now := make(chan struct{})
			result := make(chan error, len(ends))
			for _, c := range ends {
				c.SetDeadline(time.Now().Add(15 * time.Second))
				go func() {
					<-now
					_, err := c.Write([]byte("last words"))
					err = errors.Join(err, c.CloseWrite())
					got, rerr := io.ReadAll(c)
					if string(got) != "last words" {
						err = errors.Join(err, fmt.Errorf("read %q", got))
					}
					c.Close()
					result <- errors.Join(err, rerr)
				}()
			}
			close(now)
			for range ends {
				if err := receive(t, result); err != nil {
					t.Error(err)
				}
			}
			if g.engine != nil && !eventually(20*time.Second, func() bool { return len(readFlows(t, g.engine)) == 0 }) {
				t.Errorf("flows that ended are still listed: %v", readFlows(t, g.engine))
			}
		})
	})
}

// TestMessageSizes sends messages around the sizes of buffers and pipes and waits for
// each to come back: nothing may wait for more.
func TestMessageSizes(t *testing.T) {
	var sizes []int
	for _, n := range []int{1, 4 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20} {
		sizes = append(sizes, n-1, n, n+1)
	}
	// After a bulk transfer small ones, and back: the relay changes its ways.
	sizes = append(sizes[1:], 8<<20, 1, 2, 3, 4, 5, 65536, 65535, 65537, 4<<20, 131071, 131072, 131073, 1)
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			c, peer := connected(t, g, f)
			for _, n := range sizes {
				data := cachedPattern(n)
				for _, way := range []struct {
					name     string
					from, to *net.TCPConn
				}{{"up", c, peer}, {"down", peer, c}} {
					deadline := time.Now().Add(20 * time.Second)
					c.SetDeadline(deadline)
					peer.SetDeadline(deadline)
					got := make([]byte, n)
					err := both(func() error { _, err := way.from.Write(data); return err },
						func() error { _, err := io.ReadFull(way.to, got); return err })
					if err != nil || !bytes.Equal(got, data) {
						t.Fatalf("%d bytes %s: intact %v, %v", n, way.name, bytes.Equal(got, data), err)
					}
				}
			}
		})
	})
}

// TestUrgent: urgent data (RFC 6093 advises against it) must not disturb the bytes around
// it. A reader without SO_OOBINLINE never sees the urgent byte natively; through slipway
// it is lost or comes in line, and nothing else changes.
func TestUrgent(t *testing.T) {
	const urgent = '!'
	eachGuest(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			for _, by := range []string{"guest", "target"} {
				for _, size := range []int{3, 1000, 1 << 20} {
					for _, paused := range []bool{false, true} {
						t.Run(fmt.Sprintf("by %s, %d bytes, paused=%v", by, size, paused), func(t *testing.T) {
							c, peer := connected(t, g, f)
							from, to := c, peer
							if by == "target" {
								from, to = peer, c
							}
							data := bytes.ReplaceAll(cachedPattern(size), []byte{urgent}, []byte{'.'})
							got := make(chan []byte, 1)
							all := make(chan struct{})
							var end error
							go func() {
								var b []byte
								b, end = readUntil(to, 2*size, urgent, func() { close(all) })
								got <- b
							}()
							// While slipway sleeps all of it comes to lie in one queue.
							if paused = paused && g.engine != nil; paused {
								pause(t, g.engine.cmd.Process)
							}
							sent := make(chan error, 1)
							go func() {
								_, err := from.Write(data)
								err = errors.Join(err, sendUrgent(from, urgent))
								_, werr := from.Write(data)
								sent <- errors.Join(err, werr)
							}()
							if paused {
								time.Sleep(50 * time.Millisecond)
								g.engine.cmd.Process.Signal(syscall.SIGCONT)
							}
							if err := receive(t, sent); err != nil {
								t.Fatal(err)
							}
							// It must arrive by itself, not when the FIN shakes it loose.
							select {
							case <-all:
							case <-time.After(10 * time.Second):
								t.Error("what was sent has not arrived after 10 s")
							}
							from.CloseWrite()
							b := receive(t, got)
							without := bytes.ReplaceAll(b, []byte{urgent}, nil)
							if !bytes.Equal(without, append(slices.Clip(data), data...)) || len(b) > len(without)+1 || end != nil {
								t.Errorf("%d bytes of %d came, end %v", len(b), 2*size, end)
							}
						})
					}
				}
			}
		})
	})
}

// readUntil reads to the end, and calls all once when n bytes other than skip have come.
func readUntil(c net.Conn, n int, skip byte, all func()) (got []byte, err error) {
	buf := make([]byte, 64<<10)
	for come := 0; ; {
		k, err := c.Read(buf)
		got = append(got, buf[:k]...)
		before := come
		if come += k - bytes.Count(buf[:k], []byte{skip}); before < n && come >= n {
			all()
		}
		if err != nil {
			if err == io.EOF {
				err = nil
			}
			return got, err
		}
	}
}

func sendUrgent(c *net.TCPConn, b byte) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	werr := raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), []byte{b}, unix.MSG_OOB, nil)
		return err != unix.EAGAIN
	})
	return errors.Join(err, werr)
}
