package nsagent

import (
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Job control of the main command. The shell that started the daemon sees one job: a
// process group with the daemon, the agent and the command in it.
//
//   - Ctrl-C and Ctrl-\ go from the terminal to the whole group. The agent ignores
//     them; the daemon leaves them to the command, whose end is the end of the daemon.
//   - Ctrl-Z stops the command and the daemon, by the same default action; the agent,
//     which must see the end of the daemon at any time, goes on. fg continues both.
//   - An interactive shell as the command makes a process group of its own and takes
//     the terminal. Its own job control then works without us. When it is done, or was
//     killed, restore hands the terminal back to the group.
//   - When such a shell stops itself (`suspend`), nobody would tell the outer shell.
//     The agent reports it, suspend stops the daemon too, and continues the command
//     when the daemon is continued.
type job struct {
	mu   sync.Mutex
	tty  *os.File // our own descriptor of the controlling terminal; nil after close
	pgrp int      // the daemon's process group, in the foreground when we started
}

// newJob returns the job of a command with these files, or nil if none of them is our
// controlling terminal or if we are in the background: then nobody waits for us there.
func newJob(files []*os.File) *job {
	for _, f := range files {
		fd, err := rawFD(f)
		if err != nil {
			continue
		}
		pgrp, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		if err != nil || pgrp != unix.Getpgrp() {
			continue
		}
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			continue
		}
		return &job{tty: os.NewFile(uintptr(dup), f.Name()), pgrp: pgrp}
	}
	return nil
}

// foreground returns the terminal's foreground process group.
func (j *job) foreground() (int, error) {
	fd, err := rawFD(j.tty)
	if err != nil {
		return 0, err
	}
	return unix.IoctlGetInt(fd, unix.TIOCGPGRP)
}

// setForeground gives the terminal to pgrp. A process in the background may do so only
// while it blocks SIGTTOU (POSIX tcsetpgrp); signal masks belong to threads.
func (j *job) setForeground(pgrp int) error {
	fd, err := rawFD(j.tty)
	if err != nil {
		return err
	}
	onThread(func() {
		var ttou, old unix.Sigset_t
		ttou.Val[0] = 1 << (uint(unix.SIGTTOU) - 1)
		if err = unix.PthreadSigmask(unix.SIG_BLOCK, &ttou, &old); err != nil {
			return
		}
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, pgrp)
		unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	})
	return err
}

// restore takes the terminal back for our process group.
func (j *job) restore() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.tty == nil {
		return
	}
	if pgrp, err := j.foreground(); err == nil && pgrp != j.pgrp {
		j.setForeground(j.pgrp) // fails when the terminal has hung up: then nobody needs it
	}
}

// suspend stops the daemon together with p, whose own process group has stopped, and
// continues p after the shell has continued us.
func (j *job) suspend(p *Process) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.tty == nil {
		return
	}
	theirs, err := unix.Getpgid(p.pid)
	if err != nil {
		return
	}
	j.setForeground(j.pgrp)
	stopSelf()
	if pgrp, err := j.foreground(); err == nil && pgrp == j.pgrp {
		j.setForeground(theirs) // fg, not bg
	}
	p.Signal(syscall.SIGCONT)
}

// stopSelf stops this process, and returns when somebody has continued it. The signal goes to
// our own thread: one for the whole process may be another thread's to take, and kill(2)
// return before that has (POSIX kill).
func stopSelf() {
	onThread(func() { unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGSTOP) })
}

// close lets go of the terminal.
func (j *job) close() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.tty != nil {
		j.tty.Close()
		j.tty = nil
	}
}
