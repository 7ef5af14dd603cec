//go:build linux

package main

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	activeCount = 1000            // flows that exchange messages at the same time
	activeDrain = 5 * time.Second // for the answers under way when the time is up
)

// idleAndActive holds o.Count idle connections while activeCount others exchange
// messages of rrBytes, each with one under way, and proves every connection at the
// end. Whatever could not be opened, broke or fell silent counts as failed.
func idleAndActive(o order) (map[string]float64, int, error) {
	rawMode()
	idle, err := openIdleFlows(o)
	defer func() {
		for _, fd := range idle {
			rawClose(fd)
		}
	}()
	if err != nil {
		return nil, 0, err
	}
	a, err := openActive(o)
	if err != nil {
		return nil, 0, err
	}
	defer a.close()
	start := time.Now()
	a.exchange(start.Add(time.Duration(o.Seconds * float64(time.Second))))
	rate := float64(a.trips) / time.Since(start).Seconds()
	a.drain(time.Now().Add(activeDrain))
	held := stillHeld(idle)
	lost := o.Count - held + activeCount - a.silent()
	values := map[string]float64{"rate": rate, "flows": float64(held), "bytes": float64(a.trips * rrBytes), "failed": float64(lost)}
	return withConns(values, o.Count+activeCount), lost, nil
}

// active are the connections that exchange messages.
type active struct {
	poll  *poller
	fds   []int
	owed  []int // bytes of the answer that each waits for; 0: none; -1: broken
	buf   [rrBytes]byte
	trips int
}

// openActive opens all, each with its first message sent.
func openActive(o order) (*active, error) {
	poll, err := newPoller()
	if err != nil {
		return nil, err
	}
	a := &active{poll: poll}
	to := targets(o)
	for i := range activeCount {
		fd, err := openIdle(&to[i%len(to)])
		if err != nil {
			a.close()
			return nil, fmt.Errorf("active flow %d of %d: %w", i+1, activeCount, err)
		}
		a.fds, a.owed = append(a.fds, fd), append(a.owed, 0)
		err = cmpErr(unix.SetNonblock(fd, true), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), poll.add(fd, unix.EPOLLIN, int32(i)))
		if err != nil {
			a.close()
			return nil, err
		}
	}
	for i := range a.fds {
		a.send(i)
	}
	return a, nil
}

// send starts a round trip on connection i, which has none under way.
func (a *active) send(i int) {
	a.owed[i] = rrBytes
	if n, err := rawSend(a.fds[i], a.buf[:]); err != nil || n != rrBytes {
		a.owed[i] = -1
	}
}

// exchange keeps a message under way on every connection until the deadline.
func (a *active) exchange(deadline time.Time) {
	for time.Now().Before(deadline) {
		for _, ev := range a.poll.wait(100) {
			if a.receive(int(ev.Fd)) {
				a.send(int(ev.Fd))
			}
		}
	}
}

// drain waits until every connection has its last answer.
func (a *active) drain(deadline time.Time) {
	for a.silent() < len(a.fds) && time.Now().Before(deadline) {
		for _, ev := range a.poll.wait(100) {
			a.receive(int(ev.Fd))
		}
	}
}

// receive takes what there is for connection i and reports a finished round trip.
// A broken connection is closed, lest epoll speak of it for ever.
func (a *active) receive(i int) bool {
	if a.owed[i] < 0 {
		return false
	}
	n, err := rawRecv(a.fds[i], a.buf[:], 0)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false
	case n <= 0 || n > a.owed[i]:
		rawClose(a.fds[i])
		a.fds[i], a.owed[i] = -1, -1
		return false
	}
	if a.owed[i] -= n; a.owed[i] > 0 {
		return false
	}
	a.trips++
	return true
}

// silent counts the connections in good health that wait for nothing.
func (a *active) silent() (n int) {
	for _, owed := range a.owed {
		if owed == 0 {
			n++
		}
	}
	return n
}

// close ends all.
func (a *active) close() {
	for _, fd := range a.fds {
		if fd >= 0 {
			rawClose(fd)
		}
	}
	rawClose(a.poll.fd)
}
