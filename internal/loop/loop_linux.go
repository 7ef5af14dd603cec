package loop

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

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
// A thread that sleeps is woken by an interrupt, and its processor first has to leave a
// sleep of its own: 5 to 25 us, most of a round trip between two processes. So while
// waits have lately been short, shorter than spinMost, the thread asks for that long
// before it goes to sleep (the halt polling of hypervisors does the same). Where
// processors are scarce that would take one from those who have the next event to make:
// when the thread finds itself interrupted while it asks, it stops asking for a while.
//
// An event carries the number of a slot and the slot's generation. A handler that
// removes another descriptor may do so while an event for it waits in the same batch;
// the slot is then free, or somebody else's with a new generation.

// The events a Handler is called with, from epoll(7).
const (
	Readable = unix.EPOLLIN
	Writable = unix.EPOLLOUT
	PeerShut = unix.EPOLLRDHUP // the peer sent FIN
	Urgent   = unix.EPOLLPRI   // there is urgent data
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

const (
	// spinMost is how long to ask before sleeping: twice a round trip between two
	// processes on one machine. Measured on 2 cores: a TCP round trip of 64 bytes took
	// 1.89 of native without, 1.60 with 25 us and 1.17 with 50 us.
	spinMost = 50 * time.Microsecond
	// preempted is how long one question may take at most if nobody else has the
	// processor meanwhile; it takes about 0.5 us.
	preempted = 30 * time.Microsecond
	// crowdedFor is how long not to ask after somebody else needed the processor.
	crowdedFor = 10 * time.Millisecond
	// spinForget bounds one long wait's weight: after 8 short ones it is forgotten.
	spinForget = 2 * spinMost
)

// batch is how many events one epoll_wait(2) brings at most.
const batch = 128

// Loop is one such thread. But for Post, Do, Inside, Unwatch and Close, its methods are for
// handlers and for functions given to Post and Do.
type Loop struct {
	epoll, wake int
	done        chan struct{} // closed when the thread has ended

	tid atomic.Int32 // of the thread, once it runs

	// of the thread
	slots   []slot
	free    []uint32
	again   []Ref
	events  [batch]unix.EpollEvent
	quit    bool
	usual   time.Duration // how long a wait took lately
	calm    bool          // see Calm
	crowded time.Time     // when somebody else needed the processor last

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
	l.signal()
	l.mu.Unlock()
	<-l.done
	unix.Close(l.epoll)
	unix.Close(l.wake)
}

// Post has f called on the thread, soon, and does not wait. It returns false, and f is
// not called, after Close.
func (l *Loop) Post(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	if l.posted = append(l.posted, f); len(l.posted) == 1 {
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

// Inside reports whether the caller runs on the thread.
func (l *Loop) Inside() bool { return int32(unix.Gettid()) == l.tid.Load() }

// signal wakes the thread. The caller must hold mu, as wake is closed after that and its
// number may be another's.
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
	ev := unix.EpollEvent{Events: events | unix.EPOLLET, Fd: int32(r.slot), Pad: int32(r.gen)}
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

// Unwatch takes fd out of the kernel's list at once. It is for a descriptor whose socket
// has others, which closing it does not take out: call it before that, on any thread, and
// Forget its Ref.
func (l *Loop) Unwatch(fd int) { unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, fd, nil) }

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
	l.tid.Store(int32(unix.Gettid()))
	defer l.tid.Store(0) // the thread goes on with other goroutines
	var again []Ref
	for !l.quit {
		n := l.wait()
		again, l.again = l.again, again[:0]
		for i := range n {
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

// wait waits for events and returns how many there are.
func (l *Loop) wait() int {
	if len(l.again) > 0 {
		return l.poll(0)
	}
	begin := time.Now()
	n := 0
	if l.usual < spinMost && !l.calm && begin.Sub(l.crowded) > crowdedFor {
		n = l.spin(begin)
	}
	if n == 0 {
		n = l.poll(-1)
	}
	l.calm = false
	l.usual += (min(time.Since(begin), spinForget) - l.usual) / 8
	return n
}

// spin asks for events for a while, and notices when somebody else has the processor
// meanwhile.
func (l *Loop) spin(begin time.Time) (n int) {
	for last := begin; n == 0 && last.Sub(begin) < spinMost; {
		n = l.poll(0)
		now := time.Now()
		if now.Sub(last) > preempted {
			l.crowded = now
			return n
		}
		last = now
	}
	return n
}

// poll is one epoll_wait(2).
func (l *Loop) poll(milliseconds int) int {
	var n int
	var err error
	if milliseconds == 0 {
		n, err = epollNow(l.epoll, l.events[:])
	} else {
		n, err = unix.EpollWait(l.epoll, l.events[:], milliseconds)
	}
	if err != nil && err != unix.EINTR {
		panic(fmt.Sprintf("loop: epoll_wait: %v", err)) // EBADF, EFAULT, EINVAL: ours
	}
	return max(n, 0)
}

// Calm has the next wait be one without asking first: a bulk transfer's ends need the
// processor more than it needs haste.
func (l *Loop) Calm() { l.calm = true }

// call runs one handler.
func (l *Loop) call(r Ref, events uint32) {
	s := l.current(r)
	if s != nil && s.h.Ready(events) {
		l.Again(r)
	}
}
