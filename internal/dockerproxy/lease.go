package dockerproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/flow"
)

// Times of a lease.
const (
	redialFirst = 50 * time.Millisecond // between tries to reach the daemon: it may just be starting
	redialMost  = 2 * time.Second
	closeWait   = 2 * time.Second // dockerd waits for our end, and the daemon sees it by itself
)

// conn is an *api.GuestConn.
type conn interface {
	Publish(flow.PortSpec) (api.Port, error)
	Done() <-chan struct{}
	Close() error
}

// lease holds one published port for as long as it is kept: on a new connection when the
// daemon has been started again.
type lease struct {
	dial func() (conn, error)
	spec flow.PortSpec
	log  *slog.Logger
	conn conn
}

// acquire asks until the daemon has answered or ctx ends. What the daemon refuses is an
// *api.Error.
func (l *lease) acquire(ctx context.Context) error {
	wait := redialFirst
	var why error
	for {
		err := l.once(ctx)
		if refused := (*api.Error)(nil); err == nil || errors.As(err, &refused) {
			return err
		}
		if why == nil || ctx.Err() == nil {
			why = err // rather than that the time is over
		}
		if !sleep(ctx, wait) {
			return fmt.Errorf("publish %v: slipway does not answer: %w", l.spec, why)
		}
		wait = min(2*wait, redialMost)
	}
}

// once connects and asks. A GuestConn knows no context: when ctx ends it is left to itself.
func (l *lease) once(ctx context.Context) error {
	type answer struct {
		conn conn
		err  error
	}
	answers := make(chan answer) // not buffered: nobody takes what comes too late
	go func() {
		c, err := l.dial()
		if err == nil {
			if _, err = c.Publish(l.spec); err != nil {
				c.Close()
			}
		}
		select {
		case answers <- answer{c, err}:
		case <-ctx.Done():
			if err == nil {
				c.Close()
			}
		}
	}()
	select {
	case a := <-answers:
		if a.err == nil {
			l.conn = a.conn
		}
		return a.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// keep holds the port until ctx ends, and withdraws it then. acquire has succeeded.
func (l *lease) keep(ctx context.Context) {
	defer l.end()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.conn.Done():
		}
		l.log.Warn("the connection to slipway has ended: publishing again", slog.Any("port", l.spec))
		if !l.again(ctx) {
			return
		}
		l.log.Info("published again", slog.Any("port", l.spec))
	}
}

// again acquires the lease anew. Somebody else may have the port by now, and let go of it
// later. It reports false when ctx ended before.
func (l *lease) again(ctx context.Context) bool {
	last, wait := "", redialFirst
	for {
		err := l.acquire(ctx)
		if err == nil {
			return true
		}
		if text := err.Error(); text != last && ctx.Err() == nil {
			last = text
			l.log.Error("cannot publish again, trying on", slog.Any("err", err))
		}
		// All proxies of an engine lost their connections at one moment.
		if !sleep(ctx, wait+rand.N(wait)) {
			return false
		}
		wait = min(2*wait, redialMost)
	}
}

// end withdraws the port: when it returns the host's port is free, if the daemon answers
// in time.
func (l *lease) end() {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		l.conn.Close()
	}()
	select {
	case <-closed:
	case <-time.After(closeWait):
	}
}

// sleep reports whether d has passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
