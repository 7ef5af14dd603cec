package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/slipway-net/slipway/forward"
	"github.com/slipway-net/slipway/forward/publish"
	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// The book (forward/publish) knows which ports are published and has their listening
// sockets; forward carries the clients; the doors (doors_linux.go) are what forward
// needs to get into the guest. Whoever wants ports published is an owner of the book:
//
//	config          publish of the configuration and -p; they have to work, or the engine does not start
//	api             `slipway ports add` and other clients of the control API, until removed;
//	                they and the configuration are one person, who may ask twice
//	guest:...       one connection of guest.sock, for as long as it lasts
//	docker          what runs in the engine, by its API
//	auto            what listens in the guest
//
// The last two are lists that are reconciled: what cannot be published is logged once, shown by status, and
// tried again with the next list.

// Owners of published ports.
const (
	ownerConfig = "config"
	ownerDocker = "docker"
	ownerAuto   = "auto"
)

// openBook makes the book of published ports.
func (e *engine) openBook(s *services) {
	e.doors = e.newDoors()
	e.forward.SetDoors(e.doors)
	e.book = publish.New(publish.Config{
		Guest4: e.doors.ends.Guest4, Guest6: e.doors.ends.Guest6,
		Carrier: carrier{e},
		Bind:    e.cfg.PublishBind, Allowed: e.cfg.PublishPorts.Allows, Source: e.cfg.SourceIP,
		Inside:    e.doors.inside,
		Yields:    ownerAuto,
		Together:  []string{ownerConfig, api.OwnerAPI},
		Inherited: e.passedOn,
		Log:       e.log.With(slog.String("component", "publish")),
	})
	s.onStop(e.book.Close)
}

// publishConfigured publishes what the configuration and the command line ask for. The
// hint is that of the first port that could not be.
func (e *engine) publishConfigured(ctx context.Context) error {
	errs := e.book.Reconcile(ownerConfig, e.cfg.Publish)
	if len(errs) == 0 {
		return nil
	}
	hint := ""
	for i, err := range errs {
		errs[i] = e.told(ctx, ownerConfig, err)
		hint = cmp.Or(hint, hintOf(errs[i]))
	}
	return &Problem{Err: errors.Join(someOf(errs)...), Hint: hint}
}

// someOf shortens what is wrong with many ports: the reasons repeat.
func someOf(errs []error) []error {
	more := len(errs) - maxUnpublished
	if more <= 0 {
		return errs
	}
	return append(slices.Clone(errs[:maxUnpublished]), fmt.Errorf("publish: %d more ports could not be published", more))
}

// reloadPorts takes over what is configured about published ports. Ports of other owners
// stay as they are.
func (e *engine) reloadPorts(ctx context.Context, now config.Settings) {
	e.book.Update(now.PublishBind, now.PublishPorts.Allows, now.SourceIP)
	for _, why := range someOf(e.reconcile(ctx, ownerConfig, now.Publish)) {
		e.log.Error("port not published", slog.Any("err", why))
	}
}

// reconcile is that of the book. Why a port could not be published is in the status, too,
// until the next time.
func (e *engine) reconcile(ctx context.Context, owner string, specs []flow.PortSpec) []error {
	errs := e.book.Reconcile(owner, specs)
	for i, err := range errs {
		errs[i] = e.told(ctx, owner, err)
	}
	e.unpublished.Store(owner, slices.Clone(errs))
	return errs
}

// maxUnpublished is how many ports of one owner are named that could not be published.
const maxUnpublished = 8

// unpublishedWarnings are what reconcile has kept, a line each.
func (e *engine) unpublishedWarnings() (out []string) {
	for _, owner := range []string{ownerConfig, ownerDocker, ownerAuto} {
		kept, _ := e.unpublished.Load(owner)
		errs, _ := kept.([]error)
		for _, err := range errs[:min(maxUnpublished, len(errs))] {
			out = append(out, fmt.Sprintf("port of %s not published: %v", owner, err))
		}
		if more := len(errs) - maxUnpublished; more > 0 {
			out = append(out, fmt.Sprintf("%d more ports of %s not published", more, owner))
		}
	}
	return out
}

// carrier carries the clients of published ports through forward. It implements
// publish.Carrier.
type carrier struct{ *engine }

var _ publish.Carrier = carrier{}

// ServeTCP implements publish.Carrier.
func (c carrier) ServeTCP(ln *net.TCPListener, p *publish.Port) (io.Closer, error) {
	return c.forward.ServeTCP(ln, c.inbound(ln.Addr(), p))
}

// ServeUDP implements publish.Carrier.
func (c carrier) ServeUDP(u *net.UDPConn, p *publish.Port) (io.Closer, error) {
	return c.forward.ServeUDP(u, c.inbound(u.LocalAddr(), p))
}

// inbound is p as the data path needs it, for the clients of one of its sockets.
func (c carrier) inbound(listens net.Addr, p *publish.Port) *forward.Inbound {
	in := inboundOf(p, addrPortOf(listens).Addr())
	in.Direct, in.Either = c.direct(), p.Either()
	in.Preserve = p.Spec.Source != flow.SourceGateway
	in.Proxy = p.Spec.ProxyProtocol
	in.UDPIdle = udpIdle(c.agent.Report().UDPTimeout)
	in.Count = forward.InboundCounters{
		Clients: &p.Stats.Clients, Refused: &p.Stats.Refused, Gateway: &p.Stats.Gateway,
		Dropped: &p.Stats.Dropped, Errors: &p.Stats.Errors,
	}
	return in
}

// inboundOf is where p leads the clients that come in at an address.
func inboundOf(p *publish.Port, listens netip.Addr) *forward.Inbound {
	return &forward.Inbound{Guest: p.GuestFor(listens), Behind: p.Spec.Behind, Wildcard: p.Wildcard}
}

// direct reports whether the engine lets packets from outside in to its containers'
// addresses. We know it of an engine whose options are ours.
func (e *engine) direct() bool { return e.isDockerd() }

// How long the mapping of a UDP client lasts after its last datagram: docker-proxy's
// time, and less than the guest's conntrack remembers the client, with a margin for
// datagrams on their way.
const (
	udpIdleMost   = 90 * time.Second
	udpIdleMargin = 5 * time.Second
	udpIdleLeast  = 5 * time.Second
)

// udpIdle returns that time for a guest whose conntrack remembers for so many seconds;
// 0 is not known.
func udpIdle(conntrack int) time.Duration {
	if conntrack == 0 {
		return udpIdleMost
	}
	return max(udpIdleLeast, min(udpIdleMost, time.Duration(conntrack)*time.Second-udpIdleMargin))
}

func addrPortOf(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.AddrPort()
	case *net.UDPAddr:
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

// Info implements api.Backend.
func (b backend) Info() api.Info {
	i := api.NewInfo()
	i.Version, i.StateDir, i.ChildPID = b.opts.Version, b.state.path, b.agent.PID()
	i.NetworkDriver.DNS = []netip.Addr{b.net.Gateway4}
	i.NetworkDriver.ChildIP = b.net.Guest4
	i.NetworkDriver.IPv6 = b.agent.Report().IPv6 == ""
	return i
}

// Ports implements api.Backend.
func (b backend) Ports(ctx context.Context) []api.Port {
	ports := b.book.List()
	out := make([]api.Port, len(ports))
	containers := b.containers(ctx)
	for i, p := range ports {
		out[i] = b.portOfBook(p)
		if out[i].Container = containers(p.Owner(), p.Spec); out[i].Container == "" {
			_, out[i].Program = processOf(p.Owner())
		}
	}
	return out
}

// AddPort implements api.PortBackend.
func (b backend) AddPort(ctx context.Context, owner string, s flow.PortSpec) (api.Port, error) {
	p, err := b.book.Add(owner, s)
	if err != nil {
		return api.Port{}, publishError(b.told(ctx, owner, err))
	}
	return b.portOfBook(p), nil
}

// RemovePort implements api.PortBackend.
func (b backend) RemovePort(id uint64) error {
	if err := b.book.Remove(id); err != nil {
		return publishError(err)
	}
	return nil
}

// portOfBook is p in the API's words.
func (e *engine) portOfBook(p *publish.Port) api.Port {
	var listens netip.Addr // of the first socket, which p.Spec is about, too
	if len(p.Listens) > 0 {
		listens = p.Listens[0].Addr()
	}
	return api.Port{
		ID: p.ID, Spec: api.SpecOf(p.Asked()), Owner: p.Owner(), Since: p.Since, Listens: list(p.Listens),
		Counters: api.PortCounters{
			Clients: p.Stats.Clients.Load(), Refused: p.Stats.Refused.Load(), Gateway: p.Stats.Gateway.Load(),
			Dropped: p.Stats.Dropped.Load(), Errors: p.Stats.Errors.Load(),
		},
		Reaches: inboundOf(p, listens).Reaches(e.doors.ends),
	}
}

// publishError is an error of the book as the API tells it.
func publishError(err error) *api.Error {
	out := &api.Error{Message: err.Error(), Hint: hintOf(err)}
	var (
		spec     *publish.SpecError
		policy   *publish.PolicyError
		conflict *publish.ConflictError
	)
	switch {
	case errors.As(err, &spec), errors.As(err, &policy):
		out.Status = http.StatusBadRequest
	case errors.As(err, &conflict):
		out.Status = http.StatusConflict
	case errors.Is(err, publish.ErrNotFound):
		out.Status = http.StatusNotFound
	case errors.Is(err, publish.ErrTooMany), errors.Is(err, net.ErrClosed), errors.Is(err, syscall.EMFILE):
		out.Status = http.StatusServiceUnavailable
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EADDRNOTAVAIL):
		out.Status = http.StatusBadRequest
	}
	return out
}

// hintOf is what an error says that a user can do.
func hintOf(err error) string {
	var p *Problem
	if errors.As(err, &p) {
		return p.Hint
	}
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

// publishCounters sum up the published ports, for status.
func (e *engine) publishCounters() map[string]int64 {
	out := map[string]int64{}
	for _, p := range e.book.List() {
		out["ports"]++
		out["clients"] += int64(p.Stats.Clients.Load())
		out["refused"] += int64(p.Stats.Refused.Load())
		out["gateway"] += int64(p.Stats.Gateway.Load())
		out["dropped"] += int64(p.Stats.Dropped.Load())
		out["errors"] += int64(p.Stats.Errors.Load())
	}
	return out
}

// reconciler publishes the lists of one owner, and tells of each failure once.
type reconciler struct {
	engine *engine
	ctx    context.Context // ends with the services; the watchers' callbacks have none
	owner  string
	told   map[string]bool
}

func (e *engine) reconciler(ctx context.Context, owner string) *reconciler {
	return &reconciler{engine: e, ctx: ctx, owner: owner, told: make(map[string]bool)}
}

// apply makes specs the owner's ports.
func (r *reconciler) apply(specs []flow.PortSpec) {
	failed := make(map[string]bool)
	for _, err := range r.engine.reconcile(r.ctx, r.owner, specs) {
		text := err.Error()
		if failed[text] = true; !r.told[text] {
			r.engine.log.Warn("port not published", slog.String("owner", r.owner), slog.Any("err", err))
		}
	}
	r.told = failed
}
