package nsagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The agent's side starts here. It is one loop over requests, a goroutine that reaps
// children, and one that watches mounts.

// agentFD is how an agent is named that nsenter starts: by a descriptor of our program.
const agentFD = "/proc/self/fd/"

// IsAgent tells whether this process was started as an agent. main asks it before
// anything else, because the agent is to start fast.
func IsAgent() bool {
	if os.Args[0] == agentName {
		return true
	}
	return len(os.Args) == 2 && os.Args[1] == agentName && strings.HasPrefix(os.Args[0], agentFD)
}

// guest is the agent's state.
type guest struct {
	wire  *wire
	spec  Spec
	procs *children
	names *names
	// tables are those of nftables, or nil.
	tables  *tables
	noOwner bool // see Spec.noOwner
	// undo and kernelUndo are what to take back in a namespace that is not ours, last
	// first; the latter is of no use without the daemon.
	undo, kernelUndo []func()
}

// Main runs the agent. It does not return.
func Main() {
	err := runAgent()
	if err != nil {
		fmt.Fprintln(os.Stderr, "slipway: agent:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func runAgent() error {
	keepFiles()
	keepSignals()
	w, err := newWire(os.NewFile(agentSocket, "daemon"))
	if err != nil {
		return fmt.Errorf("file descriptor %d: %w", agentSocket, err)
	}
	// Orphans of commands come to us instead of leaving for the host's init.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	g := &guest{wire: w}
	g.procs = newChildren(w)
	defer g.takeBack()
	if err := g.start(); err != nil {
		g.takeBack()
		return w.send(event{Failed: wireErrorOf(err)})
	}
	return g.serve()
}

// keepFiles keeps every file but stdin, stdout and stderr from commands: the socket, and
// what the daemon was started with, which may be directories of the host.
func keepFiles() {
	err := unix.CloseRange(agentSocket, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC) // since Linux 5.11
	if err == nil {
		return
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		unix.CloseOnExec(agentSocket)
		return
	}
	for _, e := range fds {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd >= agentSocket {
			unix.CloseOnExec(fd)
		}
	}
}

// keepSignals makes signals that are meant for commands harmless for the agent, which
// shares the main command's process group. They must not be ignored, or commands would
// inherit that; a caught one is the default for them again. What is ignored already
// (nohup) stays so, for us and them.
func keepSignals() {
	never := make(chan os.Signal, 1) // nobody reads: what does not fit is dropped
	for _, s := range []os.Signal{
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGALRM, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGPIPE,
	} {
		if !signal.Ignored(s) {
			signal.Notify(never, s)
		}
	}
}

// start reads the spec, sets everything up, and passes the devices out.
func (g *guest) start() error {
	var req request
	files, err := g.wire.receive(&req)
	closeAll(files)
	if err != nil {
		return err
	}
	if req.Setup == nil {
		return errors.New("the first request is not the setup")
	}
	g.spec, g.noOwner = req.Setup.Spec, req.Setup.NoOwner
	named, report, err := g.setup()
	if err != nil {
		return err
	}
	// The daemon is to be the only one who has them: they go with it.
	defer func() {
		for _, f := range named {
			f.Close()
		}
	}()
	netns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return err
	}
	named[wireNetNS] = netns
	ready := &readyEvent{Report: report}
	files = nil
	for name, f := range named {
		if f != nil {
			ready.Files, files = append(ready.Files, name), append(files, f)
		}
	}
	if err := g.wire.send(event{Ready: ready}, files...); err != nil {
		return err
	}
	g.keepTables()
	return nil
}

// awaitMapping blocks until the daemon has written our user namespace's IDs.
func (g *guest) awaitMapping() error {
	var req request
	files, err := g.wire.receive(&req)
	closeAll(files)
	if err == nil && !req.Mapped {
		err = errors.New("unexpected request")
	}
	return err
}

// serve handles requests until the daemon asks us to stop or is gone.
func (g *guest) serve() error {
	requests := make(chan message)
	go g.read(requests) // ends with the process
	daemon := -1
	if g.spec.Join != nil {
		daemon, _ = unix.PidfdOpen(os.Getppid(), 0)
	}
	for m := range requests {
		switch {
		case m.Exec != nil:
			g.exec(m.ID, m.Exec, m.files)
		case m.Signal != 0:
			g.procs.signal(m.ID, m.Signal)
		case m.Sockets != nil:
			g.sockets(m.ID, m.Sockets)
		case m.Stop != nil:
			return g.end(m.Stop.Grace, requests)
		}
		closeAll(m.files)
	}
	// The daemon is gone, and another one may be about to come.
	awaitEnd(daemon)
	g.takeBackKernel()
	return g.end(g.spec.StopTimeout, nil)
}

// lastWordsLimit bounds awaitEnd.
const lastWordsLimit = time.Second

// awaitEnd waits until the process of a pidfd, if it is one, has closed all its files.
// Those of a process that is killed are closed one by one: while the flows' sockets tell
// the guests that it is over, loopback, rules and routes have to be there.
func awaitEnd(pidfd int) {
	end := time.Now().Add(lastWordsLimit)
	for left := lastWordsLimit; pidfd >= 0 && left > 0; left = time.Until(end) {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != unix.EINTR {
			return
		}
	}
}

// message is a request with its files.
type message struct {
	request
	files []*os.File
}

// read passes on requests, and closes the channel when there can be no more.
func (g *guest) read(requests chan<- message) {
	defer close(requests)
	for {
		var m message
		var err error
		if m.files, err = g.wire.receive(&m.request); err != nil {
			if err != io.EOF {
				fmt.Fprintln(os.Stderr, "slipway: agent: read requests:", err)
			}
			return
		}
		requests <- m
	}
}

// exec starts a command and answers.
func (g *guest) exec(id uint64, req *execRequest, files []*os.File) {
	if err := g.procs.start(id, req, files, g.spec.PIDNamespace); err != nil {
		g.wire.send(event{ID: id, Failed: wireErrorOf(err)})
	}
}

// end brings every process to its end: TERM for the commands, TERM for what they left,
// KILL for the rest. A further stop request without grace cuts it short.
func (g *guest) end(grace time.Duration, requests <-chan message) error {
	ctx, hurry := context.WithTimeout(context.Background(), grace) // context of the process's last act
	defer hurry()
	if requests != nil {
		go g.refuse(requests, hurry) // ends with the process
	}
	if grace > 0 {
		g.procs.terminateCommands()
		g.procs.await(ctx, g.procs.commandsLeft)
		ctx, cancel := context.WithTimeout(ctx, orphanGrace)
		defer cancel()
		g.procs.terminateChildren()
		g.procs.await(ctx, g.procs.childrenLeft)
	}
	return g.procs.killAll(g.spec.PIDNamespace)
}

// refuse answers requests while we are ending.
func (g *guest) refuse(requests <-chan message, hurry func()) {
	for m := range requests {
		closeAll(m.files)
		switch {
		case m.Signal != 0:
			g.procs.signal(m.ID, m.Signal)
		case m.Exec != nil:
			g.wire.send(event{ID: m.ID, Failed: wireErrorOf(ErrClosed)})
		case m.Sockets != nil:
			g.wire.send(event{ID: m.ID}) // none
		case m.Stop != nil && m.Stop.Grace == 0:
			hurry()
		}
	}
}

// takeBack removes what the end of the namespace or of the TUN does not.
func (g *guest) takeBack() {
	g.takeBackKernel()
	for i := len(g.undo) - 1; i >= 0; i-- {
		g.undo[i]()
	}
	g.undo = nil
}

// takeBackKernel removes what brings connections to a listener that has gone, or is
// about to.
func (g *guest) takeBackKernel() {
	for i := len(g.kernelUndo) - 1; i >= 0; i-- {
		g.kernelUndo[i]()
	}
	g.kernelUndo = nil
}

// logf has the daemon write a line.
func (g *guest) logf(message, on string, err error) {
	ev := &logEvent{Message: message, On: on}
	if err != nil {
		ev.Error = err.Error()
	}
	g.wire.send(event{Log: ev})
}
