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
		together, patience := stallTogether, 2*stallCaseTime
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

// onKernel tells whether the guest's TCP is meant to take the kernel path.
func (g *guest) onKernel() bool { return strings.HasPrefix(g.kind.name, "kernel") }

// expectPath wants the path under test to have carried the connections, all of them or
// none.
func expectPath(t testing.TB, g *guest, connections uint64) {
	t.Helper()
	if g.engine == nil {
		return
	}
	n := counters(t, g.engine)["kernel.answered"]
	if g.onKernel() && n < int64(connections) || !g.onKernel() && n != 0 {
		t.Errorf("%d of %d connections took the kernel path", n, connections)
	}
}
