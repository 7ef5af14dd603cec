//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

const (
	warmUp     = 100 // transactions before the clock starts
	iperfConns = 2   // connections of one iperf3 test: control and data
	rrBytes    = 64  // payload of a round trip
	maxSamples = 1 << 20

	resetSettle = 100 * time.Millisecond // for the last resets to arrive everywhere before the guest ends
)

// bulk runs iperf3 and takes the receiver's figure: what a proxy has swallowed
// but not delivered does not count.
func bulk(o order) (map[string]float64, int, error) {
	out, err := exec.Command(o.IPerf[0], o.IPerf[1:]...).Output()
	var res struct {
		Error string
		End   struct {
			Received struct {
				Rate  float64 `json:"bits_per_second"`
				Bytes float64 `json:"bytes"`
			} `json:"sum_received"`
		}
	}
	if jerr := json.Unmarshal(out, &res); jerr != nil {
		return nil, 0, errors.Join(err, fmt.Errorf("iperf3 output: %w", jerr))
	}
	if res.Error != "" {
		return nil, 0, fmt.Errorf("iperf3: %s", res.Error)
	}
	return map[string]float64{"gbps": res.End.Received.Rate / 1e9, "bytes": res.End.Received.Bytes, "conns": iperfConns}, 0, err
}

// targets returns the socket addresses of all server ports.
func targets(o order) []sockaddr {
	out := make([]sockaddr, worldPorts)
	for i := range out {
		out[i] = sockaddrOf(netip.AddrPortFrom(o.Target, o.Port+uint16(i)))
	}
	return out
}

// crr makes connections one at a time: connect, one byte there, the same byte
// back, FIN, and the peer's FIN. A transaction ends when the last of these is
// seen, so the time of a close that dawdles counts.
func crr(o order) (map[string]float64, int, error) { return oneByOne(o, connectOnce) }

// crrReset makes connections one at a time and ends each with a reset once the
// byte is back.
func crrReset(o order) (map[string]float64, int, error) {
	values, failed, err := oneByOne(o, resetOnce)
	time.Sleep(resetSettle)
	return values, failed, err
}

// oneByOne repeats a transaction for as long as the order says.
func oneByOne(o order, once func(*sockaddr) error) (map[string]float64, int, error) {
	rawMode()
	to := targets(o)
	times := make([]int64, 0, maxSamples)
	failed := 0
	var firstErr error
	var start time.Time
	conns := 0
	for ; len(times) < maxSamples; conns++ {
		if conns == warmUp {
			start = time.Now()
		}
		t0 := time.Now()
		err := once(&to[conns%len(to)])
		if err != nil {
			failed++
			firstErr = cmpErr(firstErr, err)
			if failed > 100 {
				break
			}
			continue
		}
		if conns < warmUp {
			continue
		}
		times = append(times, int64(time.Since(t0)))
		if time.Since(start).Seconds() > o.Seconds {
			break
		}
	}
	return withConns(latencies(times, time.Since(start)), conns+1), failed, failIfEmpty(times, firstErr)
}

// withConns notes how many connections were tried, for the proof.
func withConns(values map[string]float64, n int) map[string]float64 {
	if values != nil {
		values["conns"] = float64(n)
	}
	return values
}

// resetOnce is one transaction of crrReset.
func resetOnce(to *sockaddr) error {
	fd, err := rawSocket(to, unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	defer rawAbort(fd)
	return echoOnNew(fd, to)
}

// echoOnNew connects fd and sends a byte to and fro.
func echoOnNew(fd int, to *sockaddr) error {
	if err := rawConnect(fd, to); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	var b [1]byte
	if _, err := rawSend(fd, b[:]); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if n, err := rawRecv(fd, b[:], 0); n != 1 {
		return fmt.Errorf("recv returned %d instead of 1 byte: %w", n, cmpErr(err, unix.ENODATA))
	}
	return nil
}

// connectOnce is one transaction of crr, with blocking calls.
func connectOnce(to *sockaddr) error {
	fd, err := rawSocket(to, unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	defer rawClose(fd)
	if err := echoOnNew(fd, to); err != nil {
		return err
	}
	var b [1]byte
	rawShutdown(fd)
	if n, err := rawRecv(fd, b[:], 0); n != 0 {
		return fmt.Errorf("recv returned %d instead of end of file: %w", n, cmpErr(err, unix.EPROTO))
	}
	return nil
}

// A slot is one of the connections of crrParallel; its state is the step that it
// waits for.
type slot struct {
	fd    int
	state int
	start time.Time
}

const (
	slotConnecting = iota
	slotEchoing
	slotClosing
)

// crrParallel does what crr does with o.Count connections at a time, in one
// thread.
func crrParallel(o order) (map[string]float64, int, error) {
	rawMode()
	poll, err := newPoller()
	if err != nil {
		return nil, 0, err
	}
	p := &parallel{poll: poll, to: targets(o), slots: make([]slot, o.Count), times: make([]int64, 0, maxSamples)}
	for i := range p.slots {
		if err := p.open(int32(i)); err != nil {
			return nil, 0, err
		}
	}
	start := time.Now()
	for time.Since(start).Seconds() < o.Seconds && p.failed < 1000 {
		for _, ev := range poll.wait(1000) {
			if err := p.step(ev.Fd, ev.Events); err != nil {
				return nil, p.failed, err
			}
		}
	}
	values := withConns(latencies(p.times, time.Since(start)), p.next)
	return values, p.failed, failIfEmpty(p.times, p.err)
}

// parallel is the state of crrParallel.
type parallel struct {
	poll   *poller
	to     []sockaddr
	next   int // port of the next connection
	slots  []slot
	times  []int64
	failed int
	err    error // the first failure
}

// open starts a connection in slot i.
func (p *parallel) open(i int32) error {
	p.next++
	to := &p.to[p.next%len(p.to)]
	fd, err := rawSocket(to, unix.SOCK_STREAM|unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	s := &p.slots[i]
	*s = slot{fd: fd, state: slotConnecting, start: time.Now()}
	if err := rawConnect(fd, to); err != nil && err != unix.EINPROGRESS {
		return p.fail(i, fmt.Errorf("connect: %w", err))
	}
	const edges = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | 1<<31 // EPOLLET
	return p.poll.add(fd, edges, i)
}

// fail counts a failed connection and opens the next; only a machine that has no
// sockets left returns an error.
func (p *parallel) fail(i int32, err error) error {
	p.failed++
	p.err = cmpErr(p.err, err)
	rawClose(p.slots[i].fd)
	if p.failed >= 1000 {
		return p.err
	}
	return p.open(i)
}

// step moves slot i on as far as its socket allows.
func (p *parallel) step(i int32, events uint32) error {
	s := &p.slots[i]
	var b [2]byte
	if s.state == slotConnecting {
		if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			return p.fail(i, errors.New("connect failed"))
		}
		if events&unix.EPOLLOUT == 0 {
			return nil
		}
		if _, err := rawSend(s.fd, b[:1]); err != nil {
			return p.fail(i, fmt.Errorf("send: %w", err))
		}
		s.state = slotEchoing
		return nil
	}
	n, err := rawRecv(s.fd, b[:], 0)
	switch {
	case err == unix.EAGAIN:
		return nil
	case err != nil:
		return p.fail(i, fmt.Errorf("recv: %w", err))
	case s.state == slotEchoing && n == 1:
		s.state = slotClosing
		rawShutdown(s.fd)
		return nil
	case s.state == slotClosing && n == 0:
		rawClose(s.fd)
		if len(p.times) < maxSamples {
			p.times = append(p.times, int64(time.Since(s.start)))
		}
		return p.open(i)
	}
	return p.fail(i, fmt.Errorf("recv returned %d in state %d", n, s.state))
}

// roundTrips sends 64 bytes to and fro on one TCP connection.
func roundTrips(o order) (map[string]float64, int, error) {
	rawMode()
	to := targets(o)
	fd, err := rawSocket(&to[0], unix.SOCK_STREAM)
	if err != nil {
		return nil, 0, err
	}
	defer rawClose(fd)
	if err := rawConnect(fd, &to[0]); err != nil {
		return nil, 0, fmt.Errorf("connect: %w", err)
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	values, failed, err := pingPong(fd, o.Seconds)
	return withConns(values, 1), failed, err
}

// pingPong measures round trips of rrBytes on a connected blocking socket. On a
// datagram socket the receive time-out counts one failure per lost datagram.
func pingPong(fd int, seconds float64) (map[string]float64, int, error) {
	msg := make([]byte, rrBytes)
	times := make([]int64, 0, maxSamples)
	var failed int
	var firstErr error
	var start time.Time
	for i := 0; len(times) < maxSamples && failed < 20; i++ {
		if i == warmUp {
			start = time.Now()
		}
		t0 := time.Now()
		if _, err := rawSend(fd, msg); err != nil {
			failed++
			firstErr = cmpErr(firstErr, fmt.Errorf("send: %w", err))
			continue
		}
		if n, err := rawRecv(fd, msg, unix.MSG_WAITALL); n != rrBytes {
			failed++
			firstErr = cmpErr(firstErr, fmt.Errorf("recv returned %d instead of %d bytes: %w", n, rrBytes, cmpErr(err, unix.ENODATA)))
			continue
		}
		if i < warmUp {
			continue
		}
		times = append(times, int64(time.Since(t0)))
		if time.Since(start).Seconds() > seconds {
			break
		}
	}
	return latencies(times, time.Since(start)), failed, failIfEmpty(times, firstErr)
}

// cmpErr returns the first error that is not nil.
func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// failIfEmpty explains a load that completed nothing.
func failIfEmpty(times []int64, err error) error {
	if len(times) > 0 {
		return nil
	}
	return fmt.Errorf("no transaction succeeded: %w", cmpErr(err, errors.New("none was answered in time")))
}
