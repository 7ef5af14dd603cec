package nsagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// agentName is argv[0] of the agent, which is how ps shows it and IsAgent knows it.
const agentName = "slipway-agent"

// agentSocket is the agent's file descriptor of the socketpair.
const agentSocket = 3

// selfExe names our own program even when the file was replaced or removed since we
// started: the link leads to the inode, not to the name.
const selfExe = "/proc/self/exe"

// Start makes the namespaces of spec with an agent in them, or joins one, and returns
// when the guest's network is ready for use. ctx bounds the start only. A returned
// error is one line, an *Error where something can be said about it; nothing is left
// behind then. The caller must Close the Agent.
//
// Start makes the calling process a child subreaper, see the package comment.
func Start(ctx context.Context, spec Spec, log *slog.Logger) (*Agent, error) {
	spec, err := spec.complete()
	if err != nil {
		return nil, err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, &Error{Op: "prctl", On: "child subreaper", Err: err}
	}
	low, err := lowNumbers()
	if err != nil {
		return nil, err
	}
	a := newAgent(spec, log)
	if spec.Join != nil {
		err = a.spawnJoined()
	} else {
		err = a.spawn()
	}
	if err != nil {
		closeFDs(low)
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { a.proc.Kill() })
	err = a.handshake()
	stop()
	if err == nil {
		err = a.lowerTUN(low)
	}
	if err != nil {
		a.abandon()
		closeFDs(low)
		if ctx.Err() != nil {
			return nil, fmt.Errorf("start the agent: %w", context.Cause(ctx))
		}
		return nil, err
	}
	a.serve()
	return a, nil
}

// lowNumbers reserves the numbers for the descriptors of the TUN before anything else of
// the engine is opened. The kernel closes the descriptors of a process that is killed from
// the highest to the lowest (task_work_run of kernel/task_work.c). Where guests live on,
// as after attach, the sockets of flows, and listeners with connections that nobody has
// accepted yet, must be closed, and the guests told, while the device and its addresses
// are there.
func lowNumbers() (low []int, err error) {
	for range 2 {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			closeFDs(low)
			return nil, &Error{Op: "open", On: os.DevNull, Err: err}
		}
		low = append(low, fd)
	}
	return low, nil
}

// lowerTUN gives the TUN and its spare descriptor the numbers of low, both of them: a file
// is closed with the highest of its descriptors.
func (a *Agent) lowerTUN(low []int) error {
	high, err := rawFD(a.tun)
	for i := 0; err == nil && i < len(low); i++ {
		err = unix.Dup3(high, low[i], unix.O_CLOEXEC)
	}
	if err != nil {
		return &Error{Op: "duplicate", On: a.spec.TUN.Name, Err: err}
	}
	a.tun.Close()
	a.tun, a.lowTUN, a.spare = nil, low[0], low[1]
	return nil
}

// complete fills in defaults and checks what would otherwise fail late.
func (s Spec) complete() (Spec, error) {
	if s.TUN.Name == "" {
		s.TUN.Name = DefaultTUN
	}
	if s.TUN.MTU == 0 {
		s.TUN.MTU = 1500
	}
	if s.StopTimeout == 0 {
		s.StopTimeout = DefaultStopTimeout
	}
	s.StopTimeout = max(s.StopTimeout, 0)
	var errs []error
	if len(s.TUN.Name) >= unix.IFNAMSIZ || strings.ContainsAny(s.TUN.Name, "/% \t\n") {
		errs = append(errs, fmt.Errorf("device name %q: not one of Linux", s.TUN.Name))
	}
	if s.TUN.MTU < 1280 || s.TUN.MTU > 65535 { // RFC 8200 section 5
		errs = append(errs, fmt.Errorf("mtu: %d is outside 1280..65535", s.TUN.MTU))
	}
	for _, g := range []netip.Addr{s.Gateway4, s.Gateway6} {
		if g.IsValid() && !s.reaches(g) {
			errs = append(errs, fmt.Errorf("gateway: %v is in no subnet of the guest", g))
		}
	}
	if j := s.Join; j != nil {
		if (j.PID == 0) == (j.NetNS == "") {
			errs = append(errs, errors.New("join: need either a pid or a path"))
		}
		s.Rootless, s.PrivateMounts, s.PIDNamespace = false, false, false
		s.ResolvConf, s.Hosts = "", ""
	}
	return s, errors.Join(errs...)
}

// reaches tells whether g is on a subnet of the guest.
func (s Spec) reaches(g netip.Addr) bool {
	for _, p := range s.Addresses {
		if p.Contains(g) {
			return true
		}
	}
	return false
}

// spawn starts the agent as the first process of new namespaces.
func (a *Agent) spawn() error {
	flags := uintptr(unix.CLONE_NEWNET | unix.CLONE_NEWNS)
	if a.spec.PIDNamespace {
		flags |= unix.CLONE_NEWPID
	}
	sys := &syscall.SysProcAttr{}
	if a.spec.Rootless {
		flags |= unix.CLONE_NEWUSER
		sys.AmbientCaps = agentCaps
	}
	sys.Cloneflags = flags
	err := a.fork(selfExe, []string{agentName}, nil, sys)
	if err == nil {
		return nil
	}
	if a.spec.Rootless {
		return userNamespaceError(err)
	}
	return &Error{Op: "create", On: "namespaces", Err: err, Hint: rootHint(err)}
}

// fork starts path with one end of a new socketpair, keeps the other end, and notes
// the process as an agent. Files after the first four are extra.
func (a *Agent) fork(path string, argv []string, extra []*os.File, sys *syscall.SysProcAttr) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "agent"), os.NewFile(uintptr(pair[1]), "daemon")
	defer theirs.Close()
	if a.wire, err = newWire(ours); err != nil {
		return err
	}
	a.wire.patience = killGrace
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		a.wire.close()
		return err
	}
	defer null.Close()
	// os.Stderr is for the trace of a crash; all else travels by the socket.
	files := append([]*os.File{null, null, os.Stderr, theirs}, extra...)
	if a.spec.Held != nil {
		files = append(files, a.spec.Held)
	}
	agents.mu.Lock() // a child of ours is either known or not ours: see killStrays
	defer agents.mu.Unlock()
	a.proc, err = os.StartProcess(path, argv, &os.ProcAttr{Env: agentEnv(), Files: files, Sys: sys})
	if err != nil {
		a.wire.close()
		var errno syscall.Errno
		if errors.As(err, &errno) {
			return errno // the path says nothing: it is our own
		}
		return err
	}
	agents.pids[a.proc.Pid] = true
	return nil
}

// agentEnv is the agent's own environment, not its commands': what Go's runtime reads.
func agentEnv() []string {
	env := []string{}
	for _, name := range []string{"GODEBUG", "GOTRACEBACK", "GORACE", "GOCOVERDIR"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// handshake has the agent set up everything and takes what it passes out.
func (a *Agent) handshake() error {
	if err := a.wire.send(request{Setup: &setupRequest{Spec: a.spec, NoOwner: a.spec.noOwner}}); err != nil {
		return a.died(err)
	}
	if a.spec.Rootless { // meanwhile the agent makes the network
		m, err := mapIDs(a.proc.Pid)
		if err != nil {
			return a.lastWords(err)
		}
		a.mapped = m
		if err := a.wire.send(request{Mapped: true}); err != nil {
			return a.lastWords(a.died(err))
		}
	}
	for {
		var ev event
		files, err := a.wire.receive(&ev)
		switch {
		case err != nil:
			return a.died(err)
		case ev.Ready != nil && len(files) == len(ev.Ready.Files) && a.take(ev.Ready.Files, files):
			a.report = ev.Ready.Report
			a.report.Mapping, a.report.MappingNote = a.mapped.kind, a.mapped.note
			return nil
		}
		closeAll(files)
		switch {
		case ev.Failed != nil:
			return ev.Failed.err()
		case ev.Log != nil:
			a.logEvent(ev.Log)
		default:
			return fmt.Errorf("start the agent: unexpected answer")
		}
	}
}

// take takes the files of a guest that is ready, unless one is missing that no guest is
// without.
func (a *Agent) take(names []string, files []*os.File) bool {
	named := make(map[string]*os.File, len(files))
	for i, f := range files {
		named[names[i]] = f
	}
	if named[wireTUN] == nil || named[wireNetNS] == nil || len(named) != len(files) {
		return false
	}
	a.tun, a.netns, a.nft = named[wireTUN], named[wireNetNS], named[wireNFT]
	a.routes.socket, a.diag.socket = named[wireRoutes], named[wireDiag]
	if named[wireListener4] != nil {
		a.kernel = &KernelSockets{
			Listener4: named[wireListener4], Listener6: named[wireListener6],
			Probe4: named[wireProbe4], Probe6: named[wireProbe6],
		}
	}
	return true
}

// lastWords returns why the agent gave up while we did something for it, which then
// failed with err for that reason; or err, if it had not given up.
func (a *Agent) lastWords(err error) error {
	a.proc.Kill() // no effect if it is dead already
	for {
		var ev event
		files, rerr := a.wire.receive(&ev)
		if rerr != nil {
			return err
		}
		closeAll(files)
		if ev.Failed != nil {
			return ev.Failed.err()
		}
	}
}

// died explains a broken wire during the start by the way the agent ended.
func (a *Agent) died(err error) error {
	a.proc.Kill() // no effect if it is dead already
	state, werr := a.wait()
	if werr == nil {
		err = fmt.Errorf("it ended early: %v", state)
	}
	return &Error{Op: "start", On: "agent", Err: err}
}

// rootHint tells an ordinary user that namespaces without a user namespace are root's.
func rootHint(err error) string {
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		return "run it as root, or with --rootless"
	}
	if errors.Is(err, unix.EPERM) {
		return "root lacks CAP_SYS_ADMIN here (in a container?): try --rootless, or start the container with --privileged"
	}
	if errors.Is(err, unix.ENOSPC) {
		return "raise the limit: sysctl -w user.max_net_namespaces=10000 user.max_mnt_namespaces=10000"
	}
	return ""
}

// onThread runs f on an OS thread of its own choosing that nobody else uses meanwhile.
func onThread(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	f()
}
