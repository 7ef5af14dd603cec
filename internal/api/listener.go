package api

import (
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

// maxWaiting is how many accepted connections may wait for their turn, and filesShare
// which part of the limit of open files they may take at most.
const (
	maxWaiting = 16384
	filesShare = 4
)

// limitedListener gives out at most cap(slots) connections at one time. It accepts more
// than that, and lets them wait here: the kernel's queue is short (net.core.somaxconn),
// and whoever finds it full gets an error.
type limitedListener struct {
	*net.UnixListener
	slots   chan struct{}
	waiting chan *net.UnixConn
	stop    chan struct{} // closed by Close
	ended   chan struct{} // closed when there is nothing more to accept
	err     error         // why; read after ended
	once    sync.Once
}

func limit(ln *net.UnixListener, n int, log *slog.Logger) *limitedListener {
	l := &limitedListener{
		UnixListener: ln,
		slots:        make(chan struct{}, n), waiting: make(chan *net.UnixConn, min(maxWaiting, max(1, fileLimit()/filesShare))),
		stop: make(chan struct{}), ended: make(chan struct{}),
	}
	go l.accept(log)
	return l
}

// accept fills the queue until the listener ends.
func (l *limitedListener) accept(log *slog.Logger) {
	defer close(l.ended)
	for {
		c, err := acceptUnix(l.UnixListener, l.stop, log)
		if err != nil {
			l.err = err
			return
		}
		select {
		case l.waiting <- c:
		case <-l.stop:
			c.Close()
			l.err = net.ErrClosed
			return
		}
	}
}

// Accept implements net.Listener.
func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.ended:
		return nil, l.err
	}
	select {
	case c := <-l.waiting:
		return &limitedConn{UnixConn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
	case <-l.ended:
		<-l.slots
		return nil, l.err
	}
}

// Close implements net.Listener. It ends the connections that still wait.
func (l *limitedListener) Close() (err error) {
	l.once.Do(func() {
		close(l.stop)
		err = l.UnixListener.Close()
		<-l.ended
		for {
			select {
			case c := <-l.waiting:
				c.Close()
			default:
				return
			}
		}
	})
	return err
}

type limitedConn struct {
	*net.UnixConn
	release func()
}

// Close implements net.Conn.
func (c *limitedConn) Close() error {
	defer c.release()
	return c.UnixConn.Close()
}

// scarce are the errors of accept(2) that end when something is closed elsewhere. The
// connection stays in the queue, and the socket readable: without a pause we would spin.
var scarce = []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED}

// acceptUnix accepts one connection, and waits where there are no files left for it.
func acceptUnix(ln *net.UnixListener, stop <-chan struct{}, log *slog.Logger) (*net.UnixConn, error) {
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		c, err := ln.AcceptUnix()
		if err == nil {
			return c, nil
		}
		if !slices.ContainsFunc(scarce, func(e error) bool { return errors.Is(err, e) }) {
			return nil, err
		}
		log.Warn("accept", slog.Any("err", err))
		select {
		case <-stop:
			return nil, net.ErrClosed
		case <-time.After(wait):
		}
	}
}
