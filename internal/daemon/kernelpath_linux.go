package daemon

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/forward"
	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/loop"
	"github.com/slipway-net/slipway/internal/nsagent"
	"github.com/slipway-net/slipway/stack/kernel"
	"github.com/slipway-net/slipway/stack/link"
	"github.com/slipway-net/slipway/stack/netstack"
)

// Theory of operation.
//
// The kernel path needs three parts that do not know each other: netstack holds the
// SYN, forward.Sockets dials and later joins the sockets, kernel.Path has the guest's
// kernel answer. All of them work on the thread of one event loop, which reads the TUN,
// too. Without the kernel path there is no loop and netstack reads the TUN by itself.
//
// Whether the path works is tried once, before anything of the user's runs: a socket of
// the guest's namespace connects to the gateway, and its SYN is answered as a guest's
// would be. A family that fails the test takes netstack.

// probeTime is how long one try of the self-test may take. It has no wire in it, but the
// second one waits for a repeated SYN.
const probeTime = 1500 * time.Millisecond

// discardPort is what the self-test connects to on the gateway, where nothing listens
// (RFC 863).
const discardPort = 9

// kernelPath is what the parts of the kernel path need of each other. It implements
// netstack.Kernel.
type kernelPath struct {
	loop    *loop.Loop
	link    *link.TUN
	sockets *forward.Sockets
	path    *kernel.Path
	files   *nsagent.KernelSockets

	v4, v6 error // why the family takes netstack; nil if it takes the kernel path
}

var _ netstack.Kernel = (*kernelPath)(nil)

// openLink takes over the device, for the kernel path if there is one.
func (e *engine) openLink(s *services) (err error) {
	if e.cfg.Path == config.PathNetstack {
		e.pathWhy = "as configured"
	} else if e.pathWhy = e.agent.Report().Kernel; e.pathWhy == "" {
		if files := e.agent.Kernel(); files != nil {
			e.kernel, err = newKernelPath(s, files)
			if err != nil {
				return err
			}
			e.link, err = link.NewTUN(e.agent.UnpolledTUN(), e.cfg.MTU)
			e.kernel.link = e.link
			return err
		}
		e.pathWhy = "the agent has no sockets for it"
	}
	e.link, err = link.NewTUN(e.agent.TUN(), e.cfg.MTU)
	return err
}

func newKernelPath(s *services, files *nsagent.KernelSockets) (*kernelPath, error) {
	k := &kernelPath{files: files}
	s.onStop(k.closeFiles)
	var err error
	if k.loop, err = loop.New(); err != nil {
		return nil, err
	}
	k.loop.Start()
	s.onStop(k.loop.Close)
	return k, nil
}

// open makes the parts.
func (k *kernelPath) open(s *services, e *engine) error {
	e.forward.UseLoop(k.loop)
	k.sockets = e.forward.NewSockets(k.loop)
	var fds [2]int
	for i, f := range []*os.File{k.files.Listener4, k.files.Listener6} {
		var err error
		if fds[i], err = unpolled(f); err != nil {
			return fmt.Errorf("open listener of the kernel path: %w", err)
		}
	}
	k.path = kernel.New(kernel.Config{
		Link: k.link, Loop: k.loop, Relay: k.sockets, Wire: e.stack, Log: e.log,
		Listener4: fds[0], Listener6: fds[1],
	})
	s.onStop(k.path.Close)
	s.onStop(k.sockets.Close)
	return nil
}

// unpolled closes f and returns another descriptor of the same socket, which Go's poller
// does not know: it would be woken for nothing. It returns -1 for nil.
func unpolled(f *os.File) (fd int, err error) {
	if f == nil {
		return -1, nil
	}
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(cerr, err)
}

// closeFiles closes what the agent gave us.
func (k *kernelPath) closeFiles() {
	for _, f := range []*os.File{k.files.Listener4, k.files.Listener6, k.files.Probe4, k.files.Probe6} {
		if f != nil {
			f.Close()
		}
	}
}

// poll is netstack's Config.Poll.
func (k *kernelPath) poll(ready func() bool) (stop func(), err error) {
	handler := loop.HandlerFunc(func(uint32) bool { return ready() })
	var ref loop.Ref
	watch := func(fd int) { ref, err = k.loop.Add(fd, loop.Readable, handler) }
	if !k.loop.Do(func() { err = errors.Join(k.link.Watch(watch), err) }) {
		return nil, loop.ErrClosed
	}
	if err != nil {
		return nil, err
	}
	return func() {
		k.loop.Do(func() { k.link.Watch(func(fd int) { k.loop.Remove(fd, ref) }) })
	}, nil
}

// Begin implements netstack.Kernel.
func (k *kernelPath) Begin(t flow.Tuple, then func(flow.Verdict)) (cancel func()) {
	d := k.sockets.Begin(t, then)
	if d == nil {
		return nil
	}
	return func() { k.loop.Post(d.Cancel) }
}

// Answer implements netstack.Kernel.
func (k *kernelPath) Answer(t flow.Tuple, syn []byte, h link.Header, v flow.Verdict, then func(ok bool)) {
	k.path.Answer(t, syn, h, v, then)
}

// Live implements netstack.Kernel.
func (k *kernelPath) Live(t flow.Tuple) bool { return k.sockets.Live(t) }

// Do implements netstack.Kernel.
func (k *kernelPath) Do(f func()) bool { return k.loop.Do(f) }

// chooseKernel tests the kernel path and uses it for the families where it works. It
// returns an error if it does for none and the configuration insists.
func (e *engine) chooseKernel() error {
	if k := e.kernel; k != nil {
		n := &e.net
		var both sync.WaitGroup
		both.Go(func() { k.v4 = e.probeKernel(k.files.Probe4, n.Guest4, n.Gateway4) })
		both.Go(func() { k.v6 = e.probeKernel(k.files.Probe6, n.Guest6, n.Gateway6) })
		both.Wait()
		if r := e.agent.Report().Kernel6; r != "" {
			k.v6 = errors.New(r)
		}
		e.stack.UseKernel(k.v4 == nil, k.v6 == nil)
		e.pathWhy = k.why()
	}
	if e.cfg.Path == config.PathKernel && !e.kernel.works() {
		return &Problem{
			Err:  fmt.Errorf("use the kernel path: %s", e.pathWhy),
			Hint: "let slipway choose: --path auto",
		}
	}
	return nil
}

// works reports whether the path serves a family.
func (k *kernelPath) works() bool { return k != nil && (k.v4 == nil || k.v6 == nil) }

// why says what the self-test found.
func (k *kernelPath) why() string {
	switch {
	case k.v4 == nil && k.v6 == nil:
		return "the self-test passed"
	case k.v4 == nil:
		return fmt.Sprintf("the self-test passed; IPv6 takes netstack: %v", k.v6)
	case k.v6 == nil:
		return fmt.Sprintf("the self-test passed; IPv4 takes netstack: %v", k.v4)
	}
	return k.v4.Error()
}

// probeKernel connects sock, a socket of the guest's namespace, from guest to gateway.
func (e *engine) probeKernel(sock *os.File, guest, gateway netip.Addr) error {
	fd, err := unpolled(sock)
	switch {
	case err != nil:
		return fmt.Errorf("self-test: %w", err)
	case fd < 0:
		return errors.New("self-test: no socket for it")
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(guest, 0))); err != nil {
		return fmt.Errorf("self-test: bind to %v: %w", guest, err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	t := flow.Tuple{
		Proto: flow.TCP, Guest: netip.AddrPortFrom(guest, portOf(sa)), Target: netip.AddrPortFrom(gateway, discardPort),
	}
	// On a busy machine an answer can be late. The second try is the guest's: its
	// kernel repeats the SYN after a second (RFC 6298).
	if err = e.probeOnce(t, func() error { return unix.Connect(fd, sockaddr(t.Target)) }); errors.Is(err, errLateAnswer) {
		err = e.probeOnce(t, func() error { return nil })
	}
	return err
}

// errLateAnswer says that a SYN was given back and no connection came of it.
var errLateAnswer = errors.New("self-test: the guest's kernel did not answer a SYN that was given back to it")

// probeOnce is one try.
func (e *engine) probeOnce(t flow.Tuple, connect func() error) error {
	answered := make(chan bool, 1)
	e.stack.ProbeKernel(t, func(ok bool) { answered <- ok })
	if err := connect(); err != nil && err != unix.EINPROGRESS {
		return fmt.Errorf("self-test: connect to %v: %w", t.Target, err)
	}
	late := time.NewTimer(probeTime)
	defer late.Stop()
	select {
	case ok := <-answered:
		if !ok {
			return errLateAnswer
		}
		return nil
	case <-late.C:
		return errors.New("self-test: no SYN came out of the guest")
	}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func portOf(sa unix.Sockaddr) uint16 {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port)
	case *unix.SockaddrInet6:
		return uint16(sa.Port)
	}
	return 0
}

// statusPath is the API's word for the choice.
func (e *engine) statusPath() api.PathStatus {
	s := api.PathStatus{
		Configured: e.cfg.Path, TCP: flow.Netstack, UDP: flow.Netstack, Ping: flow.Netstack,
		Why: strings.TrimSpace(e.pathWhy),
	}
	if e.kernel.works() {
		s.TCP = flow.Kernel
	}
	return s
}

// counters are the kernel path's, for status.
func (k *kernelPath) counters(a *nsagent.Agent) map[string]int64 {
	if k == nil {
		return map[string]int64{}
	}
	out := counters(k.path.Stats())
	out["rules_repaired"] = int64(a.Repairs())
	return out
}
