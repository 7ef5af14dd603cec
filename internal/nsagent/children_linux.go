package nsagent

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// orphanGrace is how long processes that a command left behind get between TERM
	// and KILL. It is short: nobody waits for what they still write, and `run`
	// would seem to hang after its command has ended.
	orphanGrace = 2 * time.Second
	// killLimit is how long we wait for killed processes. One in uninterruptible
	// sleep (a dead NFS server) stays, and the daemon logs it.
	killLimit = 5 * time.Second
	// defaultPath is searched when a command's environment has no PATH.
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// children starts commands and reaps every child of the agent: commands, and orphans
// that the kernel reparents to us.
type children struct {
	wire    *wire
	changed chan struct{} // has an element after a child was reaped

	mu    sync.Mutex // held over fork and exec, so that no unknown pid is reaped
	byPID map[int]*command
	byID  map[uint64]*command
}

// command is a child that the daemon asked for.
type command struct {
	id   uint64
	pid  int
	main bool
}

// newChildren starts to reap; it goes on until the process ends.
func newChildren(w *wire) *children {
	c := &children{
		wire:    w,
		changed: make(chan struct{}, 1),
		byPID:   make(map[int]*command),
		byID:    make(map[uint64]*command),
	}
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	go func() {
		for range died {
			c.childrenLeft()
			select {
			case c.changed <- struct{}{}:
			default:
			}
		}
	}()
	return c
}

// childrenLeft reaps what is dead and tells whether any child is alive.
func (c *children) childrenLeft() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG|syscall.WUNTRACED, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return false // ECHILD
		case pid == 0:
			return true
		default:
			c.reapedLocked(pid, ws)
		}
	}
}

// reapedLocked reports a change of a child's state if it is a command's. The caller
// must hold mu.
func (c *children) reapedLocked(pid int, ws syscall.WaitStatus) {
	cmd := c.byPID[pid]
	switch {
	case cmd == nil:
	case ws.Stopped():
		// In our own process group the terminal has stopped the daemon, too.
		if pgid, err := unix.Getpgid(pid); err == nil && cmd.main && pgid != unix.Getpgrp() {
			c.wire.send(event{ID: cmd.id, Stopped: true})
		}
	default:
		delete(c.byPID, pid)
		delete(c.byID, cmd.id)
		c.wire.send(event{ID: cmd.id, Exited: &exitEvent{Status: ws}})
	}
}

// commandsLeft tells whether a command is running.
func (c *children) commandsLeft() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.byPID) > 0
}

// signal sends sig to a command, if it is still there.
func (c *children) signal(id uint64, sig syscall.Signal) {
	c.mu.Lock() // it cannot be reaped meanwhile, so the pid is its own
	defer c.mu.Unlock()
	if cmd := c.byID[id]; cmd != nil {
		unix.Kill(cmd.pid, sig)
	}
}

// terminateCommands asks commands to end. A stopped one is continued, or it would not
// hear it.
func (c *children) terminateCommands() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for pid := range c.byPID {
		unix.Kill(pid, unix.SIGTERM)
		unix.Kill(pid, unix.SIGCONT)
	}
}

// terminateChildren asks every child to end. Grandchildren are their parents' business,
// or become children when these end.
func (c *children) terminateChildren() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pid := range directChildren() {
		unix.Kill(pid, unix.SIGTERM)
		unix.Kill(pid, unix.SIGCONT)
	}
}

// await blocks while left says so, until ctx ends.
func (c *children) await(ctx context.Context, left func() bool) {
	for left() {
		select {
		case <-c.changed:
		case <-ctx.Done():
			return
		}
	}
}

// killAll kills everything. Each killed child hands its own children to us, so it is
// repeated until there are none.
func (c *children) killAll(everybody bool) error {
	for deadline := time.Now().Add(killLimit); c.childrenLeft(); {
		if time.Now().After(deadline) {
			return errors.New("some processes cannot be killed")
		}
		c.mu.Lock()
		if everybody { // in our pid namespace, except ourselves
			unix.Kill(-1, unix.SIGKILL)
		} else {
			for _, pid := range directChildren() {
				unix.Kill(pid, unix.SIGKILL)
			}
		}
		c.mu.Unlock()
		select {
		case <-c.changed:
		case <-time.After(killPoll):
		}
	}
	return nil
}

// start starts a command and reports it. The daemon hears nothing of it when the
// returned error is not nil.
func (c *children) start(id uint64, req *execRequest, files []*os.File, ownPIDs bool) error {
	args, env := unpackStrings(req.Args), unpackStrings(req.Env)
	if len(args) == 0 || len(files) != 3 {
		return unix.EINVAL
	}
	fds := make([]uintptr, len(files))
	for i, f := range files {
		fd, err := rawFD(f)
		if err != nil {
			return err
		}
		fds[i] = uintptr(fd)
	}
	defer runtime.KeepAlive(files)
	if req.TTY {
		if _, err := unix.IoctlGetTermios(int(fds[0]), unix.TCGETS); err != nil {
			return &Error{Op: "take", On: "the controlling terminal", Err: err}
		}
	}
	if err := checkDir(req.Dir); err != nil {
		return err
	}
	path, err := lookPath(args[0], req.Dir, env)
	if err != nil {
		return err
	}
	attr := &syscall.ProcAttr{Dir: req.Dir, Env: env, Files: fds, Sys: &syscall.SysProcAttr{
		Setsid: !req.Main, Setctty: req.TTY, Ctty: 0,
	}}
	c.mu.Lock()
	defer c.mu.Unlock()
	pid, err := forkExec(path, args, attr)
	if err != nil {
		return &ExecError{Code: execCode(err), Name: args[0], Err: err}
	}
	cmd := &command{id: id, pid: pid, main: req.Main}
	c.byPID[pid], c.byID[id] = cmd, cmd
	return c.startedLocked(cmd, ownPIDs)
}

// startedLocked tells the daemon the command's process number, and how to find out its
// own if we are in a pid namespace. The caller must hold mu.
func (c *children) startedLocked(cmd *command, ownPIDs bool) error {
	ev := event{ID: cmd.id, Started: cmd.pid}
	if ownPIDs {
		if fd, err := unix.PidfdOpen(cmd.pid, 0); err == nil { // since Linux 5.3
			f := os.NewFile(uintptr(fd), "pidfd")
			defer f.Close()
			return c.wire.send(ev, f)
		}
	}
	return c.wire.send(ev)
}

// forkExec starts a program, or a script without #! as shells and execvp(3) do.
func forkExec(path string, args []string, attr *syscall.ProcAttr) (pid int, err error) {
	onThread(func() {
		dropInheritable()
		pid, err = syscall.ForkExec(path, args, attr)
		if err == unix.ENOEXEC {
			pid, err = syscall.ForkExec("/bin/sh", append([]string{"sh", path}, args[1:]...), attr)
		}
	})
	return pid, err
}

// dropInheritable clears this thread's inheritable and with them its ambient
// capabilities, which are ours alone: commands get theirs by being root (see agentCaps).
func dropInheritable() {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&head, &data[0]) != nil || data[0].Inheritable|data[1].Inheritable == 0 {
		return
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	unix.Capset(&head, &data[0]) // dropping is always allowed
}

// execCode tells a program that is missing from one that does not run.
func execCode(err error) int {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return CodeNotFound
	}
	return CodeNotExecutable
}

// checkDir makes sure that the working directory can be entered; after the fork its
// errors would look like the program's.
func checkDir(dir string) error {
	if dir == "" {
		return nil
	}
	if !filepath.IsAbs(dir) {
		return &Error{Op: "change directory", On: dir, Err: errors.New("not an absolute path")}
	}
	info, err := os.Stat(dir)
	switch {
	case err != nil:
		err = errors.Unwrap(err)
	case !info.IsDir():
		err = unix.ENOTDIR
	default:
		err = unix.Faccessat(unix.AT_FDCWD, dir, unix.X_OK, unix.AT_EACCESS)
	}
	if err != nil {
		return &Error{Op: "change directory", On: dir, Err: err, Hint: "name a directory that exists in the guest"}
	}
	return nil
}

// lookPath finds the program to execute as POSIX shells do (Shell Command Language,
// 2.9.1.4): names with a slash stand for themselves, others are searched in PATH.
func lookPath(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if err := executable(at(dir, name)); err != nil {
			return "", &ExecError{Code: execCode(err), Name: name, Err: err}
		}
		return name, nil
	}
	denied := error(nil)
	for _, d := range filepath.SplitList(searchPath(env)) {
		if d == "" {
			d = "." // POSIX: an empty prefix is the working directory
		}
		path := d + "/" + name
		err := executable(at(dir, path))
		if err == nil {
			return path, nil
		}
		if denied == nil && execCode(err) != CodeNotFound {
			denied = err
		}
	}
	if denied != nil {
		return "", &ExecError{Code: CodeNotExecutable, Name: name, Err: denied}
	}
	return "", &ExecError{Code: CodeNotFound, Name: name, Err: errors.New("not found in PATH")}
}

// searchPath returns the last PATH of env.
func searchPath(env []string) string {
	path := defaultPath
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	return path
}

// at returns path as seen from dir.
func at(dir, path string) string {
	if dir == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// executable returns nil if path is a file that we may execute.
func executable(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.EISDIR
	}
	return unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS)
}
