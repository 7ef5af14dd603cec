// Package listeners finds what an engine listens on beyond its loopback, so that it can be
// published.
//
// Theory of operation. Twice a second Watch reads the engine's sockets and tells the ports
// that are served to Apply, all of them each time, when they have changed. A process that
// listens does not announce it to anybody: sock_diag(7) has events for sockets that end,
// none for those that begin, so one has to ask. It is asked for the listening ones only; the
// files of /proc/PID/net would have the kernel look at every connection on the machine.
//
// What counts is a TCP socket that listens, or a UDP socket that is bound and not
// connected, at the wildcard address or at the engine's own. Other addresses are left
// alone: loopback, the addresses of bridges, whose servers are there for the containers
// (a name server on each, for one), and the gateway's, where slipway's own sockets are.
// UDP sockets at a port that the kernel chose are somebody's who asks, not who serves.
//
// A port appears when two readings in a row have it, and goes when two have it not. A
// reading is not a picture of one moment: a socket that ends meanwhile may hide its
// neighbour. Servers that start again within the time keep their port.
//
// A socket whose port somebody else has published is that one's for as long as it lives,
// also when the port is given back: the engine's proxy listens inside for a container, and
// goes on for a moment when its port is withdrawn, or for as long as the container does.
// The kernel's cookie tells one socket from the next at the same port.
//
// What could not be published is tried again, ever more rarely, as whoever has the port
// on the host may give it up. Each reason is logged once while it stays the same; an engine
// that listens here and there all the time does not fill the log, the rest is counted.
//
// Limits: 4096 ports are published, those with the lowest numbers, and 65536 sockets
// looked at.
package listeners

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"github.com/slipway-net/slipway/internal/flow"
)

const (
	// interval between two readings, of some 50 us each: a server that has just started
	// can be reached within a second.
	interval = 500 * time.Millisecond

	// firstRetry and lastRetry bound the time until what failed is tried again. It
	// doubles with each try.
	firstRetry, lastRetry = 2 * time.Second, time.Minute

	// maxPorts is what an engine can have published in this way.
	maxPorts = 4096

	// saidAtOnce reasons are logged, and then one in sayEvery.
	saidAtOnce = 32
	sayEvery   = time.Second
)

// Socket is one that waits for clients.
type Socket struct {
	Proto flow.Proto
	Local netip.AddrPort // as it is bound; ::ffff:0:0/96 is IPv4
	Only6 bool           // it is of IPv6 and takes no IPv4

	// Cookie is the socket's own; no other of the kernel's ever has it.
	Cookie uint64
}

// Config says what to watch.
type Config struct {
	// Read calls found for every listening TCP socket of the engine's namespace, and
	// every UDP socket that is bound and not connected: Diag.Read.
	Read func(found func(Socket)) error
	// Guest4 and Guest6 are the engine's own addresses. A family without one is not
	// published.
	Guest4, Guest6 netip.Addr
	// LocalPorts are the first and the last port that the engine's kernel gives to
	// sockets which ask for none.
	LocalPorts [2]uint16

	// Apply publishes exactly these ports, each by its number on the host, and returns
	// the errors of those that could not be, with a method Hint if there is something
	// to be done. Only Watch calls it, and not after its end.
	Apply func([]flow.PortSpec) []error
	// Held tells whether somebody else has published a port: the sockets that are there
	// are left alone then without a word, until they end. A container's port is one, where
	// the engine's proxy listens inside. It is asked for every port at every reading. It
	// may be nil.
	Held func(flow.Proto, uint16) bool

	Log *slog.Logger
}

// Watch has the ports of an engine published until ctx ends, and none afterwards.
func Watch(ctx context.Context, c Config) {
	w := watcher{Config: c, others: make(map[uint64]uint64), saying: rate.NewLimiter(rate.Every(sayEvery), saidAtOnce)}
	defer w.Apply(nil)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		w.turn()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// port is what is published once.
type port struct {
	proto  flow.Proto
	number uint16
}

// families is a set of them.
type families uint8

const (
	inet4 families = 1 << iota
	inet6
)

// ports are what listens.
type ports map[port]families

// watcher is a running Watch.
type watcher struct {
	Config

	reading uint64            // counts them
	others  map[uint64]uint64 // cookies of sockets that are somebody else's, and the last reading that had them

	before    ports           // of the last reading
	listening ports           // that two readings agreed on
	published []flow.PortSpec // of the last Apply
	retry     time.Time       // zero for not at all
	wait      time.Duration   // until retry, from the last Apply on
	said      map[string]bool // reasons of the last Apply
	saying    *rate.Limiter
	unsaid    int    // new reasons since the last that was logged
	unread    string // why the last reading failed
}

// turn reads once.
func (w *watcher) turn() {
	var found []Socket
	note := func(s Socket) {
		if w.counts(s) {
			found = append(found, s)
		}
	}
	if err := w.Read(note); err != nil {
		if text := err.Error(); text != w.unread {
			w.unread = text
			w.Log.Warn("listeners cannot be read", slog.String("why", text))
		}
		return
	}
	w.unread = ""
	now := w.ours(found)
	w.listening, w.before = w.settled(now), now
	specs := w.specs()
	if changed := !slices.Equal(specs, w.published); changed || !w.retry.IsZero() && !time.Now().Before(w.retry) {
		w.apply(specs, changed)
	}
}

// ours returns the ports of those sockets that are nobody else's. Those that are go at once:
// the ports of the last reading lose them, too.
func (w *watcher) ours(found []Socket) ports {
	w.reading++
	now, held := make(ports), make(map[port]bool)
	for _, s := range found {
		p := port{s.Proto, s.Local.Port()}
		taken, asked := held[p]
		if !asked {
			taken = w.Held != nil && w.Held(p.proto, p.number)
			held[p] = taken
		}
		switch _, known := w.others[s.Cookie]; {
		case taken || known:
			w.others[s.Cookie] = w.reading
		default:
			now[p] |= w.families(s)
		}
		if taken {
			delete(w.before, p)
			delete(w.listening, p)
		}
	}
	maps.DeleteFunc(w.others, func(_, last uint64) bool { return last+1 < w.reading })
	return now
}

// settled returns the ports that two readings agree on, and as they were where they do not.
func (w *watcher) settled(now ports) ports {
	next := make(ports, len(now))
	for p, f := range now {
		if f == w.before[p] {
			next[p] = f
		}
	}
	for p, f := range w.listening {
		if now[p] != w.before[p] {
			next[p] = f
		}
	}
	return next
}

// apply has specs published, and sees to it that failures are tried again.
func (w *watcher) apply(specs []flow.PortSpec, changed bool) {
	errs := slices.DeleteFunc(w.Apply(specs), func(err error) bool { return err == nil })
	w.published = specs
	if n := len(w.listening); n > maxPorts {
		errs = append(errs, fmt.Errorf("publish %d listeners: only %d are", n, maxPorts))
	}
	w.say(errs)
	switch {
	case len(errs) == 0:
		w.retry, w.wait = time.Time{}, 0
		return
	case changed || w.wait == 0:
		w.wait = firstRetry
	default:
		w.wait = min(2*w.wait, lastRetry)
	}
	w.retry = time.Now().Add(w.wait)
}

// specs returns what is to be published, in order.
func (w *watcher) specs() (specs []flow.PortSpec) {
	order := slices.SortedFunc(maps.Keys(w.listening), func(a, b port) int {
		if a.number != b.number {
			return int(a.number) - int(b.number)
		}
		return int(a.proto) - int(b.proto)
	})
	for _, p := range order {
		if len(specs) == maxPorts {
			break
		}
		specs = append(specs, flow.PortSpec{
			Proto: p.proto,
			Host:  netip.AddrPortFrom(w.listening[p].wildcard(), p.number),
			Guest: netip.AddrPortFrom(netip.Addr{}, p.number),
		})
	}
	return specs
}

// wildcard is the address that stands for the families; the zero one for both.
func (f families) wildcard() netip.Addr {
	switch f {
	case inet4:
		return netip.IPv4Unspecified()
	case inet6:
		return netip.IPv6Unspecified()
	}
	return netip.Addr{}
}

// say logs what is not as it was the last time, as far as the limit goes.
func (w *watcher) say(errs []error) {
	said := make(map[string]bool, len(errs))
	for _, err := range errs {
		text := err.Error()
		if !w.said[text] && !said[text] {
			w.log(err)
		}
		said[text] = true
	}
	w.said = said
}

func (w *watcher) log(err error) {
	if !w.saying.Allow() {
		w.unsaid++
		return
	}
	attrs := []any{slog.String("why", err.Error())}
	if h := interface{ Hint() string }(nil); errors.As(err, &h) && h.Hint() != "" {
		attrs = append(attrs, slog.String("hint", h.Hint()))
	}
	if w.unsaid > 0 {
		attrs = append(attrs, slog.Int("not_logged_before", w.unsaid))
	}
	w.unsaid = 0
	w.Log.Warn("a listener is not published", attrs...)
}

// counts tells whether a socket is one that is published.
func (w *watcher) counts(s Socket) bool {
	if n := s.Local.Port(); s.Proto == flow.UDP && w.LocalPorts[0] <= n && n <= w.LocalPorts[1] {
		return false
	}
	return w.families(s) != 0
}

// families returns how a socket can be reached from outside.
func (w *watcher) families(s Socket) (f families) {
	switch a := s.Local.Addr().Unmap(); {
	case !a.IsUnspecified() && a != w.Guest4 && a != w.Guest6:
		return 0
	case a.Is4():
		f = inet4
	case a.IsUnspecified() && !s.Only6:
		f = inet4 | inet6
	default:
		f = inet6
	}
	if !w.Guest4.IsValid() {
		f &^= inet4
	}
	if !w.Guest6.IsValid() {
		f &^= inet6
	}
	return f
}
