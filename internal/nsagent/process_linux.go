package nsagent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Process is a command running in the guest. Its methods may be called by several
// goroutines.
type Process struct {
	agent   *Agent
	id      uint64
	pid     int
	job     *job          // the terminal's side of the main command, or nil
	settled chan struct{} // closed when the start is decided: pid or err is set
	err     error
	exited  chan struct{} // closed when status or waitErr is set
	status  Status
	waitErr error
}

// Exec starts a command in the guest. It returns when the program runs, with an
// *ExecError when it cannot be started. ctx bounds the start only: a program that
// starts in spite of a cancelled ctx is killed.
func (a *Agent) Exec(ctx context.Context, cmd Command) (*Process, error) {
	req, err := cmd.request()
	if err != nil {
		return nil, err
	}
	files, null, err := cmd.files()
	if err != nil {
		return nil, err
	}
	defer null.Close()
	p, err := a.register()
	if err != nil {
		return nil, err
	}
	if cmd.Main {
		p.job = newJob(files)
	}
	if err := a.send(request{ID: p.id, Exec: req}, files...); err != nil {
		a.forget(p)
		return nil, fmt.Errorf("exec on %s: %w", cmd.Args[0], err)
	}
	select {
	case <-p.settled:
	case <-ctx.Done():
		p.Signal(syscall.SIGKILL) // the agent handles requests in order
		return nil, context.Cause(ctx)
	}
	if p.err != nil {
		return nil, p.err
	}
	return p, nil
}

// request checks c and prepares it for the wire.
func (c Command) request() (*execRequest, error) {
	if len(c.Args) == 0 || c.Args[0] == "" {
		return nil, &ExecError{Code: CodeNotFound, Name: `""`, Err: errors.New("no command given")}
	}
	for _, list := range [][]string{c.Args, c.Env} {
		for _, s := range list {
			if strings.IndexByte(s, 0) >= 0 {
				return nil, &ExecError{Code: CodeNotExecutable, Name: c.Args[0], Err: errors.New("an argument contains a NUL byte")}
			}
		}
	}
	return &execRequest{
		Args: packStrings(c.Args), Env: packStrings(c.Env), Dir: c.Dir, TTY: c.TTY, Main: c.Main,
	}, nil
}

// files returns stdin, stdout and stderr; null stands in for missing ones and is to be
// closed by the caller.
func (c Command) files() (files []*os.File, null *os.File, err error) {
	if null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return nil, nil, err
	}
	files = []*os.File{c.Stdin, c.Stdout, c.Stderr}
	for i, f := range files {
		if f == nil {
			files[i] = null
		}
	}
	return files, null, nil
}

// register makes a Process with a number of its own.
func (a *Agent) register() (*Process, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return nil, ErrClosed
	}
	a.nextID++
	p := &Process{agent: a, id: a.nextID, settled: make(chan struct{}), exited: make(chan struct{})}
	a.procs[p.id] = p
	return p, nil
}

// forget takes back register.
func (a *Agent) forget(p *Process) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.procs, p.id)
	p.job.close()
}

// handle takes an event about p. The agent sends Failed alone, or Started and later
// Exited; anything else is ignored.
func (p *Process) handle(ev *event, files []*os.File) {
	started := p.pid != 0
	switch {
	case ev.Failed != nil && !started:
		p.err = ev.Failed.err()
		p.job.close() // nobody may wait for the answer any more
		close(p.settled)
		close(p.exited)
	case ev.Started > 0 && !started:
		p.pid = ev.Started
		if len(files) == 1 {
			p.pid = hostPID(files[0], ev.Started)
		}
		close(p.settled)
	case ev.Stopped && started:
		p.job.suspend(p)
	case ev.Exited != nil && started:
		p.status = statusOf(ev.Exited.Status)
		p.job.restore()
		p.job.close()
		close(p.exited)
	}
}

// gone marks p ended together with the agent, nobody knows how.
func (p *Process) gone() {
	if p.pid == 0 {
		p.err = ErrClosed
		close(p.settled)
	}
	p.waitErr = ErrClosed
	p.job.restore()
	p.job.close()
	close(p.exited)
}

// PID returns the process number on the host.
func (p *Process) PID() int { return p.pid }

// Signal sends sig to the process. It returns nil when the process is ending just now.
func (p *Process) Signal(sig os.Signal) error {
	s, ok := sig.(syscall.Signal)
	if !ok || s <= 0 {
		return fmt.Errorf("signal %v: %w", sig, unix.EINVAL)
	}
	select {
	case <-p.exited:
		return os.ErrProcessDone
	default:
	}
	return p.agent.send(request{ID: p.id, Signal: s})
}

// Wait blocks until the process has ended. Children that it left are not waited for.
// It returns ErrClosed when the agent ended first.
func (p *Process) Wait() (Status, error) {
	<-p.exited
	return p.status, p.waitErr
}

// statusOf says ws as a POSIX shell does (Shell Command Language, 2.8.2).
func statusOf(ws syscall.WaitStatus) Status {
	if ws.Signaled() {
		return Status{Code: 128 + int(ws.Signal()), Signal: ws.Signal()}
	}
	return Status{Code: ws.ExitStatus()}
}

// hostPID returns the number that the process behind pidfd has on the host, or inside,
// its number in the guest, if that cannot be told.
func hostPID(pidfd *os.File, inside int) int {
	fd, err := rawFD(pidfd)
	if err != nil {
		return inside
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return inside
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if v, ok := strings.CutPrefix(sc.Text(), "Pid:"); ok {
			if n, err := strconv.Atoi(strings.TrimSpace(v)); err == nil && n > 0 {
				return n
			}
		}
	}
	return inside
}
