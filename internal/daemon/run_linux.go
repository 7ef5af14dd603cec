package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/slipway-net/slipway/dns"
	"github.com/slipway-net/slipway/forward"
	"github.com/slipway-net/slipway/forward/publish"
	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/engine/docker"
	"github.com/slipway-net/slipway/internal/flow/table"
	"github.com/slipway-net/slipway/internal/nsagent"
	"github.com/slipway-net/slipway/stack/link"
	"github.com/slipway-net/slipway/stack/netstack"
)

// Theory of operation.
//
// What starts later needs what started earlier, and is stopped before it:
//
//	state directory   the name is ours; nothing of an earlier engine is left
//	host facts        routes and name servers, read once
//	agent             namespaces, device, routes; from now on a process may exist inside
//	stack, forward    the device's packets are served
//	dns               on the gateway, in the stack
//	published ports   those of the configuration; they have to work
//	api               on the socket in the state directory
//	command           the guest; nobody else is started once it runs
//
// The guest keeps its network until its last process has ended: dockerd says goodbye
// to registries and cluster managers. So the order of the end is: TERM to the guest,
// stop_timeout, KILL (the agent does it), then api, dns, stack and forward, then the
// files. Each part's goroutines have ended when its stop returns.
//
// The daemon may end without any of this (kill -9): the agent then ends the guest by
// itself, the kernel takes sockets, device and namespaces, and what remains is the
// state directory, whose lock is free.
//
// The garbage collector is left alone: an idle daemon has less than 1 MiB of objects and
// 13 MiB resident, and no setting made a difference to the connection rate that could be
// told from noise (GOGC=off included).

// engine is one engine while it runs.
type engine struct {
	opts  Options
	cfg   config.Engine
	log   *slog.Logger
	level *slog.LevelVar

	state    *stateDir
	net      guestNet
	started  time.Time
	warnings []string   // constant once the command runs
	passedOn []*os.File // sockets of a service manager; the book's once there is one

	agent   *nsagent.Agent
	main    atomic.Pointer[nsagent.Process] // nil before the command runs, and with attach
	link    *link.TUN
	table   *table.Table
	stack   *netstack.Stack
	policy  *forward.Policy
	forward *forward.Forwarder
	dns     *dns.Server
	kernel  *kernelPath // nil without
	doors   *doors
	book    *publish.Book // nil before the services are made
	names   *docker.Names // nil where the engine has no Docker API that we know of

	neighbours  neighbours
	unpublished sync.Map // by owner, the []error of its last list; see reconcile

	wrapper []string // in front of the command; see docker.DockerdWrapper
	silent  bool     // a dockerd that does not publish by our proxy

	pathWhy string // why the kernel path is used, or not
}

// Run starts an engine and blocks until it has ended and everything of it is gone. It
// returns the command's exit status; with attach 0 when the namespace went away or a
// signal said so. The error is why slipway could not start or go on; it is a *Problem
// where there is a hint. Run takes over the process's signals meanwhile. When ctx ends,
// the engine is stopped as by TERM.
func Run(ctx context.Context, o Options) (int, error) {
	e := &engine{opts: o, level: new(slog.LevelVar), started: time.Now()}
	code, err := e.run(ctx)
	if err != nil {
		return exitCode(err), withHint(err)
	}
	return code, nil
}

// endingPoll is how often openState looks whether a guest has ended, and endingGrace how
// much longer than its time to stop that may take.
const (
	endingPoll  = 50 * time.Millisecond
	endingGrace = 10 * time.Second
)

// openState makes the state directory. It waits for the guest of an earlier slipway of
// this name that was killed, unless a signal ends us, which it returns.
func (e *engine) openState(ctx context.Context, signals *signals) (syscall.Signal, error) {
	var err error
	for end := time.Now().Add(e.cfg.StopTimeout + endingGrace); ; time.Sleep(endingPoll) {
		waited := errors.Is(err, ErrEnding)
		if e.state, err = openState(stateRoot(), e.opts.Name); !errors.Is(err, ErrEnding) {
			return 0, err
		}
		if !waited {
			e.log.Warn("waiting", slog.Any("why", err), slog.Duration("stop_timeout", e.cfg.StopTimeout))
		}
		if sig := e.interrupted(ctx, signals); sig != 0 {
			return sig, nil
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if time.Now().After(end) {
			return 0, err
		}
	}
}

func (e *engine) run(ctx context.Context) (code int, err error) {
	if e.cfg, err = e.opts.Config.Engine(e.opts.Name); err != nil {
		return 0, err
	}
	e.passedOn = inheritedSockets() // before any child, who would have them, too
	signals := catchSignals()
	defer signals.stop()
	e.level.Set(e.cfg.LogLevel)
	log := newLogWriter(e.opts.Log)
	defer log.close()
	e.log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: e.level})).With(slog.String("engine", e.opts.Name))

	if sig, err := e.openState(ctx, signals); sig != 0 || err != nil {
		return e.interruptedCode(sig), err
	}
	defer func() {
		if cerr := e.state.Close(); cerr != nil {
			e.log.Warn("state directory not removed", slog.Any("err", cerr))
		}
	}()
	if err := e.readHost(); err != nil {
		return 0, err
	}
	if err := e.writeFiles(); err != nil {
		return 0, err
	}
	if e.isDockerd() {
		if err := e.prepareDockerd(ctx); err != nil {
			return 0, err
		}
	}
	if e.agent, err = nsagent.Start(ctx, e.spec(), e.log); err != nil {
		if sig := e.interrupted(ctx, signals); sig != 0 { // it may have ended the agent, too
			e.log.Debug("interrupted while starting", "signal", sig.String(), "err", err)
			return e.interruptedCode(sig), nil
		}
		return 0, e.attachError(err)
	}
	defer e.agent.Release() // the device: its users have gone
	raiseFileLimit()
	signals.ownTerminal()
	return e.serve(ctx, signals)
}

// serve does what there is to do once the guest exists, and ends it.
func (e *engine) serve(ctx context.Context, signals *signals) (int, error) {
	killed, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	services, err := e.startServices(ctx)
	if err != nil {
		e.agent.TUN().Close() // again, if the link had it
		kill()                // nothing of the user's runs yet
		return 0, errors.Join(err, e.agent.Close(killed))
	}
	defer services.stop()

	var code int
	if sig := e.interrupted(ctx, signals); sig != 0 {
		code = e.interruptedCode(sig)
		kill()
	} else if err = e.startMain(ctx); err == nil {
		code, err = e.wait(ctx, signals, services, kill)
	} else {
		kill()
	}
	err = errors.Join(err, e.end(killed, signals, kill))
	services.stop()
	return code, errors.Join(services.err(), err)
}

// patience is how long a person waits before we say what for.
const patience = time.Second

// end ends the guest: its command left nothing, or has children that need time.
func (e *engine) end(killed context.Context, signals *signals, kill func()) error {
	ended := make(chan error, 1)
	go func() { ended <- e.agent.Close(killed) }()
	slow := time.NewTimer(patience)
	defer slow.Stop()
	for {
		select {
		case err := <-ended:
			return err
		case <-slow.C:
			e.progress("waiting %v for processes that the command has left; TERM or Ctrl-C kills them", e.cfg.StopTimeout)
		case sig := <-signals.c:
			if signals.ends(sig) {
				kill()
			}
		}
	}
}

// progress tells a person what takes so long.
func (e *engine) progress(format string, args ...any) {
	if e.opts.Progress != nil {
		fmt.Fprintf(e.opts.Progress, "slipway: "+format+"\n", args...)
	}
}

// startServices makes the parts on the guest's device and sets them going. On error
// the device is the caller's to close, again if need be.
func (e *engine) startServices(ctx context.Context) (*services, error) {
	s := newServices(ctx)
	if err := e.makeServices(s); err != nil {
		s.stop()
		return nil, err
	}
	if err := e.addServices(s); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

// makeServices makes the parts, and registers how they end.
func (e *engine) makeServices(s *services) error {
	if err := e.openLink(s); err != nil {
		return err
	}
	s.onStop(func() { e.link.Close() }) // again, unless the stack never ran
	n := &e.net
	e.table = table.New()
	e.policy = forward.NewPolicy(forward.PolicyConfig{
		Gateway4: n.Gateway4, Gateway6: n.Gateway6, Host4: n.Host4, Host6: n.Host6,
		Subnets:       n.subnets(),
		HostAccess:    hostAccess(e.cfg.HostAccess),
		HostAddresses: forward.HostAddresses(e.cfg.HostAddresses),
		Log:           e.log,
	})
	sc := netstack.Config{
		Link: e.link, Gateway4: n.Gateway4, Gateway6: n.Gateway6, Log: e.log, MaxDials: e.cfg.MaxDials,
	}
	if e.kernel != nil {
		sc.Poll, sc.Kernel = e.kernel.poll, e.kernel
	}
	var err error
	if e.stack, err = netstack.New(sc); err != nil {
		return err
	}
	e.forward = forward.New(forward.Config{
		Guest: e.stack, Table: e.table, Policy: e.policy, Log: e.log,
		MaxUDP: e.cfg.MaxUDP, MaxDials: e.cfg.MaxDials,
	})
	s.onStop(e.forward.Close)
	e.openBook(s)
	e.openNames(s)
	e.dns = dns.New(dns.Config{Names: n.names(), Subnets: n.subnets(), Upstreams: n.upstreams, Log: e.log})
	if e.kernel != nil {
		return e.kernel.open(s, e)
	}
	return nil
}

// addServices starts what runs until the engine ends.
func (e *engine) addServices(s *services) error {
	const dnsPort = 53
	packets, err := e.stack.ListenPacket(dnsPort)
	if err != nil {
		return fmt.Errorf("listen on udp port %d of the gateway: %w", dnsPort, err)
	}
	streams, err := e.stack.Listen(dnsPort)
	if err != nil {
		return fmt.Errorf("listen on tcp port %d of the gateway: %w", dnsPort, err)
	}
	s.start("netstack", func(ctx context.Context) error { return e.stack.Run(ctx, e.forward) })
	if err := e.chooseKernel(); err != nil {
		return err
	}
	s.start("dns", func(ctx context.Context) error { return e.dns.Serve(ctx, packets, streams) })
	if err := e.publishConfigured(s.ctx); err != nil {
		return err
	}
	if err := e.addGuestSocket(s); err != nil {
		return err
	}
	if err := e.addWatchers(s); err != nil {
		return err
	}
	return e.addAPI(s)
}

// startMain starts the command, if there is one.
func (e *engine) startMain(ctx context.Context) error {
	if e.opts.Mode == ModeAttach {
		return nil
	}
	dir := e.opts.Dir
	if dir == "" {
		dir, _ = os.Getwd() // a directory that was removed: the agent's own
	}
	p, err := e.agent.Exec(ctx, nsagent.Command{
		Args: slices.Concat(e.wrapper, e.opts.Command), Env: e.guestEnv(e.opts.Env), Dir: dir,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Main: true,
	})
	if err == nil {
		e.main.Store(p)
	}
	return err
}

// spec is what the agent makes.
func (e *engine) spec() nsagent.Spec {
	n := &e.net
	s := nsagent.Spec{
		Rootless:      e.opts.Rootless || os.Geteuid() != 0,
		PrivateMounts: e.cfg.IsolateMount,
		PIDNamespace:  e.cfg.IsolatePID,
		TUN:           nsagent.TUN{Name: nsagent.DefaultTUN, MTU: e.cfg.MTU},
		Addresses:     n.guestAddresses(),
		Gateway4:      n.Gateway4,
		Gateway6:      n.Gateway6,
		Default4:      n.host.Default4,
		Default6:      n.host.Default6,
		Mirror:        n.mirrored,
		ResolvConf:    e.state.file("resolv.conf"),
		Hosts:         e.state.file("hosts"),
		IdentitySNAT:  true,
		KernelPath:    e.cfg.Path != config.PathNetstack,
		PingRange:     true,
		NonlocalBind:  e.isDockerd(),
		StopTimeout:   e.cfg.StopTimeout,
		Held:          e.state.guest,
	}
	if s.StopTimeout == 0 {
		s.StopTimeout = -1 // the agent's word for "at once"
	}
	if e.opts.Mode == ModeAttach {
		s.Join = &nsagent.Join{PID: e.opts.PID, NetNS: e.opts.NetNS}
	}
	return s
}

// writeFiles fills the state directory with what is known before the guest exists.
func (e *engine) writeFiles() error {
	if err := e.state.write("pid", fmt.Appendf(nil, "%d\n", os.Getpid())); err != nil {
		return fmt.Errorf("write state of engine %s: %w", e.opts.Name, err)
	}
	if err := e.state.write("resolv.conf", e.net.resolv.Guest(e.net.Gateway4, e.net.Gateway6)); err != nil {
		return fmt.Errorf("write state of engine %s: %w", e.opts.Name, err)
	}
	host, err := os.ReadFile("/etc/hosts")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		e.warn("read /etc/hosts of the host: %v", err)
	}
	if err := e.state.write("hosts", hostsFile(host, e.net.guestAddrs)); err != nil {
		return fmt.Errorf("write state of engine %s: %w", e.opts.Name, err)
	}
	return nil
}

// linkNamespace makes the file netns. It is a symbolic link into /proc, not a bind
// mount: it holds nothing, so that nothing keeps the namespace alive when we die.
func (e *engine) linkNamespace() error {
	target := filepath.Join("/proc", fmt.Sprint(e.agent.PID()), "ns", "net")
	if err := os.Symlink(target, e.state.file("netns")); err != nil {
		return fmt.Errorf("write state of engine %s: %w", e.opts.Name, err)
	}
	return nil
}

// warn notes something that does not work as it should, for the log and for status.
func (e *engine) warn(format string, args ...any) {
	w := fmt.Sprintf(format, args...)
	e.warnings = append(e.warnings, w)
	e.log.Warn(w)
}

// hostAccess is the same in forward's words.
func hostAccess(h config.HostAccess) forward.HostAccess {
	out := forward.HostAccess{All: h.All}
	for _, p := range h.Ports {
		out.Ports = append(out.Ports, forward.PortRange{First: p.First, Last: p.Last})
	}
	return out
}
