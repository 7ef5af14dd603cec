package loop

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Theory of operation.
//
// Go's netpoller wakes a goroutine for each event: an entry in a run queue, a look for
// work, often another thread that has to be woken, together 5 to 10 us. A relay of small
// messages does nothing else. Here one goroutine, alone on its thread, sits in
// epoll_wait(2), and what it finds it handles in place.
//
// Descriptors are watched edge-triggered (epoll(7), EPOLLET): they are added once and
// never changed, and a handler has to go on until the kernel says EAGAIN, or ask to
// be called again. That is how a busy descriptor lets the others have their turn: its
// handler stops after a budget of its own and returns true.
//
// An event carries the number of a slot and the slot's generation. A handler that
// removes another descriptor may do so while an event for it waits in the same batch;
// the slot is then free, or somebody else's with a new generation.

// The events a Handler is called with, from epoll(7).
const (
	Readable = unix.EPOLLIN
	Writable = unix.EPOLLOUT
	PeerShut = unix.EPOLLRDHUP // the peer sent FIN
	HangUp   = unix.EPOLLHUP   // both directions have ended
	Failed   = unix.EPOLLERR   // the socket has an error, as after a RST
)

// Handler is told what happened to its descriptor.
type Handler interface {
	// Ready is called on the loop's thread with the events since the last call,
	// or 0 when the last call returned true: there is more to do, after the
	// others. It must not block.
	Ready(events uint32) (again bool)
}

// HandlerFunc is a Handler that is one function.
type HandlerFunc func(events uint32) bool

// Ready implements Handler.
func (f HandlerFunc) Ready(events uint32) bool { return f(events) }

// Ref names a watched descriptor. The zero Ref names none.
type Ref struct{ slot, gen uint32 }

// slot is one watched descriptor.
type slot struct {
	h     Handler
	gen   uint32 // never 0 while in use
	again bool   // in Loop.again
}

// batch is how many events one epoll_wait(2) brings at most.
const batch = 128

// Loop is one such thread. But for Post, Do and Close, its methods are for handlers
// and for functions given to Post and Do.
type Loop struct {
	epoll, wake int
	done        chan struct{} // closed when the thread has ended

	// of the thread
	slots  []slot
	free   []uint32
	again  []Ref
	events [batch]unix.EpollEvent
	quit   bool

	mu     sync.Mutex // guards the fields below
	posted []func()
	closed bool // nothing more is posted
}

// ErrClosed is returned for a loop that has been closed.
var ErrClosed = errors.New("event loop is closed")

// New makes a Loop. The caller starts and closes it.
func New() (*Loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(epoll)
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	l := &Loop{epoll: epoll, wake: wake, done: make(chan struct{})}
	if _, err := l.Add(wake, Readable, HandlerFunc(l.runPosted)); err != nil {
		unix.Close(epoll)
		unix.Close(wake)
		return nil, err
	}
	return l, nil
}

// Start starts the thread.
func (l *Loop) Start() { go l.run() }

// Close ends the thread after the functions that were posted before, and waits for
// it. Watched descriptors stay their owners'.
func (l *Loop) Close() {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		<-l.done
		return
	}
	l.closed = true
	l.posted = append(l.posted, func() { l.quit = true })
	l.mu.Unlock()
	l.signal()
	<-l.done
	unix.Close(l.epoll)
	unix.Close(l.wake)
}

// Post has f called on the thread, soon, and does not wait. It returns false, and f is
// not called, after Close.
func (l *Loop) Post(f func()) bool {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false
	}
	l.posted = append(l.posted, f)
	first := len(l.posted) == 1
	l.mu.Unlock()
	if first {
		l.signal()
	}
	return true
}

// Do has f called on the thread and waits until it has returned. A handler must not
// call it. It returns false, and f is not called, after Close.
func (l *Loop) Do(f func()) bool {
	ran := make(chan struct{})
	ok := l.Post(func() {
		defer close(ran)
		f()
	})
	if ok {
		<-ran
	}
	return ok
}

// signal wakes the thread.
func (l *Loop) signal() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	unix.Write(l.wake, one[:])
}

// runPosted is the handler of wake.
func (l *Loop) runPosted(uint32) bool {
	var n [8]byte
	unix.Read(l.wake, n[:])
	l.mu.Lock()
	fs := l.posted
	l.posted = nil
	l.mu.Unlock()
	for _, f := range fs {
		f()
	}
	return false
}

// Add watches fd, which must not block, for events, edge-triggered; errors and
// hang-ups are always reported. fd stays the caller's, who removes it before he closes
// it.
func (l *Loop) Add(fd int, events uint32, h Handler) (Ref, error) {
	r := l.take(h)
	ev := unix.EpollEvent{Events: events | unix.EPOLLET&0xffffffff, Fd: int32(r.slot), Pad: int32(r.gen)}
	if err := epollAdd(l.epoll, fd, &ev); err != nil {
		l.release(r)
		return Ref{}, fmt.Errorf("watch descriptor: %w", err)
	}
	return r, nil
}

// Forget ends the watch of r: its handler is not called again. The descriptor must be
// closed right afterwards, which is what takes it out of the kernel's list.
func (l *Loop) Forget(r Ref) {
	if l.current(r) != nil {
		l.release(r)
	}
}

// Remove is Forget for a descriptor that stays open.
func (l *Loop) Remove(fd int, r Ref) {
	if l.current(r) != nil {
		l.release(r)
		unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, fd, nil)
	}
}

// Again has r's handler called once more with no events, after the others.
func (l *Loop) Again(r Ref) {
	if s := l.current(r); s != nil && !s.again {
		s.again = true
		l.again = append(l.again, r)
	}
}

// take finds a slot for h.
func (l *Loop) take(h Handler) Ref {
	if n := len(l.free); n > 0 {
		i := l.free[n-1]
		l.free = l.free[:n-1]
		l.slots[i].h = h
		return Ref{i, l.slots[i].gen}
	}
	l.slots = append(l.slots, slot{h: h, gen: 1})
	return Ref{uint32(len(l.slots) - 1), 1}
}

func (l *Loop) release(r Ref) {
	s := &l.slots[r.slot]
	s.h, s.again = nil, false
	if s.gen++; s.gen == 0 {
		s.gen = 1
	}
	l.free = append(l.free, r.slot)
}

// current returns r's slot, or nil when it is not in use any more.
func (l *Loop) current(r Ref) *slot {
	if int(r.slot) >= len(l.slots) {
		return nil
	}
	if s := &l.slots[r.slot]; s.gen == r.gen && s.h != nil {
		return s
	}
	return nil
}

// run is the thread.
func (l *Loop) run() {
	defer close(l.done)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var again []Ref
	for !l.quit {
		wait := -1
		if len(l.again) > 0 {
			wait = 0
		}
		n, err := unix.EpollWait(l.epoll, l.events[:], wait)
		if err != nil && err != unix.EINTR {
			panic(fmt.Sprintf("loop: epoll_wait: %v", err)) // EBADF, EFAULT, EINVAL: ours
		}
		again, l.again = l.again, again[:0]
		for i := range max(n, 0) {
			ev := &l.events[i]
			l.call(Ref{uint32(ev.Fd), uint32(ev.Pad)}, ev.Events)
		}
		for _, r := range again {
			if s := l.current(r); s != nil && s.again {
				s.again = false
				l.call(r, 0)
			}
		}
	}
}

// call runs one handler.
func (l *Loop) call(r Ref, events uint32) {
	s := l.current(r)
	if s != nil && s.h.Ready(events) {
		l.Again(r)
	}
}
