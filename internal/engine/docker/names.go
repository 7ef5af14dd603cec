package docker

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// Names are for people who read a list of ports, or why they cannot have one: nobody waits
// for long, and a port never waits for its name. The engine is asked when somebody wants
// to know, at most once a second; who comes meanwhile gets the same answer. One that does
// not answer within namesLimit is left alone for namesRetry. What it said last holds on:
// while it says nothing it starts no containers either.

// The times above.
const (
	namesAge   = time.Second
	namesLimit = 500 * time.Millisecond
	namesRetry = 10 * time.Second
)

// longestName is more than an engine gives a container.
const longestName = 128

// Names tells how an engine's containers are called. It is safe for concurrent use.
type Names struct {
	api *client
	log *slog.Logger

	mu    sync.Mutex // held while the engine is asked: whoever comes meanwhile wants its answer
	asked time.Time  // the end of the last time
	stuck bool       // it did not answer then
	last  Containers
}

// NewNames returns Names for the engine whose API is at socket. Close ends them.
func NewNames(socket string, log *slog.Logger) *Names {
	return &Names{api: newClient(socket), log: log.With(slog.String("component", "docker"))}
}

// Close ends idle connections.
func (n *Names) Close() { n.api.close() }

// Containers are the names of running containers, by what is known of them.
type Containers struct {
	byAddr map[netip.Addr]string
	byPort map[hostPort]string
}

type hostPort struct {
	proto flow.Proto
	host  netip.AddrPort
}

// Behind is the name of the container with that address; "" if not known.
func (c Containers) Behind(a netip.Addr) string { return c.byAddr[a] }

// Publishes is the name of the container that has published a port of the host there, as
// Watch says it; "" if not known.
func (c Containers) Publishes(s flow.PortSpec) string { return c.byPort[hostPort{s.Proto, s.Host}] }

// List returns the containers as they were a moment ago. It waits for the engine, but not
// longer than a person does not mind, or ctx allows.
func (n *Names) List(ctx context.Context) Containers {
	n.mu.Lock()
	defer n.mu.Unlock()
	age := namesAge
	if n.stuck {
		age = namesRetry
	}
	if !n.asked.IsZero() && time.Since(n.asked) < age {
		return n.last
	}
	asking, cancel := context.WithTimeout(ctx, namesLimit)
	defer cancel()
	list, err := n.api.list(asking)
	if err != nil && ctx.Err() != nil {
		return n.last // that says nothing about the engine
	}
	n.asked, n.stuck = time.Now(), err != nil && asking.Err() != nil
	if err != nil {
		n.log.Debug("names of containers not known", slog.Any("err", err))
		return n.last
	}
	n.last = named(list)
	return n.last
}

// named sorts out what containers are called. Two with one address, in networks that do
// not know each other, have none.
func named(list []container) Containers {
	c := Containers{make(map[netip.Addr]string), make(map[hostPort]string)}
	for _, l := range list {
		name := l.name()
		if name == "" {
			continue
		}
		for _, e := range l.NetworkSettings.Networks {
			c.enter(e.IPAddress, name)
			c.enter(e.GlobalIPv6Address, name)
		}
		for _, s := range l.specs() {
			c.byPort[hostPort{s.Proto, s.Host}] = name
		}
	}
	return c
}

// enter notes the name of an address, where there is one.
func (c Containers) enter(address, name string) {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return
	}
	if other, taken := c.byAddr[a.Unmap()]; taken && other != name {
		name = ""
	}
	c.byAddr[a.Unmap()] = name
}

// name is the first that is not a link's, "" if that is none: it is shown on terminals.
func (c container) name() string {
	for _, n := range c.Names {
		n = strings.TrimPrefix(n, "/")
		if n != "" && len(n) <= longestName && strings.Trim(n, nameRunes) == "" {
			return n
		}
	}
	return ""
}

const nameRunes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
