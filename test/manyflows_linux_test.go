package test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// flowCounts says how many flows TestManyFlows holds on each path. The full number of
// DESIGN section 9 takes 22,000 descriptors of the daemon. Root raises the limit of open
// files (raiseFileLimit here, and slipway by itself); where nobody can, as in a container
// without CAP_SYS_RESOURCE, there are as many flows as fit, ten idle ones to an active one.
func flowCounts(k kind, long bool) (idle, active int) {
	const ours = 1000 // descriptors for everything but flows
	total := 11_000
	if !k.kernel() && !long {
		total = 2_200
	}
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil && l.Max < 1<<30 {
		total = min(total, (int(l.Max)-ours)/2)
	}
	return total * 10 / 11, total / 11
}

// TestManyFlows holds thousands of idle flows beside hundreds that talk. None fails, an
// idle one costs two descriptors and little memory, and when all have ended the daemon
// holds what it held before.
func TestManyFlows(t *testing.T) {
	need(t, "ip", "nft")
	long := os.Getenv(envLong) == "1"
	for _, k := range kinds {
		if k.native || k.rootless && !long {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			idle, active := flowCounts(k, long)
			manyFlows(t, newGuest(t, newTopology(t), k, engineOptions{noCapture: true}), idle, active)
		})
	}
}

func manyFlows(t *testing.T, g *guest, idle, active int) {
	const fdsEach = 2
	memoryEach := 40 << 10
	if g.kind.kernel() {
		memoryEach = 8 << 10
	}
	addresses := []string{echoProcess(t, g.net.World, at(families[0].world, 0)), echoProcess(t, g.net.World, at(families[1].world, 0))}
	held := &heldFlows{g: g, addresses: addresses}
	defer held.close()

	// What the first flows cost is not theirs alone: buffers, threads, two pipes.
	held.open(t, 50)
	held.talk(t, held.conns, 300*time.Millisecond)
	held.close()
	start := settled(t, g.engine, nil)

	held.open(t, idle)
	full := holdings(t, g.engine)
	fds, rss := full.fds-start.fds, full.rss-start.rss
	t.Logf("each of %d idle flows: %.2f descriptors, %.2f KiB", idle, float64(fds)/float64(idle), float64(rss)/float64(idle)/1024)
	const slack = 4 << 20 // a heap grows in steps
	if fds > fdsEach*idle+10 || rss > memoryEach*idle+slack {
		t.Errorf("%d idle flows take %d descriptors and %d KiB each", idle, fds, rss/idle>>10)
	}
	held.open(t, active)
	n := held.talk(t, held.conns[idle:], 3*time.Second)
	t.Logf("%d round trips of %d active flows", n, active)
	for _, c := range held.conns[:idle] {
		roundTrip(t, c)
	}
	held.close()
	end := settled(t, g.engine, &start)
	t.Logf("before, with all idle, after: %+v, %+v, %+v", start, full, end)
	noneRefused(t, g.engine)
}

// heldFlows are connections of a guest.
type heldFlows struct {
	g         *guest
	addresses []string // one of each family, taken in turn
	conns     []net.Conn
}

// open opens n more and has each say something once.
func (h *heldFlows) open(t testing.TB, n int) {
	t.Helper()
	first := len(h.conns)
	if err := h.g.ns.Do(func() error {
		for range n {
			c, err := net.DialTimeout("tcp", h.addresses[len(h.conns)%len(h.addresses)], 10*time.Second)
			if err != nil {
				return fmt.Errorf("flow %d: %w", len(h.conns), err)
			}
			h.conns = append(h.conns, c)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, c := range h.conns[first:] {
		roundTrip(t, c)
	}
}

func (h *heldFlows) close() {
	for _, c := range h.conns {
		c.Close()
	}
	h.conns = nil
}

// talk sends messages over all the connections and waits for each to come back, and
// returns how many did. One in twenty is too long for a small buffer.
func (h *heldFlows) talk(t testing.TB, conns []net.Conn, d time.Duration) int64 {
	t.Helper()
	var wg sync.WaitGroup
	var count atomic.Int64
	over := time.Now().Add(d)
	for i, c := range conns {
		wg.Go(func() {
			c.SetDeadline(over.Add(20 * time.Second))
			size := 64
			if i%20 == 0 {
				size = 200 << 10
			}
			data, got := cachedPattern(size), make([]byte, size)
			for first := true; first || time.Now().Before(over); first = false {
				err := both(func() error { _, err := c.Write(data); return err },
					func() error { _, err := io.ReadFull(c, got); return err })
				if err == nil && string(got) != string(data) {
					err = errors.New("other bytes came back")
				}
				if err != nil {
					t.Errorf("active flow %d: %v", i, err)
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	return count.Load()
}

// holding is what a daemon holds.
type holding struct{ fds, pipes, goroutines, threads, flows, rss int }

func holdings(t testing.TB, e *engine) (h holding) {
	t.Helper()
	// Flows first: what they held is let go of before they are forgotten.
	s := readHealth(t, e)
	h.goroutines = s.Memory.Goroutines
	for _, f := range s.Flows {
		h.flows += f.Live
	}
	dir := fmt.Sprintf("/proc/%d/", e.cmd.Process.Pid)
	links, err := os.ReadDir(dir + "fd")
	if err != nil {
		t.Fatal(err)
	}
	h.fds = len(links)
	for _, l := range links {
		if to, _ := os.Readlink(filepath.Join(dir, "fd", l.Name())); strings.HasPrefix(to, "pipe:") {
			h.pipes++
		}
	}
	tasks, _ := os.ReadDir(dir + "task")
	h.threads = len(tasks)
	h.rss = memory(t, e)
	return h
}

// settled waits until the daemon holds no flow, and no more than at the start if that is
// known, and returns what it holds. A few goroutines and descriptors serve the very
// question, and two pipes are kept for the next bulk transfer.
func settled(t testing.TB, e *engine, start *holding) holding {
	t.Helper()
	const few, pipeEnds = 4, 4
	var h, last holding
	ok := eventually(30*time.Second, func() bool {
		last, h = h, holdings(t, e)
		switch {
		case h.flows != 0:
			return false
		case start == nil:
			return h.fds == last.fds && h.goroutines == last.goroutines
		}
		return h.fds <= start.fds+few+pipeEnds && h.pipes <= start.pipes+pipeEnds && h.goroutines <= start.goroutines+few
	})
	if !ok {
		t.Errorf("without flows the daemon holds %+v, at the start %+v", h, start)
	}
	return h
}

// noneRefused wants the counters of all limits to be zero, but for those of except.
func noneRefused(t testing.TB, e *engine, except ...string) {
	t.Helper()
	for name, n := range counters(t, e) {
		if slices.Contains(except, name) {
			continue
		}
		limit := strings.Contains(name, "limit") && !strings.HasSuffix(name, ".limit") || strings.HasSuffix(name, "failed") ||
			strings.HasSuffix(name, "accept_errors") || name == "kernel.unanswered" || name == "kernel.stray"
		if limit && n != 0 {
			t.Errorf("counter %s is %d", name, n)
		}
	}
}

// TestNoDescriptors: a daemon without descriptors answers no more, says so, wastes no
// time, and what runs goes on.
func TestNoDescriptors(t *testing.T) {
	need(t, "ip", "nft", "prlimit")
	const limit = 400
	script := fmt.Sprintf("#!/bin/sh\nexec prlimit --nofile=%[1]d:%[1]d %[2]s \"$@\"\n", limit, os.Getenv(envBin))
	bin := filepath.Join(runTmp, "slipway-few-files")
	if err := os.WriteFile(bin, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(bin) })
	t.Setenv(envBin, bin)
	eachEngineAtOnce(t, func(t *testing.T, g *guest) {
		if n := fileLimit(t, g.engine.cmd.Process.Pid); n != limit {
			t.Skipf("slipway may raise its limit, and has: %d", n) // real root
		}
		noDescriptors(t, g, limit)
	})
}

// fileLimit is a process's soft limit of open files.
func fileLimit(t testing.TB, pid int) (n int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "Max open files")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

func noDescriptors(t *testing.T, g *guest, limit int) {
	h := &heldFlows{g: g, addresses: []string{echoProcess(t, g.net.World, at(families[0].world, 0))}}
	defer h.close()
	h.open(t, 10)
	pid := g.engine.cmd.Process.Pid
	// Somewhere on the way it is full. What a guest sees then is silence, a refusal or a
	// reset, never a connection that says nothing.
	var lost int
	for range limit {
		switch s := tryEcho(g, h); s {
		case "ok":
		case "silence", "reset":
			lost++
		default:
			t.Errorf("without descriptors a guest sees %q", s)
		}
		if lost >= 3 {
			break
		}
	}
	// A quarter may be kept for other uses.
	if n := len(h.conns); lost < 3 || n < limit/4 {
		t.Errorf("%d flows, then %d without answer, with %d descriptors", n, lost, limit)
	}
	t.Logf("%d flows with %d descriptors", len(h.conns), limit)
	expectFailed(t, g.engine) // it keeps some for those who ask what is the matter
	over := make(chan struct{})
	go func() { // somebody knocks meanwhile
		for {
			dialError(g.ns, h.addresses[0], 200*time.Millisecond)
			select {
			case <-over:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	expectIdle(t, pid)
	close(over)
	for _, c := range h.conns {
		roundTrip(t, c)
	}
	// Room again: so it serves again.
	for _, c := range h.conns[:10] {
		c.Close()
	}
	h.conns = h.conns[10:]
	if !eventually(10*time.Second, func() bool { return tryEcho(g, h) == "ok" }) {
		t.Error("no connection 10 s after others ended")
	}
	for _, c := range h.conns {
		roundTrip(t, c)
	}
}

// expectIdle wants a process in want to use little of a second of processor time, in one of
// four: what it did before may not be over.
func expectIdle(t testing.TB, pid int) {
	t.Helper()
	var used time.Duration
	for range 4 {
		before := cpuTime(t, pid)
		time.Sleep(time.Second)
		if used = cpuTime(t, pid) - before; used <= 300*time.Millisecond {
			return
		}
	}
	t.Errorf("%v of processor time in one second of want", used)
}

// expectFailed wants the dials that failed to have been counted.
func expectFailed(t testing.TB, e *engine) {
	t.Helper()
	if c := counters(t, e); c["tcp.failed"]+c["kernel.accept_errors"] == 0 {
		t.Errorf("nothing counts what failed: %v", c)
	}
}

// tryEcho opens one flow more: "ok" if it works, "silence", "reset", or what is wrong.
func tryEcho(g *guest, h *heldFlows) string {
	c, err := g.ns.Dial("tcp", h.addresses[0], 700*time.Millisecond)
	if err == nil {
		c.SetDeadline(time.Now().Add(4 * time.Second))
		b := []byte("x")
		if _, err = c.Write(b); err == nil {
			_, err = io.ReadFull(c, b)
		}
		if err == nil {
			h.conns = append(h.conns, c)
			return "ok"
		}
		c.Close()
		if os.IsTimeout(err) {
			return "a connection that says nothing"
		}
	}
	switch {
	case os.IsTimeout(err):
		return "silence"
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return "reset"
	}
	return err.Error()
}

// cpuTime is what a process has used, user and system.
func cpuTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// proc_pid_stat(5): utime and stime are fields 14 and 15; the second may hold
	// spaces, but ends with the last parenthesis.
	f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var ticks int
	for _, s := range f[11:13] {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100 // USER_HZ
}

// TestShortFlows opens and ends thousands of flows in every way a guest can, from the
// namespace and from containers, both families: all are answered, nothing is left.
func TestShortFlows(t *testing.T) {
	const workers, rounds = 16, 100
	eachEngine(t, func(t *testing.T, g *guest) {
		from := append(newContainers(t, g.ns), g.ns)
		var addresses []string
		for _, f := range families {
			addresses = append(addresses, echoServer(t, g.net.World, at(f.world, 0)))
		}
		start := settled(t, g.engine, nil)
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				for i := range rounds {
					if err := shortFlow(from[w%len(from)], addresses[i%2], i/2%4); err != nil {
						t.Errorf("worker %d, flow %d: %v", w, i, err)
						return
					}
				}
			})
		}
		wg.Wait()
		settled(t, g.engine, &start)
		// The reset of a guest that says nothing can overtake the ACK that completes its
		// handshake: each waits in the queue of the processor that sent it.
		const overtaken = "kernel.unanswered"
		noneRefused(t, g.engine, overtaken)
		if n := counters(t, g.engine)[overtaken]; n > workers*rounds/4/100 {
			t.Errorf("counter %s is %d", overtaken, n)
		}
	})
}

// shortFlow opens a flow and ends it in one of four ways.
func shortFlow(ns *topo.NS, address string, way int) error {
	conn, err := ns.Dial("tcp", address, 10*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	c := conn.(*net.TCPConn)
	switch way {
	case 0: // reset without a word
		return c.SetLinger(0)
	case 1: // end in order
		return echoOnce(c)
	case 2: // reset after a word
		return errors.Join(echoOnce(c), c.SetLinger(0))
	}
	// More comes back than is read: the close is a reset.
	_, err = c.Write(cachedPattern(100_000))
	return errors.Join(err, c.CloseWrite())
}

// TestPortsAgain connects again from the port of a connection that has just ended.
func TestPortsAgain(t *testing.T) {
	ways := map[string]func(c *net.TCPConn, guest bool){
		"end by target": func(c *net.TCPConn, guest bool) {
			if guest {
				io.Copy(io.Discard, c)
			}
		},
		"reset by target": func(c *net.TCPConn, guest bool) {
			if guest {
				c.Write([]byte("y"))
				io.Copy(io.Discard, c)
				return
			}
			io.ReadFull(c, make([]byte, 1))
			c.SetLinger(0)
		},
		"reset by guest": func(c *net.TCPConn, guest bool) {
			if guest {
				c.SetLinger(0)
				return
			}
			io.Copy(io.Discard, c)
		},
	}
	eachGuest(t, func(t *testing.T, g *guest) {
		rounds, within := 10, 10*time.Second
		if g.kind.path == "netstack" {
			rounds, within = 2, 2*time.Second // each takes a repeated SYN, 1 s
		}
		eachFamily(t, func(t *testing.T, f family) {
			for name, end := range ways {
				a := serve(t, g.net.World, at(f.world, 0), func(c *net.TCPConn) {
					defer c.Close()
					c.Write([]byte("x"))
					end(c, false)
				})
				local := at(f.guest, 5555)
				slow := 0 // a SYN was repeated, or the machine has stalled
				for i := range rounds {
					var err error
					try := func() bool {
						start := time.Now()
						err = portOnce(g.ns, local, a.String(), within, end)
						if err == nil && time.Since(start) > 900*time.Millisecond {
							slow++
						}
						return err == nil
					}
					// The port is busy until the guest's last FIN is acknowledged, and
					// netstack needs a moment to forget.
					for deadline := time.Now().Add(15 * time.Second); !try() && time.Now().Before(deadline); {
						busy := errors.Is(err, unix.EADDRNOTAVAIL)
						forgetful := errors.Is(err, unix.ECONNREFUSED) || os.IsTimeout(err)
						if !busy && !(g.kind.path == "netstack" && forgetful) {
							break
						}
						time.Sleep(10 * time.Millisecond)
					}
					if err != nil {
						t.Errorf("%s, round %d: %v", name, i, err)
						break
					}
				}
				if g.kind.path != "netstack" && slow > 2 {
					t.Errorf("%s: %d of %d rounds took as long as a repeated SYN", name, slow, rounds)
				}
			}
		})
	})
}

// portOnce has one connection from a port of the guest.
func portOnce(ns *topo.NS, local, address string, within time.Duration, end func(c *net.TCPConn, guest bool)) error {
	from, err := net.ResolveTCPAddr("tcp", local)
	if err != nil {
		return err
	}
	d := net.Dialer{Timeout: within, LocalAddr: from, Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(err, cerr)
	}}
	var c net.Conn
	err = ns.Do(func() (err error) {
		c, err = d.Dial("tcp", address)
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(15 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return err
	}
	end(c.(*net.TCPConn), true)
	return nil
}
