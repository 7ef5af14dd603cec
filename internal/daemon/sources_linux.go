package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/engine/docker"
	"github.com/slipway-net/slipway/internal/engine/listeners"
	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/nsagent"
)

// guestSocketName is the socket in a state directory on which the engine publishes its
// own ports; envGuestSocket tells the engine its path.
const (
	guestSocketName = "guest.sock"
	envGuestSocket  = "SLIPWAY_SOCK"
)

// addGuestSocket opens guest.sock.
func (e *engine) addGuestSocket(s *services) error {
	path := e.state.file(guestSocketName)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	server := api.NewGuestServer(guestBackend{backend{e}}, e.log)
	s.start("guest.sock", func(ctx context.Context) error { return server.Serve(ctx, ln) })
	return nil
}

// guestBackend is an engine as it sees itself.
type guestBackend struct{ backend }

// NetNS implements api.GuestBackend.
func (b guestBackend) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", b.agent.PID()) }

// guestEnv is env as the engine's programs get it: sockets that a service manager
// passed on are ours.
func (e *engine) guestEnv(env []string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == envGuestSocket || name == "LISTEN_FDS" || name == "LISTEN_PID" || name == "LISTEN_FDNAMES"
	})
	return append(env, envGuestSocket+"="+e.state.file(guestSocketName))
}

// inheritedSockets are those that a service manager passed on, see sd_listen_fds(3).
func inheritedSockets() []*os.File { return activation.Files(true) }

// addWatchers starts whoever finds ports to publish by itself.
func (e *engine) addWatchers(s *services) error {
	if c := e.dockerWatch(s.ctx); c.Socket != "" {
		s.start("docker api", func(ctx context.Context) error {
			docker.Watch(ctx, c)
			return nil
		})
	}
	if !e.cfg.PublishAuto {
		return nil
	}
	fds, err := e.agent.Sockets(s.ctx, nsagent.SocketDiag, 1)
	if err != nil {
		return fmt.Errorf("watch what the guest listens on: %w", err)
	}
	diag := listeners.NewDiag(os.NewFile(uintptr(fds[0]), "sock_diag"))
	s.onStop(func() { diag.Close() })
	cfg := listeners.Config{
		Read: diag.Read, Guest4: e.doors.ends.Guest4, Guest6: e.doors.ends.Guest6,
		LocalPorts: e.agent.Report().LocalPorts,
		Apply:      func(specs []flow.PortSpec) []error { return e.reconcile(s.ctx, ownerAuto, specs) },
		Held:       func(proto flow.Proto, port uint16) bool { return e.book.Held(ownerAuto, proto, port) },
		Log:        e.log,
	}
	s.start("listeners", func(ctx context.Context) error {
		listeners.Watch(ctx, cfg)
		return nil
	})
	return nil
}

// dockerSocket is the path of the engine's Docker API, "" where we know of none.
func (e *engine) dockerSocket() string {
	if e.cfg.DockerAPI == "" && e.isDockerd() {
		return e.state.file(docker.SocketName)
	}
	return e.cfg.DockerAPI
}

// dockerWatch says which engine's API is watched, and for what: the containers of an
// engine that we have set up publish by slipway-docker-proxy, unless its options keep it
// from that.
func (e *engine) dockerWatch(ctx context.Context) docker.Config {
	r := e.reconciler(ctx, ownerDocker)
	return docker.Config{
		Socket: e.dockerSocket(), ServicesOnly: e.cfg.DockerAPI == "" && !e.silent, Log: e.log,
		Apply: func(specs []flow.PortSpec) {
			r.apply(slices.DeleteFunc(specs, func(s flow.PortSpec) bool {
				return e.book.Held(ownerDocker, s.Proto, s.Host.Port())
			}))
		},
	}
}
