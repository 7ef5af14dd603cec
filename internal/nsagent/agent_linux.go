package nsagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// killGrace is how long the agent gets to kill everything after we ask it to do so at
// once, before it is killed itself and we do the rest.
const killGrace = 5 * time.Second

// Agent is the daemon's handle on the process inside the guest's namespaces. Its
// methods may be called by several goroutines.
type Agent struct {
	spec   Spec
	log    *slog.Logger
	wire   *wire
	proc   *os.Process
	others []int // children that the daemon had before this agent
	mapped idMaps
	report Report
	tun    *os.File
	lowTUN int // descriptor of what tun becomes
	spare  int // a descriptor of the TUN for Release; -1 if none
	netns  *os.File
	kernel *KernelSockets // or nil
	nft    *os.File       // owns the tables of nftables, or nil
	watch  *watcher       // of the namespace we joined, or nil

	repairs atomic.Uint64
	pools   [socketKinds]pool
	routes  routes
	diag    diag

	tunOnce  sync.Once
	done     chan struct{} // closed when the guest is over: see Done
	doneOnce sync.Once
	ended    chan struct{} // closed when the agent and all it started are gone
	stop     context.CancelFunc
	workers  sync.WaitGroup

	waitOnce sync.Once
	state    *os.ProcessState
	waitErr  error

	mu     sync.Mutex // guards the fields below
	procs  map[uint64]*Process
	asked  map[uint64]chan<- socketsAnswer
	nextID uint64 // of processes and of requests for sockets
	over   bool   // no further process can be registered
	lost   error  // why the agent ended without being asked, or nil
}

func newAgent(spec Spec, log *slog.Logger) *Agent {
	return &Agent{
		spec:   spec,
		log:    log.With(slog.String("component", "nsagent")),
		mapped: idMaps{kind: MappingNone},
		others: directChildren(),
		spare:  -1,
		done:   make(chan struct{}),
		ended:  make(chan struct{}),
		procs:  make(map[uint64]*Process),
		asked:  make(map[uint64]chan<- socketsAnswer),
	}
}

// TUN returns the guest's device, opened with IFF_TUN, IFF_NO_PI and IFF_VNET_HDR,
// non-blocking. The caller owns it; with the last descriptor the device goes. Closing that
// takes the kernel 15 to 30 ms, unless the caller calls Release afterwards.
//
// Its number is below those of all that the engine opens later, and has to stay that: see
// lowNumbers. Who calls neither TUN nor UnpolledTUN leaves the descriptor open.
func (a *Agent) TUN() *os.File { return a.openTUN(true) }

// UnpolledTUN is TUN for a caller who waits for the device with a poller of its own: Go's
// does not know the file, which has no deadlines, and whose Read and Write fail where they
// would wait. The first call of the two decides for both.
func (a *Agent) UnpolledTUN() *os.File { return a.openTUN(false) }

func (a *Agent) openTUN(polled bool) *os.File {
	a.tunOnce.Do(func() {
		// Package os asks once, and leaves alone what would block.
		unix.SetNonblock(a.lowTUN, polled)
		a.tun = os.NewFile(uintptr(a.lowTUN), a.spec.TUN.Name)
		unix.SetNonblock(a.lowTUN, true)
	})
	return a.tun
}

// NetNS returns a descriptor of the guest's network namespace, for comparing and for
// those who may setns(2). It is open until Close returns.
func (a *Agent) NetNS() *os.File { return a.netns }

// Kernel returns the sockets of the kernel path, or nil if there is none. The caller owns
// the files.
func (a *Agent) Kernel() *KernelSockets { return a.kernel }

// Repairs returns how often the rules had to be put back, which happens on kernels
// before 5.12 only.
func (a *Agent) Repairs() uint64 { return a.repairs.Load() }

// PID returns the agent's process number on the host.
func (a *Agent) PID() int { return a.proc.Pid }

// Report returns what Start found out.
func (a *Agent) Report() Report { return a.report }

// Done is closed when the agent has ended, whatever the reason, or when the namespace
// that it joined is gone.
func (a *Agent) Done() <-chan struct{} { return a.done }

// Err tells, after Done, whether the agent has ended without being asked to: then the
// namespace that it joined may still be there. It wraps ErrClosed.
func (a *Agent) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lost
}

// serve starts the goroutines of a running agent; close waits for them.
func (a *Agent) serve() {
	ctx, cancel := context.WithCancel(context.Background()) // ends with the agent
	a.stop = cancel
	a.workers.Go(a.receive)
	if a.watch != nil {
		a.workers.Go(func() {
			if err := a.watch.run(ctx); err != nil && ctx.Err() == nil {
				a.log.Error("watch the joined namespace", slog.Any("error", err))
			}
			if ctx.Err() == nil {
				a.doneOnce.Do(func() { close(a.done) })
			}
		})
	}
}

// receive handles the agent's events until it ends.
func (a *Agent) receive() {
	for {
		var ev event
		fds, err := a.wire.receiveFDs(&ev)
		if errors.Is(err, errFilesLost) { // all can do without: sockets, and what tells a process's number
			if err = nil; ev.Sockets > 0 {
				ev.Failed = wireErrorOf(&Error{Op: "receive", On: "sockets of the guest", Err: unix.EMFILE})
			}
		}
		if err != nil {
			if err != io.EOF {
				a.log.Error("protocol error, killing the agent", slog.Any("error", err))
				a.proc.Kill()
			}
			break
		}
		if a.answered(&ev, fds) {
			continue
		}
		files := filesOf(fds)
		a.handle(&ev, files)
		closeAll(files)
	}
	a.finish()
}

// send sends a request. The error is ErrClosed when the agent has ended and we are about to
// hear of it.
func (a *Agent) send(r request, files ...*os.File) error {
	err := a.wire.send(r, files...)
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return ErrClosed
	}
	return err
}

// handle takes one event. The files stay the caller's.
func (a *Agent) handle(ev *event, files []*os.File) {
	switch {
	case ev.Log != nil:
		a.logEvent(ev.Log)
		return
	case ev.Repairs != 0:
		a.repairs.Store(ev.Repairs)
		return
	}
	a.mu.Lock()
	p := a.procs[ev.ID]
	if p != nil && (ev.Failed != nil || ev.Exited != nil) {
		delete(a.procs, ev.ID)
	}
	a.mu.Unlock()
	if p != nil {
		p.handle(ev, files)
	}
}

// logEvent writes a line on behalf of the agent.
func (a *Agent) logEvent(ev *logEvent) {
	a.log.Info(ev.Message, slog.String("on", ev.On), slog.String("error", ev.Error))
}

// finish collects the agent after its end of the socketpair was closed.
func (a *Agent) finish() {
	state, err := a.wait()
	if err != nil || !state.Success() {
		a.log.Error("the agent ended unexpectedly; killing what it left",
			slog.Any("state", state), slog.Any("error", err))
		a.killLeft()
		err = errors.Join(err, ErrClosed)
	}
	a.mu.Lock()
	a.over, a.lost = true, err
	left, asked := a.procs, a.asked
	a.procs, a.asked = nil, nil
	a.mu.Unlock()
	for _, answer := range asked {
		answer <- socketsAnswer{err: ErrClosed}
	}
	for _, p := range left {
		p.gone()
	}
	a.doneOnce.Do(func() { close(a.done) })
	close(a.ended)
}

// killLeft ends orphans of an agent that could not do so itself.
func (a *Agent) killLeft() {
	if n, err := killStrays(a.others, killGrace); err != nil || n > 0 {
		a.log.Warn("killed what the agent left", slog.Int("processes", n), slog.Any("error", err))
	}
}

// wait reaps the agent, once.
func (a *Agent) wait() (*os.ProcessState, error) {
	a.waitOnce.Do(func() {
		a.state, a.waitErr = a.proc.Wait()
		agents.mu.Lock()
		delete(agents.pids, a.proc.Pid)
		agents.mu.Unlock()
	})
	return a.state, a.waitErr
}

// abandon ends an agent whose start failed.
func (a *Agent) abandon() {
	a.wire.close() // it had reported its failure, or does not answer
	a.proc.Kill()
	a.wait()
	if a.watch != nil {
		a.watch.close()
	}
}

// Close ends the guest: TERM to its commands, KILL after StopTimeout to all that is
// left, and waits until everything is gone. When ctx ends, it kills at once. It does
// not close the TUN, which is the caller's. Calls after the first do nothing but wait.
func (a *Agent) Close(ctx context.Context) error {
	// An agent that takes longer is stopped or stuck.
	ctx, cancel := context.WithTimeout(ctx, a.spec.StopTimeout+orphanGrace+killLimit+killGrace)
	defer cancel()
	a.wire.send(request{Stop: &stopRequest{Grace: a.spec.StopTimeout}}) // fails if it has ended
	select {
	case <-a.ended:
	case <-ctx.Done():
		a.kill()
	}
	a.stop()
	a.workers.Wait()
	for k := range a.pools {
		a.pools[k].close()
	}
	a.routes.close()
	a.diag.close()
	a.wire.close()
	a.netns.Close()
	if a.spec.Join != nil && a.nft != nil {
		a.nft.Close() // returns when the tables are gone
	}
	if a.waitErr != nil {
		return fmt.Errorf("wait for the agent: %w", a.waitErr)
	}
	return nil
}

// Release lets the device and the tables of nftables go without waiting for the kernel.
// It is to be called at the very end, after Close, and after the caller has closed the
// TUN; without it they stay as long as the process. In a namespace that is not ours it
// waits, as somebody may look, or attach again.
func (a *Agent) Release() {
	a.mu.Lock()
	fds, nft := []int{a.spare}, a.nft
	a.spare, a.nft = -1, nil
	a.mu.Unlock()
	if nft != nil && a.spec.Join == nil {
		fds = append(fds, duplicate(nft))
		nft.Close()
	}
	fds = slices.DeleteFunc(fds, func(fd int) bool { return fd < 0 })
	if a.spec.Join == nil {
		closeLater(fds...)
		return
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// duplicate returns another descriptor of f, or -1.
func duplicate(f *os.File) int {
	fd, err := rawFD(f)
	if err == nil {
		fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err != nil {
		return -1
	}
	return fd
}

// kill ends the guest without waiting for anybody.
func (a *Agent) kill() {
	a.wire.send(request{Stop: &stopRequest{}})
	t := time.NewTimer(killGrace)
	defer t.Stop()
	select {
	case <-a.ended:
	case <-t.C:
		a.proc.Kill()
		<-a.ended
	}
}
