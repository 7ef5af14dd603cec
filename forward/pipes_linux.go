package forward

import (
	"time"

	"golang.org/x/sys/unix"
)

// Pipes are what splice(2) moves pages through. A flow has one only between reading
// from one socket and writing to the other, so one is enough as long as every reader
// keeps up; a flow whose reader does not keeps its pipe, with what did not fit.
//
// Pipes are small and few: a user's pipes may hold 64 MiB (fs.pipe-user-pages-soft,
// pipe(7)), and beyond that every new one has room for two pages, which is slower than
// reading and writing.
const (
	pipeBytes = 512 << 10 // room for 128 pages; sockets fill pages of up to 32 KiB
	maxPipes  = 64        // 32 MiB, half of a user's quota
)

// pipe holds n bytes between two splices.
type pipe struct{ r, w, n int }

// pipes hands out pipes. It is used on the loop's thread.
type pipes struct {
	idle   []*pipe
	made   int
	failed time.Time // when there was none to be had last
}

// pipesRetry is how long not to try again then: each try is four system calls.
const pipesRetry = time.Second

// get returns an empty pipe, or nil when there are enough, or no descriptors.
func (ps *pipes) get() *pipe {
	if n := len(ps.idle); n > 0 {
		p := ps.idle[n-1]
		ps.idle = ps.idle[:n-1]
		return p
	}
	if ps.made >= maxPipes || !ps.failed.IsZero() && time.Since(ps.failed) < pipesRetry {
		return nil
	}
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC) != nil {
		ps.failed = time.Now()
		return nil
	}
	if got, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeBytes); err != nil || got < pipeBytes {
		ps.failed = time.Now()
		unix.Close(fds[0]) // the quota is used up: reading and writing is faster
		unix.Close(fds[1])
		return nil
	}
	ps.made++
	return &pipe{r: fds[0], w: fds[1]}
}

// keepIdlePipes is how many empty pipes are kept for the next bulk transfer.
const keepIdlePipes = 2

// put takes p back. One that still holds bytes is of no use to others.
func (ps *pipes) put(p *pipe) {
	if p.n == 0 && len(ps.idle) < keepIdlePipes {
		ps.idle = append(ps.idle, p)
		return
	}
	ps.discard(p)
}

func (ps *pipes) discard(p *pipe) {
	ps.made--
	unix.Close(p.r)
	unix.Close(p.w)
}

// close gives back what is idle.
func (ps *pipes) close() {
	for _, p := range ps.idle {
		ps.discard(p)
	}
	ps.idle = nil
}
