package forward

import (
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Theory of operation.
//
// One goroutine receives for all sockets of a kind. They are in an epoll set, and the
// set itself waits on Go's netpoller, as a file does. So an idle socket costs the
// daemon its map entry only; buffers belong to the goroutine, never to a socket.
//
// Sockets are edge triggered and read until they are empty; a batch that is not full
// says so without a call that fails. When the set has nothing more to report the
// goroutine waits for the set's own edge, which comes with every new event of a socket.
//
// With an event loop (UseLoop) the sockets are the loop's descriptors instead: the
// thread that reads the guest's datagrams also receives the answers, and nobody has to
// be woken.
//
// Measured on two cores, loopback, client - relay - echo server in three processes,
// medians of 6 runs of 1 s:
//
//	                                     64 B, 1 outstanding    1200 B, 64 outstanding
//	a goroutine and poll.FD per socket   29.7 us                80,200/s
//	this                                 30.2 us                81,900/s
//
// The difference is noise; but the first costs a goroutine and about 4 KiB for each of
// up to 16384 sockets, where an idle mapping here has 1.4 KB in all. A locked thread in
// a blocking epoll_wait was slower in every run (38 to 71 us where these had 30 to 35,
// and a tenth fewer datagrams/s): it has to get a P back from the scheduler after each
// wait. Going to wait without a last look at the set cost 2 us, and polling on for a
// while before waiting was worse still: it takes the CPU from whoever has to answer.

// pollable is a socket in a poller. ready is called on the poller's goroutine, rx is
// the goroutine's and free to use.
type pollable interface {
	ready(events uint32, rx *recvBatch)
}

// poller receives for many sockets. It is started by the first.
type poller struct {
	mu     sync.RWMutex // guards the fields below
	closed bool
	epfd   int // valid while file is not nil
	file   *os.File
	socks  map[int32]pollable
	run    sync.WaitGroup

	on *eventLoop // serves the sockets instead; set before the first add
}

// errPollerClosed is what add returns after close.
var errPollerClosed = fmt.Errorf("poller: %w", os.ErrClosed)

// pollEvents is how many events are taken at a time.
const pollEvents = 64

// add starts to receive from fd, which stays the caller's.
func (p *poller) add(fd int, s pollable) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errPollerClosed
	}
	if p.on != nil {
		return p.on.add(fd, s)
	}
	if p.file == nil {
		if err := p.startLocked(); err != nil {
			return err
		}
	}
	p.socks[int32(fd)] = s
	if err := p.control(unix.EPOLL_CTL_ADD, fd); err != nil {
		delete(p.socks, int32(fd))
		return fmt.Errorf("watch socket: %w", err)
	}
	return nil
}

// addAnywhere is add on any thread.
func (p *poller) addAnywhere(fd int, s pollable) error {
	if p.on == nil || p.on.loop.Inside() {
		return p.add(fd, s)
	}
	err := errPollerClosed
	p.on.loop.Do(func() { err = p.add(fd, s) })
	return err
}

// again has ready called once more for fd if there is still something to read: setting
// the events anew repeats the edge (epoll(7)). Only ready may call it.
func (p *poller) again(fd int) {
	if p.on != nil {
		p.on.more = true
		return
	}
	p.control(unix.EPOLL_CTL_MOD, fd)
}

func (p *poller) control(op, fd int) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)}
	return unix.EpollCtl(p.epfd, op, fd, &ev)
}

// remove stops to receive from fd for s; the caller closes it next. A call of ready may
// still be running.
func (p *poller) remove(fd int, s pollable) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.on != nil {
		p.on.remove(s)
		return
	}
	delete(p.socks, int32(fd))
}

// unwatch is what remove needs before it for a socket that has other descriptors: the
// kernel goes on watching those that are open, under the number of the one that was added.
func (p *poller) unwatch(fd int) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	switch {
	case p.on != nil:
		p.on.loop.Unwatch(fd)
	case !p.closed:
		p.control(unix.EPOLL_CTL_DEL, fd)
	}
}

// startLocked makes the epoll set and its goroutine. The caller must hold mu.
func (p *poller) startLocked() error {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make epoll set: %w", err)
	}
	if err := unix.SetNonblock(epfd, true); err != nil {
		unix.Close(epfd)
		return fmt.Errorf("make epoll set: %w", err)
	}
	file := os.NewFile(uintptr(epfd), "epoll")
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return fmt.Errorf("wait on epoll set: %w", err)
	}
	p.epfd, p.file, p.socks = epfd, file, make(map[int32]pollable)
	p.run.Go(func() { p.receive(raw) })
	return nil
}

// receive receives until the set is closed.
func (p *poller) receive(raw syscall.RawConn) {
	rx := newRecvBatch()
	var events [pollEvents]unix.EpollEvent
	some := func(fd uintptr) bool {
		n, err := unix.EpollWait(int(fd), events[:], 0)
		if err != nil {
			return err == unix.EINTR // there is no other
		}
		for i := range n {
			p.dispatch(&events[i], rx)
		}
		return n > 0 // else there is nothing left: wait
	}
	for raw.Read(some) == nil {
	}
}

// dispatch finds the socket of an event. A number that was closed and given to another
// socket meanwhile makes that one look for nothing.
func (p *poller) dispatch(ev *unix.EpollEvent, rx *recvBatch) {
	p.mu.RLock()
	s := p.socks[ev.Fd]
	p.mu.RUnlock()
	if s != nil {
		s.ready(ev.Events, rx)
	}
}

// close ends the goroutine and waits for it. The sockets stay their owners'.
func (p *poller) close() {
	p.mu.Lock()
	p.closed = true
	file := p.file
	p.mu.Unlock()
	if file != nil {
		file.Close()
		p.run.Wait()
	}
	if p.on != nil {
		p.on.loop.Do(func() {}) // no call of ready runs any more
	}
}
