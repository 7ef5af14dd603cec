package daemon

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/slipway-net/slipway/forward/publish"
	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/engine/docker"
	"github.com/slipway-net/slipway/internal/flow"
)

// What a person calls those who have a port. The book knows owners and addresses; the
// engine's Docker API, /proc and other engines' control APIs know their names. Nobody but
// a listing, and an error, asks for them, and neither waits for long.

// openNames makes it possible to ask the engine how its containers are called.
func (e *engine) openNames(s *services) {
	if socket := e.dockerSocket(); socket != "" {
		e.names = docker.NewNames(socket, e.log)
		s.onStop(e.names.Close)
	}
}

// containers returns a function that names the container that an owner has published a
// port for; "" where that is not known. It asks the engine at most once.
func (e *engine) containers(ctx context.Context) func(owner string, s flow.PortSpec) string {
	if e.names == nil {
		return func(string, flow.PortSpec) string { return "" }
	}
	list := sync.OnceValue(func() docker.Containers { return e.names.List(ctx) })
	return func(owner string, s flow.PortSpec) string {
		_, guest := strings.CutPrefix(owner, guestOwner)
		switch {
		case s.Behind.IsValid() && (guest || owner == ownerDocker):
			return list().Behind(s.Behind.Addr())
		case owner == ownerDocker:
			return list().Publishes(s)
		}
		return ""
	}
}

// guestOwner begins the owner of a lease on guest.sock: guest:PID/N.
const guestOwner = "guest:"

// processOf tells which process an owner is, and what it is called, "" where it is none
// or has gone.
func processOf(owner string) (pid, program string) {
	words, guest := strings.CutPrefix(owner, guestOwner)
	pid, _, _ = strings.Cut(words, "/")
	if _, err := strconv.ParseUint(pid, 10, 32); !guest || err != nil {
		return "", ""
	}
	comm, _ := os.ReadFile(filepath.Join("/proc", pid, "comm")) // has gone: is called nothing
	return pid, strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, strings.TrimSpace(string(comm)))
}

// ownerText is an owner of published ports as a user knows it.
func ownerText(owner string) string {
	switch owner {
	case ownerConfig:
		return "the configuration or -p"
	case api.OwnerAPI:
		return "slipway ports add or the API"
	case ownerAuto:
		return "publish_auto"
	case ownerDocker:
		return "a container, by docker_api"
	}
	pid, program := processOf(owner)
	if program == "" {
		return "a process in the engine"
	}
	return fmt.Sprintf("%s (pid %s) in the engine", cmp.Or(program, "a process"), pid)
}

// How long another engine may take to say what it has published, and how long what it
// said, or that it did not answer, is good for. It may have to ask for names itself.
const (
	neighbourLimit = time.Second
	neighbourAge   = time.Second
	neighbourRetry = 10 * time.Second
)

// neighbours know which ports other engines of the user have published.
type neighbours struct {
	mu   sync.Mutex // held while one is asked: whoever comes meanwhile wants its answer
	said map[string]neighbour
}

// neighbour is what one has said.
type neighbour struct {
	until time.Time // it is good for
	ports []api.Port
}

// container names the container of the engine below root that has a port of the host;
// "" where that is not known.
func (n *neighbours) container(ctx context.Context, root, engine string, taken flow.PortSpec) string {
	for _, p := range n.ports(ctx, root, engine) {
		if p.Container == "" || p.Spec.Proto != taken.Proto.String() {
			continue
		}
		for _, l := range p.Listens {
			if l.Port() == taken.Host.Port() && publish.Overlap(l.Addr(), taken.Host.Addr()) {
				return p.Container
			}
		}
	}
	return ""
}

func (n *neighbours) ports(ctx context.Context, root, engine string) []api.Port {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	if said, ok := n.said[engine]; ok && now.Before(said.until) {
		return said.ports
	}
	asking, cancel := context.WithTimeout(ctx, neighbourLimit)
	defer cancel()
	c := api.NewClient(engine, filepath.Join(root, engine, socketName))
	defer c.Close()
	ports, err := c.Ports(asking)
	age := neighbourAge
	switch {
	case err != nil && ctx.Err() != nil:
		return nil // that says nothing about the engine
	case asking.Err() != nil:
		age = neighbourRetry
	}
	if n.said == nil || len(n.said) > mostNeighbours {
		n.said = make(map[string]neighbour)
	}
	n.said[engine] = neighbour{time.Now().Add(age), ports}
	return ports
}

// mostNeighbours are remembered: engines come and go.
const mostNeighbours = 64
