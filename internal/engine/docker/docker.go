// Package docker deals with engines that speak the Docker API: Watch tells which ports
// they have published, Names how their containers are called, DockerdCommand how slipway
// starts a dockerd.
package docker

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// What is published is what the engine lists at this moment, never what events say: an
// event is only a reason to list. So nothing is lost when events are, and after a restart
// of either side the first list is as good as any.
//
// A session is one stream of events. It is open before the first list, so nothing happens
// unseen between the two. dockerd tells that a container died before its own list leaves
// it out, so after an event we list three times, the last 1.5 s later; and without any
// event every 15 s, which also has the caller try again what failed. An engine that has
// no events (podman with events_logger="none") is listed every 2 s.
//
// Without a session we try to connect, at first at once, then less and less often. What is
// published stays for 3 s: dockerd may be starting again, with live-restore its containers
// run on. Then nothing is published until there is a list.

// The times above.
const (
	resync      = 15 * time.Second
	pollEvery   = 2 * time.Second
	grace       = 3 * time.Second
	retryFirst  = 50 * time.Millisecond
	retryMost   = 2 * time.Second
	openLimit   = 2 * time.Second  // for an engine to answer that events follow
	listLimit   = 10 * time.Second // for one list
	firstLimit  = 4 * time.Second  // for the first one, while ports of the session before wait for it
	logInterval = time.Minute      // between lines about an engine that is not there
)

// settle are the times of lists after an event, each after the one before.
var settle = []time.Duration{50 * time.Millisecond, 250 * time.Millisecond, 1200 * time.Millisecond}

// Config says what to watch.
type Config struct {
	Socket string // path of the engine's API socket

	// ServicesOnly leaves out what containers publish: somebody else does that
	// (slipway-docker-proxy), but for a swarm's ingress ports dockerd starts no proxy.
	ServicesOnly bool

	// Apply gets all ports that are published now, in one order, again and again also
	// when nothing has changed. It is called by one goroutine and may block.
	Apply func([]flow.PortSpec)

	Log *slog.Logger // nil for none
}

// watcher is one Watch.
type watcher struct {
	Config
	api      *client
	services []flow.PortSpec // of the last list that worked
	applied  bool            // something is published
	loggedAt time.Time       // that the engine is not there
}

// Watch calls c.Apply until ctx ends. What is published then stays; the caller knows
// better when to withdraw it.
func Watch(ctx context.Context, c Config) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Log = c.Log.With(slog.String("component", "docker"), slog.String("socket", c.Socket))
	w := &watcher{Config: c, api: newClient(c.Socket)}
	defer w.api.close()
	wait := retryFirst
	var lost time.Time // the end of the last session
	for {
		began := time.Now()
		listed, err := w.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if listed || lost.IsZero() {
			lost = time.Now()
		}
		if lost.Sub(began) > grace { // else there may be no events, and it would be a busy loop
			wait = retryFirst
		}
		w.missing(err, lost)
		if !sleep(ctx, wait) {
			return
		}
		wait = min(2*wait, retryMost)
	}
}

// missing says that there is no engine, and withdraws what it had once the grace is over.
func (w *watcher) missing(err error, since time.Time) {
	if time.Since(since) < grace {
		return
	}
	if w.applied {
		w.apply(nil)
	}
	if time.Since(w.loggedAt) > logInterval {
		w.loggedAt = time.Now()
		w.Log.Warn("cannot ask the engine for its published ports", slog.Any("err", err))
	}
}

func (w *watcher) apply(specs []flow.PortSpec) {
	w.applied = len(specs) > 0
	w.Apply(specs)
}

// session follows one stream of events to its end, and reports whether a list came
// through.
func (w *watcher) session(ctx context.Context) (listed bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var reading sync.WaitGroup
	defer reading.Wait()
	defer cancel()
	opened, changed, ended := make(chan struct{}), make(chan struct{}, 1), make(chan error, 1)
	reading.Go(func() { ended <- w.api.events(ctx, func() { close(opened) }, changed) })
	idle := resync
	var end error // of the stream of events
	select {
	case <-opened:
	case end = <-ended:
		if refused := (*statusError)(nil); !errors.As(end, &refused) {
			return false, end
		}
		idle = pollEvery
	case <-time.After(openLimit): // it may come later
	case <-ctx.Done():
	}
	limit := listLimit
	if w.applied { // an engine that starts takes connections before it answers
		limit = firstLimit
	}
	for step := len(settle); ; {
		if err := w.list(ctx, limit); err != nil {
			return listed, err
		}
		listed, limit = true, listLimit
		wait := idle
		if step < len(settle) {
			wait = settle[step]
			step++
		}
		select {
		case <-time.After(wait):
		case <-changed:
			step = 1
			if !sleep(ctx, settle[0]) { // events come in crowds
				return listed, ctx.Err()
			}
		case end = <-ended:
			return listed, end
		case <-ctx.Done():
			return listed, ctx.Err()
		}
	}
}

// list asks for everything and applies it.
func (w *watcher) list(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var specs []flow.PortSpec
	if !w.ServicesOnly {
		containers, err := w.api.containers(ctx)
		if err != nil {
			return err
		}
		for _, c := range containers {
			specs = append(specs, c.specs()...)
		}
	}
	services, err := w.ingress(ctx)
	if err != nil {
		return err
	}
	w.apply(tidy(append(specs, services...)))
	return nil
}

// ingress returns the ports of a swarm's services. A manager without a leader still
// serves the ones it had.
func (w *watcher) ingress(ctx context.Context) ([]flow.PortSpec, error) {
	if !w.api.manages(ctx) {
		w.services = nil
		return nil, nil
	}
	services, err := w.api.services(ctx)
	refused := (*statusError)(nil)
	switch {
	case err == nil:
		w.services = nil
		for _, s := range services {
			w.services = append(w.services, s.specs()...)
		}
	case errors.As(err, &refused) && refused.noSwarm():
		w.services = nil
	case refused == nil:
		return nil, err
	}
	return w.services, nil
}

// noSwarm reports whether an engine without a swarm, or one that knows no swarms, has
// answered so.
func (e *statusError) noSwarm() bool {
	return e.status == http.StatusNotFound || strings.Contains(e.message, "not a swarm manager")
}

// tidy sorts specs and leaves each address and port of the host once.
func tidy(specs []flow.PortSpec) []flow.PortSpec {
	slices.SortStableFunc(specs, func(a, b flow.PortSpec) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), a.Host.Compare(b.Host))
	})
	return slices.CompactFunc(specs, func(a, b flow.PortSpec) bool { return a.Proto == b.Proto && a.Host == b.Host })
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
